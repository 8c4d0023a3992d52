"""The main job, whole: GLUE's eight tasks on real text, killed and resumed, at one, two and four ranks."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from tests.helpers.places import HUB, T5_TOKENIZER, needs_real_text
from tests.helpers.tiny import save_tiny_t5
from tests.helpers.train_jobs import losses

TABLE_1 = {
    "cola": {"matthews"},
    "sst2": {"accuracy"},
    "stsb": {"pearson", "spearman"},
    "mrpc": {"accuracy", "f1"},
    "qqp": {"accuracy", "f1"},
    "mnli": {"accuracy"},
    "qnli": {"accuracy"},
    "rte": {"accuracy"},
}
JOB = "tests.helpers.train_jobs:run"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_t5(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(scope="module")
def settings(base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides that make configs/glue_large.yaml a job of seconds: dropout stays on, accumulation is 2."""
    return [
        f"model.name={base}",
        f"model.tokenizer={T5_TOKENIZER}",
        f"data.root={HUB}",
        f"data.cache={tmp_path_factory.mktemp('cache')}",
        "method.encoder.dim=4",
        "method.decoder.dim=4",
        "method.hypernet.bottleneck=8",
        "train.max_steps=8",
        "train.global_batch_size=16",
        "train.micro_batch_size=4",
        "train.warmup_steps=2",
        "train.learning_rate=1e-2",
        "train.checkpoint_every=3",
        "train.log_every=1",
        "eval.every=4",
        "eval.limit=8",
        "eval.test_limit=8",
        "eval.batch_size=16",
    ]


def in_folder(settings: list[str], folder: Path, *more: str) -> list[str]:
    return [*settings, f"run.dir={folder}", "run.name=run", *more]


@pytest.fixture(scope="module")
def undisturbed(rank_pool, settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list]:
    """A run of two ranks from start to end: its folder and its data order."""
    folder = tmp_path_factory.mktemp("undisturbed")
    results = rank_pool(2).run(JOB, {"overrides": in_folder(settings, folder)})
    assert [result["code"] for result in results] == [0, 0]
    return folder / "run", results[0]["order"]


@needs_real_text
def test_results_have_every_metric_of_table_1(undisturbed) -> None:
    folder, _ = undisturbed
    results = json.loads((folder / "results.json").read_text())
    assert {task: set(metrics) for task, metrics in results["tasks"].items()} == TABLE_1
    scores = [sum(metrics.values()) / len(metrics) for metrics in results["tasks"].values()]
    assert results["average"] == pytest.approx(sum(scores) / 8)
    assert results["steps"] == 8 and results["trainable"] > 0 and results["seconds"] > 0
    assert results["baseline"].keys() == TABLE_1.keys()
    assert results["provenance"]["world_size"] == 2 and results["provenance"]["seed"] == 42
    for task in TABLE_1:
        for split in ("validation", "test"):
            lines = (folder / "predictions" / f"{task}.{split}.jsonl").read_text().splitlines()
            assert len({json.loads(line)["id"] for line in lines}) == 8
    assert (folder / "adapter" / "hdscale_adapter.safetensors").is_file()
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step_00000006", "step_00000008"]
    for name in ("config.yaml", "train.log"):
        assert (folder / name).stat().st_size > 0


@needs_real_text
def test_killed_in_mid_step_and_run_again_gives_the_same_losses(rank_pool, settings, undisturbed, tmp_path) -> None:
    overrides = in_folder(settings, tmp_path)
    rank_pool(2).run(JOB, {"overrides": overrides, "kill_at": 4}, may_die=True)
    assert not (tmp_path / "run" / "results.json").exists()
    rank_pool(2).run(JOB, {"overrides": overrides, "kill_at": 7}, may_die=True)
    results = rank_pool(2).run(JOB, {"overrides": overrides})
    assert results[0]["code"] == 0
    # the last session resumed from step 6: the two steps that the second one had not saved, no more
    assert results[0]["order"] == undisturbed[1][6:]
    assert losses(tmp_path / "run") == losses(undisturbed[0])
    ours, theirs = (json.loads((folder / "results.json").read_text()) for folder in (tmp_path / "run", undisturbed[0]))
    assert ours["tasks"] == theirs["tasks"] and ours["best"] == theirs["best"]


@needs_real_text
@pytest.mark.parametrize("world_size", [1, 4])
def test_data_order_is_the_same_at_any_number_of_ranks(rank_pool, settings, undisturbed, tmp_path, world_size) -> None:
    """The same batches; the losses follow each other closely (dropout masks and sums differ)."""
    overrides = in_folder(settings, tmp_path, "eval.test=false", "eval.every=0", "eval.select=last")
    result = rank_pool(world_size).run(JOB, {"overrides": overrides})[0]
    assert result["code"] == 0
    assert result["order"] == undisturbed[1]
    other, reference = losses(tmp_path / "run"), losses(undisturbed[0])
    assert other.keys() == reference.keys()
    assert all(math.isclose(other[step], reference[step], rel_tol=0.05) for step in reference)


@needs_real_text
def test_sigterm_saves_and_the_next_session_goes_on(rank_pool, settings, undisturbed, tmp_path) -> None:
    """The signal reaches one rank only, in mid-step; both leave with 75 and the rerun equals the undisturbed run."""
    overrides = in_folder(settings, tmp_path)
    first = rank_pool(2).run(JOB, {"overrides": overrides, "signal_at": 4, "signal_rank": 1})
    assert [result["code"] for result in first] == [75, 75]
    assert (tmp_path / "run" / "checkpoints" / "step_00000005").is_dir()
    assert rank_pool(2).run(JOB, {"overrides": overrides})[0]["code"] == 0
    assert losses(tmp_path / "run") == losses(undisturbed[0])


