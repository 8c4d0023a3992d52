"""The self-check finds gradients that DeepSpeed lost or mixed, and nothing else."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from hdscale.config import load_config
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
    """With dropout, at each stage. Fails if the check draws other dropout masks."""
    arguments = {"cases": [case(stage, dtype, "none", tmp_path) for stage in STAGES]}
    found = rank_pool(3).run("tests.helpers.check_jobs:toys", arguments)
    for stage, line in zip(STAGES, found[0], strict=True):
        assert line.startswith("self-check: the gradient of step 1 is that of plain backward passes"), (stage, line)
        difference = float(re.search(r"largest difference (\S+) of", line)[1])
        assert difference < (1e-6 if dtype == "fp32" else 3e-2), (stage, dtype, line)


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
    assert "is wrong: " in mixed


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
