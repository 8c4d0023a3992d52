"""The self-check finds gradients that DeepSpeed lost or mixed, and nothing else."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hdscale.config import load_config
from hdscale.engine.checks import PlainGradient, WrongGradient, compare_gradients, missing_memory
from tests.helpers.adapted import METHODS, nested
from tests.helpers.check_jobs import toy_batch
from tests.helpers.places import ROOT
from tests.helpers.tiny import save_tiny_t5
from tests.helpers.train_jobs import losses

STAGES = {
    "1": "ds_configs/zero1_bf16.json",
    "2": "ds_configs/zero2_bf16.json",
    "offload": "ds_configs/zero2_offload_bf16.json",
    "3": "ds_configs/zero3_bf16.json",
    # every weight is partitioned: ZeRO-3 keeps small ones whole
    "3, all partitioned": "tests/helpers/zero3_no_persistent_bf16.json",
}
DTYPES = ("bf16", "fp32")
SIDE = {"dim": 5}
METHOD = {"name": "hyperdecoder", "encoder": SIDE, "decoder": SIDE, "hypernet": {"bottleneck": 6}}

QUICK_METHODS = ("hyperdecoder", "full_finetuning")


def case(stage: str, dtype: str, fault: str, folder: Path) -> dict[str, str]:
    """The arguments of a toy's first step."""
    path = ROOT / STAGES[stage]
    if dtype == "fp32":
        values = json.loads(path.read_text())
        values["bf16"] = {"enabled": False}
        path = folder / f"{Path(STAGES[stage]).stem}_fp32.json"
        path.write_text(json.dumps(values))
    return {"deepspeed": str(path), "dtype": dtype, "fault": fault}


@pytest.mark.parametrize("dtype", DTYPES)
def test_right_gradients_pass_on_three_ranks(rank_pool, tmp_path, dtype):
    """With dropout, at each stage. Fails if the check draws other dropout masks, or scales losses in another way."""
    arguments = {"cases": [case(stage, dtype, "none", tmp_path) for stage in STAGES]}
    found = rank_pool(3).run("tests.helpers.check_jobs:toys", arguments)
    for stage, line in zip(STAGES, found[0], strict=True):
        assert line.startswith("self-check: the gradient of step 1 is that of plain backward passes"), (stage, line)
        difference = float(re.search(r"largest difference (\S+) of", line)[1])
        # ZeRO-2 divides bf16 gradients by the three ranks before it sums them
        rounded = dtype == "bf16" and stage in ("2", "offload")
        assert difference < (1e-2 if rounded else 1e-6), (stage, dtype, line)


@pytest.mark.parametrize("fault, named", [("micro-batch", None), ("rank", None), ("tensor", "shared")])
def test_planted_faults_are_found(rank_pool, tmp_path, fault, named):
    """At each stage, on both ranks, by name. Fails without the comparison, or if only the norm is compared."""
    cases = [(stage, dtype) for stage in STAGES for dtype in DTYPES]
    arguments = {"cases": [case(*one, fault, tmp_path) for one in cases]}
    found = rank_pool(2).run("tests.helpers.check_jobs:toys", arguments)
    assert found[0] == found[1]
    for one, line in zip(cases, found[0], strict=True):
        tensor = re.match(
            r"wrong: self-check: the gradient that DeepSpeed formed in step 1 is wrong: (\S+) differs", line
        )
        assert tensor, (one, line)
        assert (
            tensor[1] == named if named else tensor[1] in ("shared", "down.weight", "down.bias", "up.weight", "up.bias")
        )


def test_mixed_reduction_buckets_are_found(rank_pool, tmp_path):
    """Gradients of unlike lengths in DeepSpeed's own order are added to one another: the fault that hdscale had."""
    base = save_tiny_t5(tmp_path / "base", vocabulary=64, d_kv=40)
    arguments = {"base": str(base), "method": METHOD, "orders": [True, False]}
    right, mixed = rank_pool(2).run("tests.helpers.check_jobs:mixed_buckets", arguments)[0]
    assert right.startswith("self-check: the gradient of step 1 is")
    assert re.match(r"wrong: .* is wrong: method\.\S+ differs", mixed), mixed


