"""`results.json` written, read and printed; `hdscale.evaluation.summary` puts together what it holds."""

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
from hdscale.runs.scores import task_score


@dataclass(frozen=True)
class RunResult:
    """What `results.json` says of a run.

    Attributes:
        folder: of the run. name: its name. seed: its seed.
        tasks: {task: {metric: score x100}} of the test splits. averages: {"average": ..., and others that apply}.
        percent: share of trainable parameters. config: the resolved configuration.
    """

    folder: Path
    name: str
    seed: int
    tasks: Mapping[str, Mapping[str, float]]
    averages: Mapping[str, float]
    percent: float
    config: Mapping[str, Any]


AVERAGES = (
    "average", "summarisation", "nli", "overall", "in_domain_f1", "in_domain_em", "out_of_domain_f1", "out_of_domain_em"
)  # fmt: skip


def read_run(folder: str | Path) -> RunResult:
    """The result of one run.

    Raises:
        UserError: for a folder without a whole `results.json`.
    """
    folder = Path(folder)
    path = folder / RESULTS if folder.is_dir() else folder
    if not path.is_file():
        raise UserError(f"{folder}: no results.json; give the folder of a finished run (runs/NAME)")
    try:
        tree = json.loads(path.read_text())
        return RunResult(
            path.parent,
            tree["name"],
            int(tree["config"]["run"]["seed"]),
            tree["tasks"],
            {key: tree[key] for key in AVERAGES if key in tree} | classifier_averages(path.parent),
            float(tree["trainable_percent"]),
            tree["config"],
        )
    except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: not the results of a run ({error!r})") from error


def classifier_averages(folder: Path) -> dict[str, float]:
    """What `hdscale classify` found for the run (Table 7), if it was asked."""
    path = folder / CLASSIFIER
    written = json.loads(path.read_text()) if path.is_file() else {}
    return {key: written[key] for key in ("encoder_decoder", "encoder_only") if written.get(key) is not None}


def find_runs(folders: Iterable[str | Path]) -> list[RunResult]:
    """The finished runs in and below some folders, by path.

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
    return [read_run(path) for path in dict.fromkeys(paths)]


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
    """The table of scores: one row per metric, with the majority-class baseline beside it."""
    table = Table(title=f"{results['name']}: {results['steps']:,} steps, {results['trainable_percent']:.2f}% trainable")
    table.add_column("task")
    table.add_column("metric")
    for column in ("majority class", "validation", "test"):
        table.add_column(column, justify="right")

    def cell(split: dict[str, dict[str, float]], task: str, metric: str) -> str:
        value = (split or {}).get(task, {}).get(metric)
        return "" if value is None else f"{value:.1f}"

    for task, metrics in results["tasks"].items():
        for index, metric in enumerate(metrics):
            table.add_row(
                task if index == 0 else "",
                metric,
                cell(results["baseline"], task, metric),
                cell(results["validation"], task, metric),
                cell(results["tasks"], task, metric),
            )
    table.add_section()
    averages_shown = ["" if results[key] is None else f"{results[key]:.1f}" for key in ("baseline_average", "average")]
    table.add_row("average", "", averages_shown[0], "", averages_shown[1])
    Console().print(table)
