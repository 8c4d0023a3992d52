"""`results.json` read and printed; `hdscale.evaluation.summary` puts together what it holds."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.table import Table

from hdscale.errors import UserError
from hdscale.runs.folder import CLASSIFIER, RESULTS
from hdscale.runs.scores import Score, described, task_score

RESULTS_FORMAT = 2
"""Version of `results.json` (docs/results.md). That of hdscale 0.1 has none: it does not say of which split, step and
rows its scores are."""


@dataclass(frozen=True)
class RunResult:
    """What `results.json` says of a run on one split.

    Attributes:
        folder: of the run. name: its name. seed: its seed.
        split: "test" or "validation".
        tasks: {task: {metric: score x100}}. scores: the same with step, selection and rows; {} where not recorded.
        averages: {"average": ..., and others that apply}.
        percent: share of trainable parameters. config: the resolved configuration.
    """

    folder: Path
    name: str
    seed: int
    split: str
    tasks: Mapping[str, Mapping[str, float]]
    scores: Mapping[str, Score]
    averages: Mapping[str, float]
    percent: float
    config: Mapping[str, Any]

    @property
    def recorded(self) -> bool:
        """Whether the file says of which split its scores are (that of hdscale 0.1 does not)."""
        return bool(self.scores)

    @property
    def described(self) -> str:
        """What the scores are of: `test, step 600 (best), 300 rows per task`, or that the file does not say it."""
        return described(list(self.scores.values())) if self.recorded else UNRECORDED


AVERAGES = (
    "average", "summarisation", "nli", "overall", "in_domain_f1", "in_domain_em", "out_of_domain_f1", "out_of_domain_em"
)  # fmt: skip
UNRECORDED = "split not recorded (hdscale 0.1)"


def read_run(folder: str | Path, split: str = "test") -> RunResult:
    """The result of one run on one split.

    Raises:
        UserError: for a folder without a complete `results.json`, or without scores on this split.
    """
    folder = Path(folder)
    path = folder / RESULTS if folder.is_dir() else folder
    if not path.is_file():
        raise UserError(f"{folder}: no results.json; give the folder of a finished run (runs/NAME)")
    try:
        tree = json.loads(path.read_text())
        scores = {score.task: score for score in scores_of(tree) if score.split == split}
        tasks: Mapping[str, Mapping[str, float]] = {name: score.metrics for name, score in scores.items()}
        averages = {"average": tree.get("validation_average")} if split == "validation" else tree
        if "format" not in tree:
            tasks, averages = (tree["tasks"], tree) if split == "test" else (tree.get("validation", {}), {})
        if not tasks:
            raise UserError(f"{path}: {missing_split(tree, split)}")
        return RunResult(
            path.parent,
            tree["name"],
            int(tree["config"]["run"]["seed"]),
            split,
            tasks,
            scores,
            {key: averages[key] for key in AVERAGES if averages.get(key) is not None}
            | classifier_averages(path.parent),
            float(tree["trainable_percent"]),
            tree["config"],
        )
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not the results of a run ({error!r})") from error


def scores_of(tree: Mapping[str, Any]) -> list[Score]:
    """The scores of a `results.json`; none of one that hdscale 0.1 wrote."""
    return [Score.from_dict(score) for score in tree.get("scores", [])]


def unrecorded(tree: Mapping[str, Any]) -> list[Score]:
    """The scores of a file that hdscale 0.1 wrote, as far as it says what they are."""
    return [Score(task, UNRECORDED, metrics, None, "", 0, 0) for task, metrics in tree.get("tasks", {}).items()]


def missing_split(tree: Mapping[str, Any], split: str) -> str:
    """Why a run has no scores on a split, and what to do about it."""
    other = "validation" if split == "test" else "test"
    known = "" if not tree.get("scores") else f"; it has {other} scores: choose them by --split {other}"
    why = " (eval.test=false)" if split == "test" and not tree["config"]["eval"].get("test", True) else ""
    return f"no {split} scores{why}{known}"


def classifier_averages(folder: Path) -> dict[str, float]:
    """What `hdscale classify` found for the run (Table 7), if it was asked."""
    path = folder / CLASSIFIER
    written = json.loads(path.read_text()) if path.is_file() else {}
    return {key: written[key] for key in ("encoder_decoder", "encoder_only") if written.get(key) is not None}


def find_runs(folders: Iterable[str | Path], split: str = "test") -> list[RunResult]:
    """The finished runs in and below some folders, by path, on one split.

    Raises:
        UserError: where there are none.
    """
    paths: list[Path] = []
    for folder in map(Path, folders):
        if not folder.exists():
            raise UserError(f"{folder}: no such folder of runs")
        paths += sorted(folder.rglob(RESULTS))
    if not paths:
        raise UserError(f"no results.json below {', '.join(map(str, folders))}; train the runs first")
    return [read_run(path, split) for path in dict.fromkeys(paths)]


def task_average(run: RunResult, without: Iterable[str] = ()) -> float:
    """The mean over a run's tasks of their `task_score`, without some tasks.

    Raises:
        UserError: for a task that the run does not have, or if none is left.
    """
    without = set(without)
    if unknown := without - set(run.tasks):
        raise UserError(f"{run.folder}: no task '{sorted(unknown)[0]}' among {', '.join(run.tasks)}")
    scores = [task_score(metrics) for task, metrics in run.tasks.items() if task not in without]
    if not scores:
        raise UserError(f"{run.folder}: no task is left to average")
    return fmean(scores)


def print_results(results: dict[str, Any]) -> None:
    """The table of scores: a section for each split, step and selection, with rows and the majority class's scores."""
    table = Table(title=f"{results['name']}: {results['steps']:,} steps, {results['trainable_percent']:.2f}% trainable")
    table.add_column("task", no_wrap=True)
    table.add_column("metric", no_wrap=True)
    for column in ("score", "majority class", "rows"):
        table.add_column(column, justify="right", no_wrap=column != "majority class")  # the one that may take two lines
    sections: dict[str, list[Score]] = {}
    for score in scores_of(results) or unrecorded(results):
        sections.setdefault(score.source_shown, []).append(score)
    for source, scores in sections.items():
        table.add_section()
        table.add_row(source, style="bold")
        for score in scores:
            # the baseline is of the test set where there is one
            compared = score.split != "validation" or score.task not in results["tasks"]
            baseline = results["baseline"].get(score.task, {}) if compared else {}
            for index, (metric, value) in enumerate(score.metrics.items()):
                table.add_row(
                    score.task if index == 0 else "",
                    metric,
                    f"{value:.1f}",
                    f"{baseline[metric]:.1f}" if metric in baseline else "",
                    score.rows_shown if score.rows and index == 0 else "",
                )
    table.add_section()
    for split, key in (("validation", "validation_average"), ("test", "average")):
        if results.get(key) is not None:
            beside = results["baseline_average"] if split == "test" or results["average"] is None else None
            count = sum(score.split == split for score in scores_of(results))
            table.add_row(
                f"average, {split if 'format' in results else UNRECORDED}",
                "",
                f"{results[key]:.1f}",
                "" if beside is None else f"{beside:.1f}",
                f"{count} task{'s' * (count > 1)}" if count else "",
            )
    Console().print(table)
