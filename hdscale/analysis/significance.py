"""Whether two sets of runs differ: tests over seeds, and Holm's correction where several tasks are compared.

`hdscale analyze compare` uses them. A test needs several runs of each method: the scores of one run say
nothing of the spread over seeds.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np
from scipy import stats

from hdscale.errors import UserError

TESTS = ("paired-t", "welch", "wilcoxon", "bootstrap")
PAIRED = ("paired-t", "wilcoxon")
"""Tests that compare run with run: both methods need the same seeds."""


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Two methods on one task.

    Attributes:
        task: its name.
        first, second: mean scores (×100). difference: second minus first.
        low, high: 95% interval of the difference (of the test's own kind; bootstrap percentiles for
            `wilcoxon`).
        p: two-sided p-value. corrected: after Holm's correction over all comparisons made together.
        runs: runs of the first and the second method.
    """

    task: str
    first: float
    second: float
    difference: float
    low: float
    high: float
    p: float
    corrected: float
    runs: tuple[int, int]


def compare(
    first: Mapping[str, Sequence[float]],
    second: Mapping[str, Sequence[float]],
    test: str = "paired-t",
    resamples: int = 10_000,
    seed: int = 0,
) -> list[Comparison]:
    """Compare two methods task by task.

    Args:
        first, second: {task: one score per run}; for paired tests in the same order of seeds.
        test: `paired-t`, `welch` (unequal variances), `wilcoxon` (signed ranks) or `bootstrap` (of the mean
            difference: paired where both have equally many runs, else each method separately).
        resamples, seed: of the bootstrap.

    Raises:
        UserError: an unknown test, no common task, fewer than two runs, unequal numbers of runs for a paired
        test.
    """
    if test not in TESTS:
        raise UserError(f"unknown test '{test}'; known: {', '.join(TESTS)}")
    tasks = [task for task in first if task in second]
    if not tasks:
        raise UserError("the two methods have no task in common")
    rows = []
    for task in tasks:
        a, b = np.asarray(first[task], dtype=float), np.asarray(second[task], dtype=float)
        check_runs(task, a, b, test)
        p, (low, high) = p_and_interval(a, b, test, resamples, seed)
        rows.append((task, a, b, p, low, high))
    corrected = holm([row[3] for row in rows])
    return [
        Comparison(
            task,
            float(a.mean()),
            float(b.mean()),
            float(b.mean() - a.mean()),
            low,
            high,
            p,
            adjusted,
            (len(a), len(b)),
        )
        for (task, a, b, p, low, high), adjusted in zip(rows, corrected, strict=True)
    ]


def check_runs(task: str, a: np.ndarray, b: np.ndarray, test: str) -> None:
    """Raise UserError where the runs do not suffice for the test."""
    if min(len(a), len(b)) < 2:
        raise UserError(
            f"task {task}: {len(a)} and {len(b)} runs; a test needs at least 2 of each method (other seeds)"
        )
    if test in PAIRED and len(a) != len(b):
        raise UserError(f"task {task}: {len(a)} and {len(b)} runs; {test} pairs runs by seed: use welch or bootstrap")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise UserError(f"task {task}: a score is not a finite number")


def p_and_interval(
    a: np.ndarray, b: np.ndarray, test: str, resamples: int, seed: int
) -> tuple[float, tuple[float, float]]:
    """(two-sided p, 95% interval of mean(b) - mean(a)) of one task."""
    if test == "bootstrap":
        return bootstrap(a, b, resamples, seed)
    difference = b - a if len(a) == len(b) else None
    if test == "wilcoxon":
        assert difference is not None  # checked by check_runs
        if not difference.any():
            return 1.0, (0.0, 0.0)
        found = stats.wilcoxon(b, a)
        return float(found.pvalue), bootstrap(a, b, resamples, seed)[1]
    spread = difference.std() if test == "paired-t" and difference is not None else max(a.std(), b.std())
    if spread == 0:  # scipy divides by it: equal means cannot be told apart, unequal ones differ in every run
        gap = float(b.mean() - a.mean())
        return (1.0 if gap == 0 else 0.0), (gap, gap)
    found = stats.ttest_rel(b, a) if test == "paired-t" else stats.ttest_ind(b, a, equal_var=False)
    interval = found.confidence_interval(0.95)
    return float(found.pvalue), (float(interval.low), float(interval.high))


def bootstrap(a: np.ndarray, b: np.ndarray, resamples: int, seed: int) -> tuple[float, tuple[float, float]]:
    """Percentile bootstrap of mean(b) - mean(a): (two-sided p by the share beyond 0, 95% interval).

    Pairs of runs are drawn together where there are equally many; p is at least 1/(resamples + 1).
    """
    draw = np.random.default_rng(seed)
    if len(a) == len(b):
        picked = draw.integers(0, len(a), (resamples, len(a)))
        means = (b - a)[picked].mean(axis=1)
    else:
        means = b[draw.integers(0, len(b), (resamples, len(b)))].mean(axis=1)
        means = means - a[draw.integers(0, len(a), (resamples, len(a)))].mean(axis=1)
    below, above = int((means <= 0).sum()), int((means >= 0).sum())
    p = min(1.0, 2 * (min(below, above) + 1) / (resamples + 1))
    low, high = np.percentile(means, [2.5, 97.5])
    return p, (float(low), float(high))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction: each p times the number of hypotheses not yet rejected, never below a
    smaller one's.
    """
    count = len(p_values)
    adjusted = [math.nan] * count
    largest = 0.0
    for rank, index in enumerate(sorted(range(count), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (count - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted
