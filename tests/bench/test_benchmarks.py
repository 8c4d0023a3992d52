"""The benchmarks at tiny sizes: what they print, what their figures are of, and what users get wrong."""

from __future__ import annotations

import argparse
import json
import sys

import pytest
import torch
from transformers.activations import NewGELUActivation
from transformers.models.t5.modeling_t5 import T5Attention, T5LayerNorm, T5Stack

from hdscale.bench import decode, report, rows, scaling, variants
from hdscale.bench.options import DecodeOptions, ReportOptions, ScalingOptions
from hdscale.bench.released import ReleasedModel
from hdscale.bench.scaling_rank import CollectiveCounter, size_of
from hdscale.commands.arguments import add_options, read_options
from hdscale.commands.cli import main
from hdscale.modeling import build_model

TINY = ["--size", "tiny-1"]


@pytest.fixture
def bench(monkeypatch):
    def call(*arguments: str) -> int:
        # the command line is written into the results
        monkeypatch.setattr(sys, "argv", ["hdscale", "bench", *arguments])
        return main(["bench", *arguments])

    return call


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["step", "--size", "tiny-3"], "tiny-"),
        (["step", "--variants", "adaptor"], "adapter"),
        (["step", "--steps", "0"], "--steps=0: must be at least 1"),
        (["step", "--tokens-per-micro-batch", "0"], "--tokens-per-micro-batch=0: must be at least 1"),
        (["decode", "--lengths", "real"], "--data-root"),
        (["decode", "--lengths", "12"], "512+128"),
        (["decode", "--turns", "0"], "--turns=0"),
        (["data", "--ranks", "3"], "multiple"),
        (["data", "--consume", "0"], "--consume=0"),
        (["scaling", "--ranks", "3"], "--ranks 3"),
        (["scaling", "--nvlink", "0"], "--nvlink=0"),
        (["scaling", "--predict-size", "t5-v1_1-larg"], "t5-v1_1-large"),
    ],
)
def test_mistakes_are_one_line(bench, capsys, arguments, words):
    assert bench(*arguments) == 2
    error = capsys.readouterr().err.strip()
    assert words in error and "\n" not in error


def test_step(bench, capsys, tmp_path):
    table = tmp_path / "table.md"
    assert bench("step", *TINY, "--global-batch-size", "8", "--micro-batch-size", "4", "--steps", "2",
                 "--lengths", "12+3", "--json", str(tmp_path / "step.json"), "--markdown", str(table)) == 0  # fmt: skip
    found = json.loads((tmp_path / "step.json").read_text())
    by_name = {row["variant"]: row for row in found["rows"]}
    assert list(by_name) == ["hdscale", "released-fp32", "released-bf16", "adapter", "full"]
    assert by_name["adapter"]["trainable"] == pytest.approx(by_name["hdscale"]["trainable"], rel=1e-2)
    assert all(row["samples/s"] == pytest.approx(8 / row["seconds"]) for row in found["rows"])
    assert all(row["tokens/s"] == pytest.approx(8 * 15 / row["seconds"]) for row in found["rows"])
    # weights, masters and two moments at least, and bf16 halves the weights
    for name in ("hdscale", "released-fp32"):
        assert by_name[name]["peak_gb"] > 12e-9 * by_name[name]["trainable"]
    assert by_name["released-bf16"]["peak_gb"] < by_name["released-fp32"]["peak_gb"]
    assert all(sum(shares.values()) == pytest.approx(1, abs=0.01) for shares in found["share_of_time"].values())
    assert found["machine"]["command"].endswith("--lengths 12+3")
    printed, text = capsys.readouterr().out, table.read_text()
    assert "samples/s" in printed and "…" not in printed
    assert text.startswith("## training step, tiny-1") and "| hdscale | float32 |" in text


def test_step_by_tokens(bench, tmp_path):
    target = tmp_path / "step.json"
    assert bench("step", *TINY, "--global-batch-size", "8", "--steps", "1", "--lengths", "30+2",
                 "--variants", "hdscale", "--tokens-per-micro-batch", "64", "--json", str(target)) == 0  # fmt: skip
    assert json.loads(target.read_text())["rows"][0]["seconds"] > 0


