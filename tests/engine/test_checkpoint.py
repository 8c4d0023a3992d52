"""Checkpoints: bit-identical resume, any world size, incomplete ones, full disks, other models."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors import safe_open

from hdscale.engine.checkpoint import find_fault, newest_whole_checkpoint
from tests.helpers.toy import ZERO

STEPS = 8


def run(rank_pool, world_size, folder, **kwargs):
    return rank_pool(world_size).run("tests.helpers.engine_jobs:resume", {"folder": str(folder), **kwargs})


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    "world_size, variant", [(1, "fp32"), (2, "fp32"), (2, "zero1"), (2, "zero2"), (2, "offload"), (2, "zero3_small")]
)
def test_killed_in_mid_step_and_resumed_bit_for_bit(rank_pool, tmp_path, world_size, variant):
    """kill -9 between two micro-batches, with dropout and a schedule: the same losses, weights and moments."""
    config = ZERO.get(variant, {"dtype": "fp32"})
    whole = run(rank_pool, world_size, tmp_path / "undisturbed", until=STEPS, **config)
    killed = rank_pool(world_size).run(
        "tests.helpers.engine_jobs:resume",
        {"folder": str(tmp_path / "killed"), "until": STEPS, "save_at": (2, 4), "kill_in": 5, **config},
        may_die=True,
    )
    assert killed[-1] is None
    resumed = run(rank_pool, world_size, tmp_path / "killed", until=STEPS, **config)
    for before, after in zip(whole, resumed, strict=True):
        assert after["state"]["step"] == 4 and after["state"]["note"] == "after 4" and after["warnings"] == []
        assert list(after["losses"]) == [4, 5, 6, 7]
        assert after["losses"] == {step: before["losses"][step] for step in after["losses"]}
        for kind in ("masters", "moments", "weights"):
            assert same(before[kind], after[kind]), kind


def test_another_number_of_ranks_sees_the_same_data(rank_pool, tmp_path):
    """Saved by 2 ranks under ZeRO-2, resumed by 1 and 4 and under other stages: state bit for bit, then close."""
    config = {"dtype": "bf16"}
    saved = run(rank_pool, 2, tmp_path, until=4, save_at=(4,), **config)[0]
    reference = None
    for world_size, variant in [
        (1, "zero2"),
        (4, "zero2"),
        (1, "zero3"),
        (4, "zero3_small"),
        (2, "zero1"),
        (4, "offload"),
    ]:
        results = run(rank_pool, world_size, tmp_path, until=6, **ZERO[variant])
        masters, moments, weights = results[0]["loaded"]
        assert same(masters, saved["masters"]) and same(moments, saved["moments"]), (world_size, variant)
        assert same(weights, saved["weights"]), (world_size, variant)
        rows = torch.cat([result["batches"][4] for result in results])
        losses = list(results[0]["losses"].values())
        if reference is None:
            reference = rows, losses
        assert torch.equal(rows, reference[0])
        assert losses == pytest.approx(reference[1], rel=0.05)
        warned = "world_size" in " ".join(results[0]["warnings"])
        assert warned == (world_size != 2)


def test_step_0_has_no_optimizer_state(rank_pool, tmp_path):
    run(rank_pool, 2, tmp_path, until=0)
    rank_pool(2).run("tests.helpers.engine_jobs:save_poisoned", {"folder": str(tmp_path)})
    assert sorted(p.name for p in (tmp_path / "step_00000000").iterdir()) == [
        "manifest.json",
        "state.json",
        "trainable.safetensors",
    ]
    resumed = run(rank_pool, 2, tmp_path, until=2, dtype="fp32")
    fresh = run(rank_pool, 2, tmp_path / "none", until=2, dtype="fp32")
    assert resumed[0]["state"]["step"] == 0 and fresh[0]["state"] is None
    assert resumed[0]["losses"] == fresh[0]["losses"]


@pytest.fixture(scope="module")
def saved_run(rank_pool, tmp_path_factory):
    """Checkpoints at steps 1, 2 and 3, of which two are kept; a run that went on to step 5."""
    folder = tmp_path_factory.mktemp("saved")
    return folder, run(rank_pool, 1, folder, until=5, save_at=(1, 2, 3))[0]


@pytest.fixture
def three_checkpoints(saved_run, tmp_path):
    """A copy of those checkpoints, to be spoilt."""
    return shutil.copytree(saved_run[0], tmp_path / "checkpoints"), saved_run[1]


def test_files_of_a_checkpoint(three_checkpoints):
    folder, result = three_checkpoints
    assert sorted(path.name for path in folder.iterdir()) == ["step_00000002", "step_00000003"]
    path = newest_whole_checkpoint(folder)
    assert path.name == "step_00000003" and find_fault(path) is None
    assert json.loads((path / "state.json").read_text())["note"] == "after 3"
    with safe_open(path / "trainable.safetensors", "pt") as file:
        assert set(file.keys()) == set(result["masters"])
        assert file.get_tensor("shared").dtype == torch.float32
    with safe_open(path / "optimizer.safetensors", "pt") as file:
        assert set(file.keys()) == {f"{key}.{name}" for key in ("exp_avg", "exp_avg_sq") for name in result["masters"]}


def cut_short(path):
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize(
    "tear, said",
    [
        (lambda p: cut_short(p / "trainable.safetensors"), "trainable.safetensors has"),
        (lambda p: flip_a_bit(p / "optimizer.safetensors"), "optimizer.safetensors has another checksum"),
        (lambda p: (p / "state.json").unlink(), "state.json is missing"),
        (lambda p: (p / "manifest.json").unlink(), "manifest.json is missing"),
        (lambda p: (p / "manifest.json").write_text('{"files"'), "unreadable"),
    ],
)
def test_torn_newest_checkpoint_falls_back(rank_pool, three_checkpoints, tear, said):
    folder, whole = three_checkpoints
    tear(folder / "step_00000003")
    resumed = run(rank_pool, 1, folder, until=5)[0]
    assert resumed["state"]["step"] == 2
    assert (
        len(resumed["warnings"]) == 1 and said in resumed["warnings"][0] and "step_00000003" in resumed["warnings"][0]
    )
    assert resumed["losses"] == {step: whole["losses"][step] for step in (2, 3, 4)}


def test_no_whole_checkpoint_is_said(tmp_path):
    (tmp_path / "step_00000004").mkdir()
    said = []
    assert newest_whole_checkpoint(tmp_path, said.append) is None
    assert "manifest.json is missing" in said[0] and "starting from the beginning" in said[1]
    assert newest_whole_checkpoint(tmp_path / "absent", said.append) is None and len(said) == 2


def test_same_step_again_and_its_interruption(rank_pool, three_checkpoints):
    """Replaced in two renames: between them the old one is still found; leftovers go at the next save."""
    folder, _ = three_checkpoints
    (folder / "step_00000003").rename(folder / ".replaced_step_00000003")
    (folder / ".writing_step_00000004").mkdir()
    assert newest_whole_checkpoint(folder).name == ".replaced_step_00000003"
    resumed = run(rank_pool, 1, folder, until=4, save_at=(4,))[0]
    assert resumed["state"]["step"] == 3
    assert sorted(path.name for path in folder.iterdir()) == ["step_00000002", "step_00000004"]


def test_full_disk_keeps_the_old_ones(rank_pool, tmp_path):
    results = rank_pool(2).run(
        "tests.helpers.engine_jobs:save_on_full_disk", {"folder": str(tmp_path), "shard_bytes": 2**30}
    )
    for result in results:
        assert "step 3: cannot save" in result["message"] and "older checkpoints are untouched" in result["message"]
    assert results[0]["left"] == ["step_00000001", "step_00000002"]
    assert newest_whole_checkpoint(tmp_path).name == "step_00000003"


def test_large_parts_are_cut_into_shards(rank_pool, tmp_path):
    whole = run(rank_pool, 1, tmp_path / "whole", until=3, save_at=(3,))[0]
    rank_pool(2).run(
        "tests.helpers.engine_jobs:save_on_full_disk", {"folder": str(tmp_path / "cut"), "shard_bytes": 400}
    )
    path = newest_whole_checkpoint(tmp_path / "cut")
    shards = sorted(p.name for p in path.glob("*.safetensors"))
    assert "trainable-00001.safetensors" in shards and len(shards) > 6
    # a shard holds at most 400 bytes of tensors (one larger than that alone), beside its header
    assert max(p.stat().st_size for p in path.glob("*.safetensors")) < 800
    resumed = run(rank_pool, 1, tmp_path / "cut", until=3)[0]
    assert resumed["state"]["step"] == 3 and resumed["loaded"][0].keys() == whole["masters"].keys()


def test_not_finite_is_not_saved(rank_pool, tmp_path):
    for message in rank_pool(2).run("tests.helpers.engine_jobs:save_poisoned", {"folder": str(tmp_path)}):
        assert "step 1: up.bias is not finite" in message
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000000"]


def test_checkpoint_of_another_model_is_refused(rank_pool, three_checkpoints):
    folder, _ = three_checkpoints
    for message in rank_pool(2).run("tests.helpers.engine_jobs:load_other_model", {"folder": str(folder)}):
        assert "up.bias is not in the model" in message
        assert "shared is [7, 7] in the checkpoint and [7, 7, 1] in the model" in message


def test_all_ranks_stop_at_the_same_step(rank_pool, tmp_path):
    results = rank_pool(2).run("tests.helpers.engine_jobs:signalled", {"folder": str(tmp_path)})
    assert [result["step"] for result in results] == [3, 3]
    assert results[1]["reason"] == "SIGUSR2"
    assert newest_whole_checkpoint(tmp_path).name == "step_00000003"


@pytest.mark.parametrize(
    "launcher, watched", [("deepspeed", True), ("torchrun", True), ("slurm", False), ("none", False)]
)
def test_loss_of_the_launcher_is_a_request_to_stop(rank_pool, launcher, watched):
    """`srun`'s ranks belong to a daemon, and a lone process may outlive the shell that started it."""
    results = rank_pool(1).run("tests.helpers.engine_jobs:orphaned", {"launcher": launcher})
    assert results == [{"before": False, "after": watched}]