@pytest.mark.parametrize(
    "name",
    [name if name in QUICK_METHODS else pytest.param(name, marks=pytest.mark.slow) for name in METHODS],
)
def test_right_gradients_of_every_method_pass(rank_pool, tmp_path, name):
    """On three ranks in bf16, with dropout and rows of unlike lengths, under ZeRO-2 and 3.

    Full fine-tuning trains within the layers that ZeRO-3 gathers whole: fails if plain passes run DeepSpeed's hooks.
    """
    base = save_tiny_t5(tmp_path / "base", vocabulary=64)
    method, options = METHODS[name]
    config = {"name": method, **nested({key.replace("__", "."): value for key, value in options.items()})}
    cases = [{"deepspeed": STAGES[stage], "dtype": "bf16"} for stage in ("2", "3, all partitioned")]
    arguments = {"base": str(base), "configs": [config], "cases": cases}
    for line in rank_pool(3).run("tests.helpers.check_jobs:methods", arguments)[0]:
        assert line.startswith("self-check: the gradient of step 1 is that of plain"), line


def test_small_gradients_count(rank_pool, tmp_path):
    """A doubled tensor is named in bf16 although it has hardly any of the gradient, as most have in the first step.

    Fails if its norm counts as a thousandth of the whole gradient's.
    """
    base = save_tiny_t5(tmp_path / "base", vocabulary=64)
    names = ["method.encoder.adapters.0.down.bias", "method.decoder.hypernetwork.adapter_heads.down_bias_bias"]
    arguments = {"base": str(base), "method": METHOD, "case": {"deepspeed": STAGES["2"], "dtype": "bf16"}}
    found = rank_pool(2).run("tests.helpers.check_jobs:small_gradients", arguments | {"names": names})[0]
    for name, (share, line) in found.items():
        assert 5e-7 < share < 5e-5, (name, share)
        assert f"is wrong: {name} differs" in line, line


def stand_in(moments: dict[str, torch.Tensor], norm: float, dtype: str = "fp32") -> Any:
    """What the comparison asks an engine for."""
    ranks = SimpleNamespace(is_main=True, world_size=1, broadcast_object=lambda value: value)
    return SimpleNamespace(
        train=SimpleNamespace(gradient_clipping=0.0, dtype=dtype), grad_norm=norm, first_beta=0.9, ranks=ranks,
        stage=2, parameters=dict.fromkeys(moments),
        optimizer_tensors=lambda: ((f"exp_avg.{name}", 0.1 * value) for name, value in moments.items()),
    )  # fmt: skip


def test_not_a_number_is_no_small_difference():
    """Wherever it stands. Fails if the largest difference is looked for among numbers that are none."""
    one, none = torch.ones(1), torch.full((1,), torch.nan)
    for tensors in ({"a": one, "b": none}, {"a": none, "b": one}):
        with pytest.raises(WrongGradient, match=f"{'b' if tensors['a'] is one else 'a'} differs"):
            compare_gradients(stand_in({"a": one, "b": one}, 2**0.5), PlainGradient(0.0, tensors))


def test_gradients_of_zero_are_counted():
    """They agree whatever DeepSpeed did with them, and the line says so."""
    tensors = {"a": torch.ones(1), "b": torch.zeros(3)}
    line = compare_gradients(stand_in(tensors, 1.0), PlainGradient(0.0, tensors))
    assert "2 tensors (1 with a gradient of zero or too small to tell)" in line


