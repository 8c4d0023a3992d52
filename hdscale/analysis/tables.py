"""The paper's tables, each printed row with your runs of it below (`hdscale analyze tables`)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from statistics import fmean, stdev

from hdscale.analysis.formats import TextTable
from hdscale.analysis.paper import Column, PaperRow, PaperTable, config_path, paper_table, paper_tables
from hdscale.config import yaml_with_bases
from hdscale.errors import UserError
from hdscale.runs.results import RunResult

MISSING = "–"


def run_name(config: str) -> str:
    """The name of the run that a file of configs/paper starts; `config` is its stem."""
    return str(yaml_with_bases(config_path(config))["run"]["name"])


def runs_of(row: PaperRow, runs: Sequence[RunResult]) -> list[RunResult]:
    """The runs of a row: of its name, or of its name and a seed (`NAME_seed7`, as a study calls them)."""
    if row.config is None:
        return []
    pattern = re.compile(rf"{re.escape(run_name(row.config))}([_-]seed\d+)?")
    return [run for run in runs if pattern.fullmatch(run.name)]


def score_of(run: RunResult, column: Column) -> float | None:
    """A run's number in a column, or None where it has none."""
    if len(column.path) == 1:
        return run.averages.get(column.path[0])
    task, metric = column.path
    return run.tasks.get(task, {}).get(metric)


def cell(scores: Sequence[float | None]) -> str:
    """The mean, with the standard deviation of several runs."""
    found = [score for score in scores if score is not None]
    if not found:
        return MISSING
    return f"{fmean(found):.1f} ± {stdev(found):.1f}" if len(found) > 1 else f"{found[0]:.1f}"


def beside_the_paper(table: PaperTable, runs: Sequence[RunResult]) -> TextTable:
    """The table with the printed numbers, rows that the paper reports from elsewhere marked so, and own runs."""
    notes: list[str] = [table.note] if table.note else []

    def noted(text: str | None) -> str:
        if not text:
            return ""
        if text not in numbered:
            numbered.append(text)
        return f" [{numbered.index(text) + 1}]"

    numbered: list[str] = []
    rows = []
    for row in table.rows:
        source = f"reported by {row.reported}" if row.reported else "paper"
        marks = noted(row.note)
        percent = MISSING if row.percent is None else f"{row.percent:g}%" + noted(row.percent_note)
        rows.append([row.name + marks, source, percent, *(cell([score]) for score in row.scores)])
        own = runs_of(row, runs)
        if own:
            count = "1 run" if len(own) == 1 else f"{len(own)} runs"
            shares = sorted({f"{run.percent:.2f}%" for run in own})
            scores = ([score_of(run, column) for run in own] for column in table.columns)
            rows.append([row.name, f"here, {count}", "/".join(shares), *map(cell, scores)])
    notes += [f"[{number}] {note}" for number, note in enumerate(numbered, 1)]
    header = ["Model", "source", "trainable", *(column.header for column in table.columns)]
    name = f"Table {table.key.removeprefix('table')}: {table.title}"
    return TextTable(name, header, rows, notes)


def own_table(runs: Sequence[RunResult]) -> TextTable:
    """Runs that stand in no table of the paper: one row each, all metrics."""
    columns = list(
        dict.fromkeys((task, metric) for run in runs for task, metrics in run.tasks.items() for metric in metrics)
    )
    rows = []
    for run in runs:
        scores = [cell([run.tasks.get(task, {}).get(metric)]) for task, metric in columns]
        average = cell([run.averages.get("average")])
        rows.append([run.name, run.config["method"]["name"], f"{run.percent:.2f}%", *scores, average])
    header = ["run", "method", "trainable", *(f"{task} {metric}" for task, metric in columns), "average"]
    return TextTable("Runs", header, rows)


def tables_of(runs: Sequence[RunResult], names: Sequence[str]) -> list[TextTable]:
    """Tables of the paper with own runs in them.

    Args:
        runs: own runs; may be none. names: numbers of tables; `["runs"]`: one table of the own runs alone; none: all
            tables, or those that have a row of these runs.

    Raises:
        UserError: for a table that the paper does not have, or where there is nothing to show.
    """
    if list(names) == ["runs"]:
        if not runs:
            raise UserError("--table runs needs --runs DIR")
        return [own_table(runs)]
    tables = [paper_table(name) for name in names] if names else list(paper_tables().values())
    if not names and runs:
        tables = [table for table in tables if any(runs_of(row, runs) for row in table.rows)]
        if not tables:
            raise UserError(
                "none of these runs is a row of configs/paper; --table runs shows them in a table of their own"
            )
    return [beside_the_paper(table, runs) for table in tables]
