"""The one number by which a task counts in an average."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean


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