def test_decode(bench, tmp_path):
    target = tmp_path / "decode.json"
    assert bench("decode", *TINY, "--batch-size", "4", "--rows", "30", "--every", "3", "--tokens", "5",
                 "--mixed-batches", "2", "--turns", "1", "--json", str(target)) == 0  # fmt: skip
    found = json.loads(target.read_text())
    assert [row["side"] for row in found["rows"]] == [
        "hdscale-fp32",
        "released-fp32",
        "hdscale-bf16",
        "released-bf16",
    ] * 3
    assert found["validation_rows"] == dict.fromkeys(rows.GLUE_LENGTHS, 30)
    assert 0 <= found["padding"]["hdscale"] < found["padding"]["released"] < 1
    # one batch in three stands for all
    assert all(
        mean == pytest.approx(found["mean_source_tokens"]["whole"], rel=0.1)
        for mean in found["mean_source_tokens"].values()
    )
    for row in found["rows"]:
        assert row["rows/s"] == pytest.approx(row["rows"] / row["seconds"])
        other = next(one for one in found["rows"] if (one["what"], one["side"]) == (row["what"], "released-bf16"))
        assert row["x_released-bf16"] == pytest.approx(row["rows/s"] / other["rows/s"])


def test_both_sides_decode_every_row_once():
    options = DecodeOptions(lengths="glue", batch_size=4, tokens=5, every=1)
    mixed, sets = rows.make_rows(options, 10, "tiny-1"), rows.evaluation_sets(options, "tiny-1", 7)
    for _, ours, theirs in decode.comparisons(options, mixed, sets):
        one, other = (
            sorted((row.task, row.id) for batches, *_ in jobs for batch in batches for row in batch)
            for jobs in (ours, theirs)
        )
        assert one == other and len(one) == decode.count_rows(ours)
        assert [lengths for _, *lengths in ours] == [lengths for _, *lengths in theirs]


