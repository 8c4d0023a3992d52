"""Compiled steps of the layers: the same losses and gradients, few graphs, and evaluation left alone."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest
import torch

from hdscale.bases.steps import Steps, activation, add_norm
from hdscale.config import load_config
from hdscale.data.batches import Row, collate
from hdscale.engine import tuning
from hdscale.engine.settings import TrainSettings
from hdscale.engine.tuning import compile_cost
from hdscale.errors import UserError
from hdscale.modeling import HyperdecoderConfig, build_model
from hdscale.resolve import resolve
from tests.helpers.places import HUB, T5_TOKENIZER, needs_real_text
from tests.helpers.tiny import save_tiny_t5
from tests.helpers.train_jobs import losses

SHAPES = [(4, 9, 3), (4, 17, 2), (3, 30, 4)]
ODD_SHAPES = [(1, 12, 2), (5, 6, 1)]
"""One row, one token: sizes of 1 are graphs of their own."""


def batch(rows: int, source: int, target: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows * source)
    ids = torch.randint(2, 60, (rows, source + target), generator=generator).tolist()
    # the first row is the longest
    return collate([Row(one[: source - index], one[source:], 0, str(index), "t") for index, one in enumerate(ids)], 0)


def loss_and_gradients(model, tensors) -> list[torch.Tensor]:
    torch.manual_seed(0)
    loss = model(**tensors).loss_sum
    return [loss.detach(), *torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])]


@pytest.mark.slow
def test_compiled_steps_compute_the_same(tmp_path):
    base = save_tiny_t5(tmp_path / "base", vocabulary=64)
    sizes = {"encoder": {"dim": 4}, "decoder": {"dim": 4, "adapter": "generated"}, "hypernet": {"bottleneck": 8}}
    config = HyperdecoderConfig.from_dict(
        {"model": {"name": str(base), "dropout": 0.0}, "method": {"name": "hyperdecoder", **sizes}, "tasks": []}
    )
    model = build_model(config).train()
    batches = [batch(*shape) for shape in SHAPES + ODD_SHAPES]
    plain = [loss_and_gradients(model, one) for one in batches]
    source = {name: batches[0][name] for name in ("input_ids", "attention_mask")}
    decoded = model.eval().generate(**source, max_new_tokens=5)
    torch._dynamo.utils.counters.clear()
    model.base.compile_steps()
    model.train()
    count = torch._dynamo.utils.counters["stats"]
    for number, (expected, one) in enumerate(zip(plain, batches, strict=True)):
        for found, wanted in zip(loss_and_gradients(model, one), expected, strict=True):
            assert (found - wanted).norm() <= 1e-5 * wanted.norm()
        if number == len(SHAPES) - 1:
            assert 0 < count["unique_graphs"] <= 12
    graphs = count["unique_graphs"]
    # a new pair of lengths is not a new graph, and decoding is none
    loss_and_gradients(model, batch(6, 23, 5))
    assert torch.equal(model.eval().generate(**source, max_new_tokens=5), decoded)
    assert count["unique_graphs"] == graphs
    model.base.compile_steps(on=False)
    plain_steps = Steps(add_norm, activation("gelu_new", True))
    assert all(layer.steps == plain_steps for layer in [*model.base.encoder.block, *model.base.decoder.block])


@pytest.mark.slow
@needs_real_text
def test_a_compiled_run(rank_pool, tmp_path):
    """Two ranks, compiled and not: the losses follow each other, and the log says what the compiler cost."""
    overrides = [
        f"model.name={save_tiny_t5(tmp_path / 'base')}", f"model.tokenizer={T5_TOKENIZER}", f"data.root={HUB}",
        f"data.cache={tmp_path}/cache", "method.encoder.dim=4", "method.decoder.dim=4", "method.hypernet.bottleneck=8",
        "train.max_steps=4", "train.global_batch_size=16", "train.tokens_per_micro_batch=400", "train.log_every=1",
        "eval.every=0", "eval.select=last", "eval.test=false", "model.dropout=0.0", f"run.dir={tmp_path}",
    ]  # fmt: skip
    for name, choice in (("plain", "auto"), ("compiled", "on")):
        job = {"overrides": [*overrides, f"run.name={name}", f"train.compile={choice}"]}
        assert rank_pool(2).run("tests.helpers.train_jobs:run", job, timeout=400)[0]["code"] == 0
    plain, compiled = losses(tmp_path / "plain"), losses(tmp_path / "compiled")
    assert all(math.isclose(plain[step], compiled[step], rel_tol=1e-3) for step in plain)
    assert "s to compile; a forward and backward pass takes" in (tmp_path / "compiled" / "train.log").read_text()
    assert json.loads((tmp_path / "compiled" / "settled.json").read_text())["compile"] == "on"
    assert "compile" not in json.loads((tmp_path / "plain" / "settled.json").read_text())


@pytest.mark.parametrize(
    "choice, compiled, kept, deterministic, said",
    [
        ("auto", 0.3, None, False, ["on"]), ("auto", 0.5, None, False, ["on", "off"]), ("on", 0.5, None, False, ["on"]),
        ("auto", 0.5, "on", False, ["on"]), ("auto", 0.3, "off", False, []), ("auto", 0.3, None, True, []),
    ],
)  # fmt: skip
def test_auto_compiles_what_is_faster(monkeypatch, choice, compiled, kept, deterministic, said):
    """On a GPU; a resumed run does what its first session did. Fails if a slower compiled pass is kept."""
    found: list[str] = []
    times = iter([0.4, compiled])
    monkeypatch.setattr(tuning, "timed", lambda *_: next(times))
    monkeypatch.setattr(tuning, "seconds_of_passes", lambda *_: 1.0)
    base = SimpleNamespace(compile_steps=lambda on=True: found.append("on" if on else "off"))
    ranks = SimpleNamespace(device=torch.device("cuda"), gather_objects=lambda value: [value])
    train = TrainSettings(deterministic=deterministic)
    engine = SimpleNamespace(ranks=ranks, stage=2, train=train, module=SimpleNamespace(get_submodule=lambda _: base))
    values = {} if kept is None else {"compile": kept}
    settled = SimpleNamespace(values=values, once=lambda key, find: values.setdefault(key, find()))
    log = SimpleNamespace(info=lambda _: None, warning=lambda _: None)
    tuning.compile_for_training(engine, choice, [None], settled, log)  # type: ignore[arg-type]
    assert found == said
    assert values.get("compile", "off") == ("off" if not said else said[-1])


def test_the_log_says_when_compiling_pays_off():
    assert "pays off from step 25 on" in compile_cost(plain=0.5, compiled=0.4, first=10.7, passes=4)
    assert "does not pay off" in compile_cost(plain=0.4, compiled=0.5, first=10.0, passes=4)


def test_what_cannot_be_compiled(tmp_path):
    with pytest.raises(UserError, match="train.compile=maybe: must be one of off, on, auto"):
        load_config(None, ["train.compile=maybe"])
    zero3 = load_config(None, ["train.compile=on", "deepspeed=ds_configs/zero3_bf16.json"])
    with pytest.raises(UserError, match="train.compile=on works with ZeRO stages 1 and 2"):
        resolve(zero3, 1)


@pytest.mark.parametrize("written, meant", [("on", "on"), ("off", "off"), ("auto", "auto"), ("true", "on")])
def test_yaml_reads_on_and_off_as_truth_values(tmp_path, written, meant):
    (tmp_path / "run.yaml").write_text(f"train: {{compile: {written}}}\n")
    assert load_config(tmp_path / "run.yaml").train.compile == meant
    assert load_config(None, [f"train.compile={written}"]).train.compile == meant
