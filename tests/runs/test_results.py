"""`results.json`: what it says of each score, files of 0.1, and the table."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from hdscale.errors import UserError
from hdscale.runs.results import RESULTS_FORMAT, UNRECORDED, print_results, read_run, scores_of
from hdscale.runs.scores import Score, metrics_of
from tests.helpers.places import TESTS

SCORES = [
    Score("rte", "validation", {"accuracy": 80.0}, 20, "best", 100, 139, "best/step_00000020"),
    Score("rte", "test", {"accuracy": 70.0}, 20, "best", 138, 138, "best/step_00000020"),
    Score("mine", "validation", {"accuracy": 60.0}, 20, "best", 50, 50, "best/step_00000020"),
]


def results(scores: list[Score], **more: Any) -> dict[str, Any]:
    test = metrics_of(scores, "test")
    return {
        "format": RESULTS_FORMAT, "name": "r", "steps": 40, "scores": [dataclasses.asdict(score) for score in scores],
        "tasks": test, "validation": metrics_of(scores, "validation"), "average": 70.0 if test else None,
        "validation_average": 70.0, "baseline": {"rte": {"accuracy": 50.0}}, "baseline_average": 50.0,
        "trainable_percent": 2.0, "config": {"run": {"seed": 3}, "eval": {"test": bool(test)}}, **more,
    }  # fmt: skip


def write(folder: Path, tree: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "results.json").write_text(json.dumps(tree))
    return folder


def test_scores_go_there_and_back(tmp_path: Path) -> None:
    assert scores_of(json.loads(json.dumps(results(SCORES)))) == SCORES
    later = {**dataclasses.asdict(SCORES[0]), "of_a_later_version": 1}
    assert Score.from_dict(later) == SCORES[0]


def test_a_validation_score_is_never_read_as_a_test_score(tmp_path: Path) -> None:
    folder = write(tmp_path / "run", results(SCORES))
    test, validation = read_run(folder), read_run(folder, "validation")
    assert test.tasks == {"rte": {"accuracy": 70.0}} and validation.tasks["rte"] == {"accuracy": 80.0}
    assert set(validation.tasks) == {"rte", "mine"} and test.scores["rte"].step == 20
    without = write(tmp_path / "without", results([score for score in SCORES if score.split == "validation"]))
    with pytest.raises(UserError, match=r"no test scores \(eval.test=false\); it has validation scores: choose them"):
        read_run(without)


def test_every_section_of_the_table_has_split_step_and_rows(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    later = dataclasses.replace(SCORES[2], step=40, selection="last")
    print_results(results([SCORES[0], SCORES[1], later]))
    lines = [" ".join(line.replace("│", " ").split()) for line in capsys.readouterr().out.splitlines()]
    shown = [line for line in lines if line.startswith(("validation", "test", "rte", "mine", "average"))]
    assert shown == [
        "validation at step 20 (best)", "rte accuracy 80.0 100 of 139",
        "test at step 20 (best)", "rte accuracy 70.0 50.0 138",
        "validation at step 40 (last)", "mine accuracy 60.0 50",
        "average, validation 70.0 2 tasks", "average, test 70.0 50.0 1 task",
    ]  # fmt: skip


def test_a_file_of_0_1_is_read_and_marked(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    path = next((TESTS / "assets" / "made_by_0.1").glob("*/results.json"))
    found = read_run(path.parent)
    assert found.tasks and not found.recorded
    monkeypatch.setenv("COLUMNS", "160")
    print_results(json.loads(path.read_text()))
    assert UNRECORDED in capsys.readouterr().out