def test_the_released_manner_runs_transformers_modules():
    ours = build_model(variants.hyperdecoder_settings("tiny-1", backend="torch")).eval()
    with torch.no_grad():
        for parameter in ours.method.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    released = ReleasedModel(ours)
    assert {T5Stack, T5Attention, T5LayerNorm, NewGELUActivation} <= {type(m) for m in released.theirs.modules()}
    assert sum(p.numel() for p in released.theirs.parameters()) == sum(p.numel() for p in ours.base.parameters())
    ids = torch.randint(3, 100, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    batch = {"input_ids": ids, "attention_mask": mask, "labels": ids[:, :3]}
    with torch.no_grad():
        found = released.encode(ids, mask)[mask.bool()]
        assert torch.allclose(found, ours.encode(ids, mask).hidden[mask.bool()], rtol=1e-4, atol=1e-4)
        assert float(released.loss_sum(batch)) == pytest.approx(float(ours(**batch).loss_sum), rel=1e-5)


def test_data(bench, tmp_path):
    target = tmp_path / "data.json"
    assert bench("data", *TINY, "--global-batch-size", "32", "--micro-batch-size", "8",
                 "--tokens-per-micro-batch", "256", "--batches", "3", "--steps", "1", "--ranks", "2",
                 "--json", str(target)) == 0  # fmt: skip
    found = json.loads(target.read_text())
    assert [row["part"] for row in found["rows"]] == ["order", "fetch", "deal", "collate", "all", "feed"]
    assert all(row["rows/s"] == pytest.approx(32e3 / row["ms_per_batch"]) for row in found["rows"])
    consumed = found["samples_per_second_that_training_consumes"]
    assert all(row["times_what_a_step_consumes"] == pytest.approx(row["rows/s"] / consumed) for row in found["rows"])
    whole, random, alike, by_tokens = found["share_of_padding"].values()
    assert 0 <= alike < random < whole < 1 and 0 <= by_tokens < whole


def test_what_ranks_send_is_what_zero_2_must():
    options = ScalingOptions(
        lengths="9+2", size="tiny-1", dtype="bf16", micro_batch_size=2, steps=1, threads=1, global_batch_size=8
    )
    found = scaling.world(options, 2, 8)
    assert found["ranks"] == 2 and found["micro_batches"] == 2 and found["seconds"] > 0
    arithmetic = scaling.arithmetic(found, options)
    assert arithmetic["bytes"] == found["trainable"] * (4 * 2 + 2)
    assert arithmetic["counted_over_expected"] == pytest.approx(1, abs=1e-3)


@pytest.mark.slow
def test_scaling(bench, tmp_path):
    target = tmp_path / "scaling.json"
    assert bench("scaling", *TINY, "--ranks", "2", "--global-batch-size", "4", "--micro-batch-size", "2",
                 "--steps", "1", "--lengths", "9+2", "--json", str(target)) == 0  # fmt: skip
    found = json.loads(target.read_text())
    assert [(row["what"], row["batch"], row["efficiency"]) for row in found["rows"]] == [
        ("fixed global batch", 4, 1.0), ("fixed share", 8, 1.0),
    ]  # fmt: skip


def test_predictions_follow_bandwidth():
    options = ScalingOptions(
        predict_size="tiny-4",
        predict_batch=16,
        predict_tokens=48,
        tflops=0.001,
        nvlink=200.0,
        infiniband=25.0,
        latency=0.0,
    )
    near, far = scaling.predictions(options)
    assert 0 < far["efficiency"] < near["efficiency"] < 1
    assert far["ms communicating"] == pytest.approx(8 * near["ms communicating"])
    assert near["MB per step and rank"] == pytest.approx(7 / 8 * near["trainable"] * 10 / 1e6)


def test_collectives_are_counted_once():
    counter = CollectiveCounter()

    def outer(tensor):
        return inner([tensor, tensor])

    inner, outer = counter._counting("inner", lambda tensors: None), counter._counting("outer", outer)
    outer(torch.zeros(3))
    assert dict(counter.bytes) == {"outer": 12} and dict(counter.calls) == {"outer": 1}
    counter.reset()
    inner(torch.zeros(3, dtype=torch.bfloat16))
    assert dict(counter.bytes) == {"inner": 6}
    assert size_of([torch.zeros(2), (torch.zeros(1, dtype=torch.int64), None)]) == 16


def test_op(bench, tmp_path):
    target = tmp_path / "op.json"
    table = tmp_path / "op.md"
    shape = ["--shape", "d=64,a=8,k=16,layers=2,batch=16", "--device", "cpu"]
    assert bench("op", *shape, "--rounds", "1", "--json", str(target), "--markdown", str(table)) == 0
    assert "| operator (cpp) |" in table.read_text()
    found = json.loads(target.read_text())
    assert [row["what"] for row in found["rows"]] == ["operator (cpp)", "matmul+bmm", "least possible"]
    operator, plain, least = found["rows"]
    assert operator["speed_up"] == pytest.approx(plain["forward_backward"] / operator["forward_backward"])
    assert operator["kept_mb"] < plain["kept_mb"] and operator["max_error"] < 1e-5
    assert least["forward_backward"] > 0 and least["kept_mb"] is None


def test_options_are_read_from_the_command_line():
    parser = argparse.ArgumentParser()
    add_options(parser, DecodeOptions)
    given = parser.parse_args(["--dtypes", "bf16", "--rows", "7", "--json", "--batch-size", "4"])
    assert read_options(given, DecodeOptions) == DecodeOptions(dtypes=["bf16"], rows=7, json="-", batch_size=4)
    assert read_options(parser.parse_args([]), DecodeOptions) == DecodeOptions()


def test_tables_fit(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    lines = [{"variant": f"v{number}", **{f"a_measured_thing_{key}": 1.5 for key in range(8)}} for number in range(2)]
    report.publish("a title", lines, ReportOptions(), torch.device("cpu"))
    printed = capsys.readouterr().out
    assert "a measured thing 7" in printed and "…" not in printed and max(map(len, printed.splitlines())) <= 60
    assert (
        report.command(["bench", "x", "--json", "a.json", "--rows", "3", "--markdown", "b.md", "--json"])
        == "hdscale bench x --rows 3"
    )
