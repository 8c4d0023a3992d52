"""The results of a run: what `results.json` says about its scores (docs/results.md)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from hdscale.data.sample import sample_rows
from hdscale.data.settings import DataSettings
from hdscale.data.sources import load_examples, load_split
from hdscale.data.tasks import Task
from hdscale.evaluation.averages import averages, majority_baseline
from hdscale.runs.scores import Metrics, Score, metrics_of


def score_summary(
    tasks: Sequence[Task],
    scores: Sequence[Score],
    notes: Mapping[str, Mapping[str, Any]],
    data: DataSettings,
    test_limit: int | None,
) -> dict[str, Any]:
    """Scores, averages and the majority-class baseline, as `results.json` has them.

    Args:
        scores: of the selected weights, on validation and test sets.
        notes: {task: what a reader must know beside the metrics: unreadable predictions, the sentence splitter}.
        data: `data.*`, to read the rows of the baseline.
        test_limit: `eval.test_limit`.

    Returns:
        `scores`: every score with split, step, selection, rows and checkpoint. `tasks` and `validation`: {task:
        metrics} of the test and of the validation sets. `average` and the other averages of the test sets, and
        `validation_average`; None where nothing was evaluated. `baseline`, `baseline_average`: of the majority class,
        on the test set, or on the validation set of a task without one.
    """
    test, validation = metrics_of(scores, "test"), metrics_of(scores, "validation")
    baseline = majority_baselines(tasks, data, test_limit)
    tested = {name: metrics for name, metrics in baseline.items() if name in test}
    return {
        "scores": [dataclasses.asdict(score) for score in scores],
        "tasks": test,
        **average_of(tasks, test),
        "validation": validation,
        "validation_average": average_of(tasks, validation)["average"],
        "baseline": baseline,
        "baseline_average": average_of(tasks, tested or baseline)["average"],
        "notes": notes,
    }


def average_of(tasks: Sequence[Task], metrics: Metrics) -> dict[str, float | None]:
    """All averages over the tasks that were evaluated; `average` is None where none was."""
    evaluated = [task for task in tasks if task.name in metrics]
    return {**averages(evaluated, metrics)} if evaluated else {"average": None}


def majority_baselines(tasks: Sequence[Task], data: DataSettings, test_limit: int | None) -> Metrics:
    """Metrics of always answering the most frequent training target, for tasks with labels or numbers."""
    found = {}
    for task in tasks:
        if task.kind in ("label", "number") and task.trains:
            split = "test" if "test" in task.splits else "validation"
            targets = [example.target for example in load_split(task, "train", data)]
            examples = load_examples(task, split, data)
            chosen = [examples[row] for row in sample_rows(len(examples), test_limit)]
            found[task.name] = majority_baseline(task, targets, chosen)
    return found