def test_a_model_too_large_for_one_gpu_is_not_checked(monkeypatch):
    """Under ZeRO-3: the log says how much memory is missing. Fails if frozen weights are not counted."""
    frozen, trained = (torch.nn.Parameter(torch.zeros(0)) for _ in range(2))
    frozen.ds_numel, trained.ds_numel = 10**9, 10**6
    ranks = SimpleNamespace(device=torch.device("cuda", 0), all_true=bool)
    engine = SimpleNamespace(
        ranks=ranks, stage=3, parameters={"trained": trained},
        module=SimpleNamespace(parameters=lambda: [frozen, trained]),
    )  # fmt: skip
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 0)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 0)
    for free, told in ((2 * 10**9, "would need 4.0 GB more on each GPU"), (5 * 10**9, None)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _, free=free: (free, 80 * 10**9))
        assert missing_memory(engine) == told
    skipped = compare_gradients(stand_in({}, 0.0), PlainGradient(0.0, skipped="would need 4.0 GB more on each GPU"))
    assert skipped == "self-check skipped: would need 4.0 GB more on each GPU"


def test_a_wrong_gradient_ends_the_run_on_every_rank(rank_pool, tmp_path):
    """With exit code 1, after one step, without a checkpoint; rank 0 prints one line that names the tensor."""
    overrides = ["train.max_steps=3", "eval.every=0", "eval.select=last", "eval.test=false", f"run.dir={tmp_path}"]
    overrides += [f"data.cache={tmp_path}/cache", "train.checkpoint_every=1"]
    arguments = {"config": str(ROOT / "configs/quickstart.yaml"), "overrides": overrides}
    first, second = rank_pool(2).run("tests.helpers.check_jobs:stopped_run", arguments)
    assert (first["code"], second["code"]) == (1, 1) and first["steps"] == second["steps"] == [1]
    assert re.fullmatch(r"hdscale: self-check: .* is wrong: method\.\S+ differs by .*\n", first["printed"])
    assert second["printed"] == ""
    assert not list(tmp_path.glob("*/checkpoints/step_*"))


def test_a_trainable_without_a_gradient_on_one_rank(rank_pool, tmp_path):
    """Its gradient is the other rank's, and no other tensor's changes: they are those of both ranks together.

    Without zeros in its place the ranks would reduce buckets of unlike sizes.
    """
    cases = [(stage, dtype) for stage in STAGES for dtype in DTYPES]
    arguments = {"cases": [case(*one, "", tmp_path) for one in cases]}
    for one in arguments["cases"]:
        del one["fault"]
    found = rank_pool(2).run("tests.helpers.check_jobs:one_sided_gradients", arguments)[0]
    targets = [sum(int((toy_batch(rank, index)["labels"] != -100).sum()) for index in range(2)) for rank in range(2)]
    expected = 2 * torch.ones(7) * targets[1] / sum(targets)
    for (stage, dtype), gradients in zip(cases, found, strict=True):
        tolerance = 1e-5 if dtype == "fp32" else 2e-2
        assert torch.allclose(gradients["extra"], expected, rtol=tolerance), stage
        for name, tensor in gradients.items():
            assert (tensor - found[1][name]).norm() <= 2 * tolerance * found[1][name].norm(), (stage, dtype, name)


def test_losses_do_not_depend_on_the_check(rank_pool, tmp_path):
    """To the bit, with dropout; it runs once, in the first step of a run, and says so in the log."""
    quick = ["train.max_steps=3", "train.log_every=1", "train.checkpoint_every=2", "eval.every=0", "eval.select=last"]
    quick += ["eval.test=false", "model.dropout=0.1", f"data.cache={tmp_path}/cache", f"run.dir={tmp_path}"]
    for name, value in (("with", "true"), ("without", "false")):
        overrides = [*quick, f"run.name={name}", f"train.self_check={value}"]
        arguments = {"config": str(ROOT / "configs/quickstart.yaml"), "overrides": overrides}
        rank_pool(2).run("tests.helpers.train_jobs:run", arguments | {"kill_at": 2}, may_die=True)
        assert [one["code"] for one in rank_pool(2).run("tests.helpers.train_jobs:run", arguments)] == [0, 0]
        log = (tmp_path / name / "train.log").read_text()
        assert log.count("self-check: the gradient of step 1 is that of plain") == (value == "true")
    assert losses(tmp_path / "with") == losses(tmp_path / "without")


def test_it_is_on_by_default():
    assert load_config(None, []).train.self_check