@needs_real_text
def test_torn_newest_checkpoint_is_passed_over(rank_pool, settings, undisturbed, tmp_path) -> None:
    overrides = in_folder(settings, tmp_path)
    rank_pool(2).run(JOB, {"overrides": overrides, "kill_at": 7}, may_die=True)
    torn = tmp_path / "run" / "checkpoints" / "step_00000006" / "trainable.safetensors"
    torn.write_bytes(torn.read_bytes()[:-100])
    assert rank_pool(2).run(JOB, {"overrides": overrides})[0]["code"] == 0
    log = (tmp_path / "run" / "train.log").read_text()
    assert "step_00000006 is incomplete or damaged" in log and "trainable.safetensors" in log
    assert losses(tmp_path / "run") == losses(undisturbed[0])


@needs_real_text
def test_a_changed_configuration_is_refused_and_fresh_moves_the_old_run_aside(rank_pool, settings, tmp_path) -> None:
    quick = in_folder(settings, tmp_path, "train.max_steps=2", "eval.test=false", "eval.every=0", "eval.select=last")
    assert rank_pool(1).run(JOB, {"overrides": quick})[0]["code"] == 0
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    changed = [*quick, "train.learning_rate=1e-3"]
    with pytest.raises(AssertionError, match=r"train\.learning_rate \(0\.01 -> 0\.001\)"):
        rank_pool(1).run(JOB, {"overrides": changed})
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before
    assert rank_pool(1).run(JOB, {"overrides": changed, "fresh": True})[0]["code"] == 0
    assert (tmp_path / "run.old1" / "metrics.jsonl").read_bytes() == before


@needs_real_text
def test_per_task_selection_tests_each_task_with_its_own_best(rank_pool, settings, tmp_path) -> None:
    overrides = in_folder(settings, tmp_path, "eval.select=per_task", "data.tasks=[cola,rte]")
    assert rank_pool(1).run(JOB, {"overrides": overrides})[0]["code"] == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert set(results["best"]) == set(results["tasks"]) == {"cola", "rte"}
    kept = {int(path.name.removeprefix("step_")) for path in (tmp_path / "run" / "best").iterdir()}
    assert kept == {int(best["step"]) for best in results["best"].values()}


@needs_real_text
def test_a_token_budget_found_once_is_the_runs_own(rank_pool, settings, tmp_path) -> None:
    """Found by the first session, kept by the next one, and the same run as with that number written down."""
    quick = ["eval.test=false", "eval.every=0", "eval.select=last", "train.micro_batch_size=null", "train.max_steps=6"]
    overrides = in_folder(settings, tmp_path, *quick, "train.tokens_per_micro_batch=auto")
    rank_pool(2).run(JOB, {"overrides": overrides, "kill_at": 4}, may_die=True)
    settled = json.loads((tmp_path / "run" / "settled.json").read_text())
    assert settled["tokens_per_micro_batch"] >= 512
    assert rank_pool(2).run(JOB, {"overrides": overrides})[0]["code"] == 0
    assert json.loads((tmp_path / "run" / "settled.json").read_text()) == settled
    log = (tmp_path / "run" / "train.log").read_text()
    assert log.count("kept for this run") == 1

    other = tmp_path / "written"
    written = in_folder(settings, other, *quick, f"train.tokens_per_micro_batch={settled['tokens_per_micro_batch']}")
    assert rank_pool(2).run(JOB, {"overrides": written})[0]["code"] == 0
    assert losses(other / "run") == losses(tmp_path / "run")


@needs_real_text
def test_passes_of_a_run_that_names_neither_rows_nor_tokens(rank_pool, settings, tmp_path) -> None:
    """1,024 tokens on a CPU, kept with the run. A run of version 0.1, which kept nothing, goes on with all rows."""
    quick = ["eval.test=false", "eval.every=0", "eval.select=last", "train.global_batch_size=64", "train.max_steps=6"]
    nothing = ["train.micro_batch_size=null", "train.tokens_per_micro_batch=null"]

    def losses_with(name: str, *more: str, kill_at: int | None = None) -> dict[int, float]:
        overrides = [*settings, *quick, *nothing, f"run.dir={tmp_path}", f"run.name={name}", *more]
        arguments = {"overrides": overrides} | ({"kill_at": kill_at} if kill_at else {})
        found = rank_pool(1).run(JOB, arguments, may_die=bool(kill_at))
        assert kill_at or found[0]["code"] == 0
        return losses(tmp_path / name)

    by_tokens = losses_with("tokens", "train.tokens_per_micro_batch=1024")
    by_rows = losses_with("rows", "train.micro_batch_size=64")
    assert by_tokens != by_rows
    assert losses_with("default") == by_tokens
    assert json.loads((tmp_path / "default" / "settled.json").read_text())["tokens_per_micro_batch"] == 1024

    losses_with("old", kill_at=4)
    settled = tmp_path / "old" / "settled.json"
    values = json.loads(settled.read_text())
    del values["tokens_per_micro_batch"]
    settled.write_text(json.dumps(values))
    losses_with("old")
    assert json.loads(settled.read_text())["tokens_per_micro_batch"] is None
