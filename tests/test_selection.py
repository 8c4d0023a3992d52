"""Which validation scores a run reports: those of the weights that are selected, not of the last evaluation."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from hdscale import train
from hdscale.data.tasks import get_task
from hdscale.evaluation.evaluator import Evaluation, SplitResult
from hdscale.evaluation.settings import EvalSettings
from hdscale.runs.state import RunState

TASKS = [get_task("rte"), get_task("cola")]
SCORES = {
    20: {"rte": {"accuracy": 80.0}, "cola": {"matthews": 20.0}},
    40: {"rte": {"accuracy": 60.0}, "cola": {"matthews": 30.0}},
}


class Scripted:
    """Stands for the evaluator of a run: its scores are in `SCORES`, by step."""

    def __init__(self, select: str) -> None:
        self.engine = SimpleNamespace(step=0, load_trainables=lambda tensors: None)
        self.settings = EvalSettings(select=select)
        self.folder = SimpleNamespace(best_folder=lambda step: Path("run") / "best" / f"step_{step:08d}")

    def __call__(self, tasks: list[Any], split: str, step: int, limit: int | None) -> Evaluation:
        notes = {"rows": 60, "rows_in_split": 277}
        results = {name: SplitResult(name, split, metrics, notes, Path(name)) for name, metrics in SCORES[step].items()}
        return Evaluation(TASKS, results)


@pytest.mark.parametrize(
    ("select", "expected"),
    [
        ("average", {"rte": (80.0, 20, "best"), "cola": (20.0, 20, "best")}),
        ("cola.matthews", {"rte": (60.0, 40, "best"), "cola": (30.0, 40, "best")}),
        ("per_task", {"rte": (80.0, 20, "best"), "cola": (30.0, 40, "best")}),
        ("last", {"rte": (60.0, 40, "last"), "cola": (30.0, 40, "last")}),
    ],
)
def test_validation_scores_are_of_the_selected_step(
    monkeypatch: pytest.MonkeyPatch, select: str, expected: dict[str, tuple[float, int, str]]
) -> None:
    monkeypatch.setattr(train, "export", lambda *_: None)
    monkeypatch.setattr(train, "read_trainables", lambda *_: {})
    evaluate, state = Scripted(select), RunState()
    for step in SCORES:
        evaluate.engine.step = step
        train.evaluate_and_keep_best(cast(Any, evaluate), TASKS, state)
    evaluate.settings.test = False
    scores, _ = train.final_evaluation(cast(Any, evaluate), TASKS, state)
    found = {score.task: (*score.metrics.values(), score.step, score.selection) for score in scores}
    assert found == expected
    assert all(score.split == "validation" and score.rows_shown == "60 of 277" for score in scores)
