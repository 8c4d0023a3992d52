"""Scores with what they are of: a task's metrics on some rows of a split, by the weights of some step."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

Metrics = dict[str, dict[str, float]]
"""{task: {metric: score x100}}"""


@dataclasses.dataclass(frozen=True)
class Score:
    """The metrics of one task, and what they were computed on.

    Attributes:
        task, split: which rows.
        metrics: {metric: value x100}.
        step: of the weights; None where the weights have none (a checkpoint that hdscale has not trained).
        selection: why these weights: "best" by `eval.select`, "last", or "given" (chosen by whoever evaluated them).
        rows: that were scored (questions, for MRQA). rows_in_split: that the split has.
        checkpoint: where the weights are, relative to the run's folder; None if they are not kept.
    """

    task: str
    split: str
    metrics: dict[str, float]
    step: int | None
    selection: str
    rows: int
    rows_in_split: int
    checkpoint: str | None = None

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any]) -> Score:
        """The inverse of `dataclasses.asdict`; keys of later versions are ignored."""
        known = {field.name for field in dataclasses.fields(cls)}
        return cls(**{name: value for name, value in tree.items() if name in known})

    @property
    def rows_shown(self) -> str:
        """`277`, or `60 of 277` of a sample."""
        return f"{self.rows:,}" if self.rows == self.rows_in_split else f"{self.rows:,} of {self.rows_in_split:,}"

    @property
    def source_shown(self) -> str:
        """`test at step 600 (best)`: what the score was computed on, and by which weights."""
        return self.split if self.step is None else f"{self.split} at step {self.step:,} ({self.selection})"


def described(scores: Sequence[Score]) -> str:
    """What the scores of a run are of, on one line: `test, step 600 (best), 300 rows per task`."""
    parts = list(dict.fromkeys(score.split for score in scores))
    steps = sorted({score.step for score in scores if score.step is not None})
    if steps:
        chosen = "/".join(dict.fromkeys(score.selection for score in scores))
        parts.append(f"step{'s' * (len(steps) > 1)} {', '.join(f'{step:,}' for step in steps)} ({chosen})")
    tasks: dict[str, list[str]] = {}
    for score in scores:
        tasks.setdefault(score.rows_shown, []).append(score.task)
    if len(tasks) == 1:
        parts.append(f"{next(iter(tasks))} rows{' per task' * (len(scores) > 1)}")
    else:
        parts += [f"{rows} rows of {' and '.join(names)}" for rows, names in tasks.items()]
    return ", ".join(parts)


def metrics_of(scores: Iterable[Score], split: str) -> Metrics:
    """{task: metrics} of one split."""
    return {score.task: score.metrics for score in scores if score.split == split}


def task_score(metrics: Mapping[str, float]) -> float:
    """ROUGE-2 of summaries, F1 of answers (they have an exact match beside it), otherwise the mean of the metrics.

    So a GLUE task with two metrics counts their mean (Table 1), MRQA counts F1 (Tables 4 and 5), and Table 6 counts
    ROUGE-2 alone.

    Args:
        metrics: {metric: value x100} of one task, at least one.
    """
    if "rouge2" in metrics:
        return metrics["rouge2"]
    if "em" in metrics and "f1" in metrics:
        return metrics["f1"]
    return fmean(metrics.values())
