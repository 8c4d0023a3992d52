"""What the stages of `hdscale doctor --gpu` are made of: processes, training runs, what compute-sanitizer says."""

import json
import os
from pathlib import Path

import pytest
import torch

from hdscale.bench.engine_step import glue_batch, measure_step, random_engine, step_config
from hdscale.config import all_keys
from hdscale.doctor.gpu import deterministic, resume, runs, zero
from hdscale.doctor.gpu.lines import FAILED, NOT_POSSIBLE, Lines, NotPossible, Wrong, read_lines
from hdscale.doctor.gpu.processes import own_environment, reason
from hdscale.doctor.gpu.runs import DETERMINISTIC, TrainingRun, equal
from hdscale.doctor.gpu.sanitizer import judge
from hdscale.engine.deepspeed_config import resolve_deepspeed_config
from hdscale.engine.settings import TrainSettings
from tests.helpers.places import ROOT


def run_of(folder: Path, losses: list[float], weights: bytes = b"w", norm: float = 1.0) -> TrainingRun:
    """A finished run as it lies on the disk, with the line of a kill in the middle of a write."""
    (folder / "adapter").mkdir(parents=True)
    (folder / "adapter" / "hdscale_adapter.safetensors").write_bytes(weights)
    lines = [{"kind": "train", "step": step, "loss": loss, "grad_norm": norm} for step, loss in enumerate(losses, 1)]
    text = "".join(json.dumps(line) + "\n" for line in [{"kind": "evaluation"}, *lines])
    (folder / "metrics.jsonl").write_text(text + '{"kind": "tra')
    return TrainingRun(folder, [], folder / "log")


def test_equal_runs_have_the_same_bits(tmp_path):
    one = run_of(tmp_path / "one", [2.0, 1.5])
    assert one.losses() == {1: (2.0, 1.0), 2: (1.5, 1.0)}
    assert equal(one, run_of(tmp_path / "same", [2.0, 1.5])) is None
    assert "from step 2 of 2 on, losses by up to 1.0e-07" in equal(one, run_of(tmp_path / "loss", [2.0, 1.5 + 1e-7]))
    assert "from step 1 of 2" in equal(one, run_of(tmp_path / "norm", [2.0, 1.5], norm=1.1))
    assert "trained weights are not" in equal(one, run_of(tmp_path / "weights", [2.0, 1.5], b"v"))
    with pytest.raises(Wrong, match=r"\[1, 2\] against \[1\]"):
        equal(one, run_of(tmp_path / "short", [2.0]))
    with pytest.raises(Wrong):
        equal(run_of(tmp_path / "none", []), run_of(tmp_path / "nothing", []))


def test_the_rest_of_a_report_survives_a_kill_in_mid_line(tmp_path):
    lines = Lines(tmp_path / "stage.jsonl")
    with lines.check("one") as found:
        found.say("seen", number=1)
    with lines.check("memory") as found:
        found.say("so far", number=2)
        raise type("OutOfMemoryError", (RuntimeError,), {})("CUDA out of memory")
    with lines.path.open("a") as stream:
        stream.write('{"name": "three", "state": "begun"}\n{"name": "thr')
    found, begun = read_lines(lines.path)
    assert begun == "three"
    assert [(line.name, line.values.get("number")) for line in found] == [("one", 1), ("memory", 2)]
    assert found[1].state == NOT_POSSIBLE and "CUDA out of memory" in found[1].detail


def test_what_is_started_is_no_rank_of_the_job_around_it(monkeypatch):
    for name in ("SLURM_PROCID", "RANK", "MASTER_ADDR", "TORCHELASTIC_RUN_ID", "HDSCALE_ERROR_FILE"):
        monkeypatch.setenv(name, "1")
    environment = own_environment()
    assert not {"SLURM_PROCID", "RANK", "MASTER_ADDR", "TORCHELASTIC_RUN_ID", "HDSCALE_ERROR_FILE"} & set(environment)
    assert environment["HF_HUB_OFFLINE"] == "1" and environment["PATH"] == os.environ["PATH"]
    assert str(ROOT) in environment["PYTHONPATH"].split(os.pathsep)


@pytest.mark.parametrize(
    "text, telling",
    [
        ("hdscale: error: no such key\nsrun: ended\n", "hdscale: error: no such key"),
        (
            "[rank0]: Traceback\n[rank0]: RuntimeError: bad 'x'\n[rank0]: XPU: registered at 1\n",
            "RuntimeError: bad 'x'",
        ),
        ("Segmentation fault\n", "Segmentation fault"),
        ("", "no output"),
    ],
)
def test_the_telling_line_of_a_failed_process(text, telling, tmp_path):
    (tmp_path / "log").write_text(text)
    assert reason(tmp_path / "log") == telling


