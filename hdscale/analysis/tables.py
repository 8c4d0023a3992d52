"""The paper's tables, each printed row with your runs of it below (`hdscale analyze tables --runs DIR`)."""

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


def run_name(row: PaperRow) -> str:
    """The name of the run that the row's configuration starts."""
    return str(yaml_with_bases(config_path(str(row.config)))["run"]["name"])


def runs_of(row: PaperRow, runs: Sequence[RunResult]) -> list[RunResult]:
    """The runs of a row: of its name, or of its name and a seed (`NAME_seed7`, as a study calls them)."""
    if row.config is None:
        return []
    pattern = re.compile(rf"{re.escape(run_name(row))}([_-]seed\d+)?")
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
        line = f"{text}"
        if line not in numbered:
            numbered.append(line)
        return f" [{numbered.index(line) + 1}]"

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
            marks = noted("; ".join(dict.fromkeys(run.described for run in own)))
            split = own[0].split if all(run.recorded for run in own) else "split not recorded"
            rows.append([row.name + marks, f"here, {count}, {split}", "/".join(shares), *map(cell, scores)])
    notes += [f"[{number}] {note}" for number, note in enumerate(numbered, 1)]
    header = ["Model", "source", "trainable", *(column.header for column in table.columns)]
    name = f"Table {table.key.removeprefix('table')}: {table.title}"
    return TextTable(name, header, rows, notes)


def own_table(runs: Sequence[RunResult]) -> TextTable:
    """Runs that are in no table of the paper: one row each, all metrics."""
    columns = list(
        dict.fromkeys((task, metric) for run in runs for task, metrics in run.tasks.items() for metric in metrics)
    )
    rows = []
    for run in runs:
        scores = [cell([run.tasks.get(task, {}).get(metric)]) for task, metric in columns]
        average = cell([run.averages.get("average")])
        if len({frozenset(other.tasks) for other in runs}) > 1:
            average += f" ({len(run.tasks)} task{'s' * (len(run.tasks) > 1)})"
        rows.append([run.name, run.described, run.config["method"]["name"], f"{run.percent:.2f}%", *scores, average])
    header = ["run", "scores of", "method", "trainable", *(f"{task} {metric}" for task, metric in columns), "average"]
    return TextTable("Runs", header, rows)


def tables_of(runs: Sequence[RunResult], wanted: Sequence[str]) -> list[TextTable]:
    """The tables that are wanted: of the paper by number, or `runs` for one of these runs only.

    With runs and without a wish: the paper's tables that have a row of them.

    Raises:
        UserError: for an unknown table, or if there is nothing to show.
    """
    if list(wanted) == ["runs"]:
        if not runs:
            raise UserError("--table runs needs --runs DIR")
        return [own_table(runs)]
    tables = [paper_table(key) for key in wanted] if wanted else list(paper_tables().values())
    if not wanted and runs:
        tables = [table for table in tables if any(runs_of(row, runs) for row in table.rows)]
        if not tables:
            raise UserError("none of these runs is a row of configs/paper; --table runs shows them in a separate table")
    return [beside_the_paper(table, runs) for table in tables]
