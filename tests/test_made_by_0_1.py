"""Run folders and exports of 0.1 still work: resumed, evaluated, loaded (tests/assets/made_by_0.1/README.md)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml

import hdscale
from hdscale.commands.cli import main
from hdscale.load import Choice
from hdscale.runs.machine import processor_name
from tests.helpers.places import ROOT, TESTS
from tests.helpers.train_jobs import losses

MADE = TESTS / "assets" / "made_by_0.1"
JOB = "tests.helpers.train_jobs:run"
STOPPED, STEPS = 100, 120


@pytest.fixture
def interrupted(tmp_path: Path) -> Path:
    """A copy of the run that was asked to stop."""
    shutil.copytree(MADE / "interrupted", tmp_path / "runs" / "interrupted")
    return tmp_path / "runs" / "interrupted"


def same_computer() -> bool:
    """Whether the bits of 0.1's numbers can be expected here."""
    here = {
        "torch": torch.__version__,
        "cpu": processor_name(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": 1,
        "backend": "cpp",
    }
    return here == json.loads((MADE / "computed_by.json").read_text())


def check_predictions(folder: Path) -> None:
    """The finished run's test predictions, of which 0.1 took the first 16 rows, are among those in a folder."""
    for path in (MADE / "finished" / "predictions").glob("*.test.jsonl"):
        ours, theirs = (
            {record["id"]: record for record in map(json.loads, file.read_text().splitlines())}
            for file in (folder / path.name, path)
        )
        assert theirs and {row: ours[row] for row in theirs} == theirs, path.name


def command(run: Path, *more: str) -> dict:
    """The arguments of the job that trains with the configuration of a run's folder."""
    places = [f"run.dir={run.parent}", f"data.cache={run.parent}/cache", f"deepspeed={ROOT}/ds_configs/zero2_fp32.json"]
    return {"config": str(MADE / "interrupted" / "config.yaml"), "overrides": [*places, *more]}


def test_an_interrupted_run_is_resumed_to_its_end(rank_pool, interrupted) -> None:
    """From the step at which it stopped, with the losses of the run that was not interrupted.

    0.2 draws other dropout masks on a CPU, which change the losses by a few percent: those of 0.1 are used here.
    """
    result = rank_pool(1).run(JOB, command(interrupted) | {"dropout_of_torch": True})[0]
    assert result["code"] == 0
    assert len(result["order"]) == STEPS - STOPPED
    found, wanted = losses(interrupted), losses(MADE / "finished")
    assert found.keys() == wanted.keys()
    ours, theirs = (json.loads((folder / "results.json").read_text()) for folder in (interrupted, MADE / "finished"))
    assert ours["steps"] == STEPS and ours["tasks"].keys() == theirs["tasks"].keys()
    assert ours["samples"] == theirs["samples"] and ours["tokens"] == theirs["tokens"]
    assert ours["trainable"] == theirs["trainable"]
    # 0.2 has another T5: the last bits differ, and their differences grow with the steps
    tolerance = 1e-4 if same_computer() else 0.05
    assert list(found.values()) == pytest.approx(list(wanted.values()), rel=tolerance)


def test_a_run_that_is_done_is_not_trained_again(rank_pool, tmp_path) -> None:
    shutil.copytree(MADE / "finished", tmp_path / "finished")
    result = rank_pool(1).run(JOB, command(tmp_path / "finished", "run.name=finished"))[0]
    assert result == {"code": 0, "order": []}


def test_a_key_that_the_run_does_not_have_is_at_its_default(rank_pool, interrupted) -> None:
    """As every key is that came after 0.1. Another value of it is another run."""
    file = interrupted / "config.yaml"
    written = yaml.safe_load(file.read_text())
    assert written["train"].pop("weight_decay") == hdscale.Config().train.weight_decay
    file.write_text(yaml.safe_dump(written))
    with pytest.raises(AssertionError, match=r"another configuration: train\.weight_decay \(0\.0\d* -> 0\.5\)"):
        rank_pool(1).run(JOB, command(interrupted, "train.weight_decay=0.5"))
    quick = command(interrupted)
    assert rank_pool(1).run(JOB, {**quick, "signal_at": STOPPED})[0]["code"] == 75
    assert (interrupted / "checkpoints" / f"step_{STOPPED + 1:08d}").is_dir()


def test_a_key_that_differs_is_refused(rank_pool, interrupted) -> None:
    with pytest.raises(AssertionError, match=r"train\.learning_rate \(0\.01 -> 0\.001\)"):
        rank_pool(1).run(JOB, command(interrupted, "train.learning_rate=1e-3"))
    assert losses(interrupted) == losses(MADE / "interrupted")


def test_a_finished_run_is_evaluated(tmp_path, monkeypatch) -> None:
    shutil.copytree(MADE / "finished", tmp_path / "runs" / "finished")
    monkeypatch.chdir(tmp_path)
    assert main(["evaluate", "--run", "runs/finished"]) == 0
    found = json.loads((tmp_path / "runs" / "finished" / "evaluation" / "results.test.json").read_text())
    wanted = json.loads((MADE / "finished" / "results.json").read_text())
    assert found["tasks"].keys() == wanted["tasks"].keys()
    # the run's export has the weights of the best step, which its test was made with
    if same_computer():
        check_predictions(tmp_path / "runs" / "finished" / "evaluation")


def test_run_and_export_load_as_the_same_model() -> None:
    export = MADE / "finished" / "adapter"
    choice = Choice(run=str(MADE / "finished"), device="cpu")
    run, direct = choice.load(choice.config()).model, hdscale.from_pretrained(export).eval()
    loaded = Choice(model=str(export), device="cpu", dtype="fp32")
    assert loaded.kind() == "export"
    other = loaded.load(loaded.config()).model
    assert run.trainable_names() == direct.trainable_names() == other.trainable_names()
    for name in run.trainable_names():
        value = run.get_parameter(name)
        assert torch.equal(value, direct.get_parameter(name)) and torch.equal(value, other.get_parameter(name)), name
