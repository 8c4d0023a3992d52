"""Two methods over seeds, as the marks of Table 1 need it (`hdscale analyze compare R1 R2 ... --against B1 B2 ...`).

The paper marks differences at p < 0.05 and names no test. This table has a paired t-test (runs of equal seeds) and
Welch's, each corrected by Holm's method over the metrics; averages are a separate family.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, stdev

from hdscale.analysis.formats import TextTable
from hdscale.analysis.significance import PAIRED, compare
from hdscale.errors import UserError
from hdscale.runs.results import UNRECORDED, RunResult, task_average
from hdscale.settings import flatten

SIGNIFICANT = 0.05
TEST_NAMES = {
    "paired-t": "paired t-test",
    "welch": "Welch's t-test",
    "wilcoxon": "Wilcoxon's signed ranks",
    "bootstrap": "bootstrap",
}

EXPECTED = ("method.", "run.", "cluster.", "train.checkpoint_every", "train.keep_checkpoints", "train.log_every")
"""Beginnings of keys that differ between the runs of a comparison, or do not matter to it."""

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
    return ["welch"], f"no paired test: it needs equal and distinct seeds, and these are {seeds[0]} and {seeds[1]}"


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
        *(
            f"{method_name(runs)}: {'; '.join(dict.fromkeys(run.described for run in runs))}"
            for runs in (first, second)
        ),
        "corrected: Holm's method, over the metrics as one family and the averages as another",
        f"* corrected p < {SIGNIFICANT} in every test shown",
    ]
    return TextTable(f"{method_name(first)} against {method_name(second)}", header, rows, notes)


def spread(scores: Sequence[float]) -> str:
    return f"{fmean(scores):.1f} ± {stdev(scores):.1f}"


def method_name(runs: Sequence[RunResult]) -> str:
    """The runs' method, with its sizes' share: runs of one method may still differ in it."""
    names = list(dict.fromkeys(run.config["method"]["name"] for run in runs))
    return f"{'/'.join(names)} ({runs[0].percent:.1f}%)"


def compare_runs(
    first: Sequence[RunResult], second: Sequence[RunResult], wanted: Sequence[str], without: Sequence[str]
) -> TextTable:
    """The table of two methods' runs, by the tests that are wanted or else possible."""
    check_same_rows([*first, *second])
    tests, note = choose_tests(first, second, wanted)
    table = comparison_table(first, second, tests, without)
    table.notes += [note] if note else []
    table.notes += other_differences(first, second)
    return table


def check_same_rows(runs: Sequence[RunResult]) -> None:
    """Raise UserError if a task was scored on different numbers of rows: such scores cannot be compared."""
    first = runs[0]
    for run in runs[1:]:
        for task, score in run.scores.items():
            other = first.scores.get(task)
            if other is not None and other.rows != score.rows:
                raise UserError(
                    f"{task} {run.split}: {score.rows_shown} rows in {run.folder}, {other.rows_shown} in "
                    f"{first.folder}; evaluate both on the same rows (hdscale evaluate --run ...)"
                )


def other_differences(first: Sequence[RunResult], second: Sequence[RunResult]) -> list[str]:
    """What differs besides method, seed and name, and so may also be a cause of a difference: one note each."""
    notes = []
    settings = [flatten(dict(run.config)) for run in (*first, *second)]
    keys = sorted({key for one in settings for key in one if not key.startswith(EXPECTED)})
    for key in keys:
        values = list(dict.fromkeys(str(one.get(key)) for one in settings))
        if len(values) > 1:
            notes.append(f"the runs also differ in {key}: {', '.join(values[:4])}")
    if unknown := [run.name for run in (*first, *second) if not run.recorded]:
        notes.append(f"{UNRECORDED}: {', '.join(unknown)}")
    return notes