CLEAN = "========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors\n"
INVALID = """========= COMPUTE-SANITIZER
========= Invalid __global__ read of size 2 bytes
=========     at contract_kernel
========= ERROR SUMMARY: 3 errors
"""


def test_what_the_sanitizer_says(tmp_path):
    log = tmp_path / "log"
    log.write_text(CLEAN)
    assert judge(0, log) == "0 errors"
    log.write_text("========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n")
    assert judge(0, log).startswith("0 hazards")
    log.write_text(INVALID)
    for code in (97, 0):
        with pytest.raises(Wrong, match="3 errors: Invalid __global__ read of size 2 bytes"):
            judge(code, log)
    log.write_text("Error: the debugger interface cannot be used\n")
    with pytest.raises(NotPossible, match="debugger interface"):
        judge(255, log)
    log.write_text("all is well\n")  # of a process that the tool did not watch
    with pytest.raises(NotPossible):
        judge(0, log)


@pytest.mark.parametrize("kind", runs.KINDS)
def test_every_kind_of_zero_is_what_its_name_says(kind, tmp_path):
    path = tmp_path / "zero.json"
    path.write_text(json.dumps(runs.deepspeed_config(runs.KINDS[kind], "bf16")))
    zero = resolve_deepspeed_config(str(path), TrainSettings(global_batch_size=8), 1)["zero_optimization"]
    assert f"ZeRO-{zero['stage']}{' with offload' if 'offload_optimizer' in zero else ''}" == kind


def step_of_a_tiny_model(ranks):
    config = step_config("tiny-1", "train.dtype=fp32")
    with random_engine(config, ranks) as engine:
        batches = glue_batch("tiny-1", 8, 256)
        before = engine.step
        return measure_step(engine, batches, steps=2, warm_up=1) | {"steps": engine.step - before, "of": len(batches)}


def test_a_measured_step(rank_pool):
    (found,) = rank_pool(1).run("tests.doctor.test_checks:step_of_a_tiny_model")
    # one to warm up, two timed, three for the host's time; the profiler sees no kernels on a CPU
    assert found["steps"] == 6 and found["launches"] is None and found["of"] > 1
    assert 0 < found["host_seconds"] and 0 < found["seconds"] and found["loss"] > 0


@pytest.mark.slow
def test_kill_and_resume(tmp_path, monkeypatch):
    """The stage on the CPU, with real DeepSpeed."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    resume.examine(Lines(tmp_path / "lines"), tmp_path)
    found, begun = read_lines(tmp_path / "lines")
    assert begun is None and [line.state for line in found] == ["passed", "passed"], found
    assert resume.KILLED_AFTER <= found[0].values["killed"] < resume.STEPS
    assert "equal to the bit" in found[1].detail


@pytest.mark.slow
def test_every_kind_of_zero_on_two_ranks(tmp_path, monkeypatch):
    """The stage on the CPU, with real DeepSpeed and two ranks for each kind."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    zero.examine(Lines(tmp_path / "lines"), tmp_path)
    found, _ = read_lines(tmp_path / "lines")
    assert [(line.name, line.state) for line in found] == [(f"{kind}, 2 ranks", "passed") for kind in runs.KINDS], found
    assert all(len(line.values["losses"]) == zero.STEPS for line in found)


@pytest.mark.slow
def test_two_runs_bit_for_bit(tmp_path, monkeypatch):
    """The stage on the CPU, where the same steps have the same bits anyway; so they are equal with and without."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(deterministic, "SMALL", runs.QUICK)
    deterministic.examine(Lines(tmp_path / "lines"), tmp_path)
    found, _ = read_lines(tmp_path / "lines")
    assert [line.state for line in found] == [
        "passed" if DETERMINISTIC in all_keys() else "not possible here",
        "passed",
    ]
    assert found[1].values["equal"]


def test_a_run_that_fails_is_a_failure_with_its_reason(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    lines = Lines(tmp_path / "lines")
    with lines.check("a run"):
        runs.train(tmp_path, "bad", 1, "train.max_stepps=3").finish()
    (line,), _ = read_lines(tmp_path / "lines")
    assert line.state == FAILED and "exit code 2" in line.detail and "train.max_steps" in line.detail
    assert any("train.max_stepps" in text for text in line.values["output"])
