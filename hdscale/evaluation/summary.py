"""The results of a run: what `results.json` says about its scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hdscale.data.settings import DataSettings
from hdscale.data.sources import load_examples, load_split
from hdscale.data.tasks import Task
from hdscale.evaluation.averages import averages, majority_baseline
from hdscale.runs.state import Metrics


def score_summary(
    tasks: Sequence[Task],
    metrics: Metrics,
    notes: Mapping[str, Mapping[str, Any]],
    data: DataSettings,
    test_limit: int | None,
) -> dict[str, Any]:
    """Scores, averages and the majority-class baseline, as `results.json` has them.

    Args:
        metrics: of the final evaluation.
        notes: {task: what a reader must know beside the metrics: rows, unreadable predictions, the sentence splitter}.
        data: `data.*`, to read the rows of the baseline.
        test_limit: `eval.test_limit`.
    """
    baseline = majority_baselines(tasks, data, test_limit)
    return {
        "tasks": metrics,
        **average_of(tasks, metrics),
        "baseline": baseline,
        "baseline_average": average_of(tasks, baseline)["average"],
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
            found[task.name] = majority_baseline(task, targets, examples[:test_limit] if test_limit else examples)
    return found
