"""Two methods over seeds, as the marks of Table 1 need it (`hdscale analyze compare`).

The paper marks differences at p < 0.05 and names no test. Here a paired t-test (runs of equal seeds side by side) and
Welch's stand in the same table, each corrected by Holm's method over the metrics; averages are a family of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, stdev

from hdscale.analysis.formats import TextTable
from hdscale.analysis.significance import PAIRED, compare
from hdscale.errors import UserError
from hdscale.runs.results import RunResult, task_average

SIGNIFICANT = 0.05
TEST_NAMES = {
    "paired-t": "paired t-test",
    "welch": "Welch's t-test",
    "wilcoxon": "Wilcoxon's signed ranks",
    "bootstrap": "bootstrap",
}

Scores = dict[str, list[float]]


def metric_scores(runs: Sequence[RunResult]) -> Scores:
    """{"task metric": one score per run} of the metrics that all runs have."""
    common = [
        (task, metric)
        for task, metrics in runs[0].tasks.items()
        for metric in metrics
        if all(metric in run.tasks.get(task, {}) for run in runs)
    ]
    return {f"{task} {metric}": [run.tasks[task][metric] for run in runs] for task, metric in common}


def average_scores(runs: Sequence[RunResult], without: Sequence[str]) -> Scores:
    """{"average": one per run, "average without T": ...} for each task to be left out."""
    found = {"average": [task_average(run) for run in runs]}
    for task in without:
        found[f"average without {task}"] = [task_average(run, [task]) for run in runs]
    return found


def choose_tests(
    first: Sequence[RunResult], second: Sequence[RunResult], wanted: Sequence[str]
) -> tuple[list[str], str | None]:
    """The tests that these runs allow, and a note where pairing is not one of them.

    Raises:
        UserError: if a paired test was asked for by name and the seeds do not match.
    """
    seeds = sorted(run.seed for run in first), sorted(run.seed for run in second)
    pairable = seeds[0] == seeds[1] and len(set(seeds[0])) == len(seeds[0])
    if wanted:
        if not pairable and (paired := [test for test in wanted if test in PAIRED]):
            raise UserError(
                f"--test {paired[0]} pairs runs by seed, but the seeds are {seeds[0]} and {seeds[1]}; use welch"
            )
        return list(wanted), None
    if pairable:
        return ["paired-t", "welch"], None
    return ["welch"], f"no paired test: the seeds are {seeds[0]} and {seeds[1]}"


def comparison_table(
    first: Sequence[RunResult], second: Sequence[RunResult], tests: Sequence[str], without: Sequence[str] = ()
) -> TextTable:
    """The first method's runs against the second's: a row for each metric and average.

    Args:
        first: runs of the method of interest. second: runs of the one that it is compared with.
        tests: of `hdscale.analysis.significance`. without: tasks that averages are also taken without.

    Raises:
        UserError: fewer than two runs of a method, no common metric.
    """
    first, second = (sorted(runs, key=lambda run: run.seed) for runs in (first, second))
    families = [
        (metric_scores(first), metric_scores(second)),
        (average_scores(first, without), average_scores(second, without)),
    ]
    tests_by_family = [[compare(b, a, test) for test in tests] for a, b in families]
    rows = []
    for (ours, theirs), results in zip(families, tests_by_family, strict=True):
        for index, comparison in enumerate(results[0]):
            key, per_test = comparison.task, [found[index] for found in results]
            marks = "*" if all(found.corrected < SIGNIFICANT for found in per_test) else ""
            rows.append(
                [
                    key,
                    spread(ours[key]),
                    spread(theirs[key]),
                    f"{comparison.difference:+.2f}{marks}",
                    f"{comparison.low:+.2f} to {comparison.high:+.2f}",
                    *(text for found in per_test for text in (f"{found.p:.4f}", f"{found.corrected:.4f}")),
                ]
            )
    header = ["score", method_name(first), method_name(second), "difference", f"95% interval ({TEST_NAMES[tests[0]]})"]
    for test in tests:
        header += [f"p, {TEST_NAMES[test]}", "corrected"]
    notes = [
        f"mean ± standard deviation over {len(first)} and {len(second)} runs",
        "corrected: Holm's method, over the metrics as one family and the averages as another",
        f"* corrected p < {SIGNIFICANT} in every test shown",
    ]
    return TextTable(f"{method_name(first)} against {method_name(second)}", header, rows, notes)


def spread(scores: Sequence[float]) -> str:
    """Mean and standard deviation."""
    return f"{fmean(scores):.1f} ± {stdev(scores):.1f}"


def method_name(runs: Sequence[RunResult]) -> str:
    """The runs' method and its share of trainable parameters, by which runs of one method may differ."""
    names = list(dict.fromkeys(run.config["method"]["name"] for run in runs))
    return f"{'/'.join(names)} ({runs[0].percent:.1f}%)"
