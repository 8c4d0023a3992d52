"""`hdscale analyze tables --runs DIR`: the paper's tables, each printed row with your runs of it below."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from statistics import fmean, stdev

from hdscale.analysis.formats import TextTable, add_output_arguments, write_tables
from hdscale.analysis.paper import Column, PaperRow, PaperTable, config_path, paper_table, paper_tables
from hdscale.errors import UserError
from hdscale.runs.results import RunResult, find_runs

MISSING = "–"


def run_name(row: PaperRow) -> str:
    """The name of the run that the row's configuration starts."""
    from hdscale.config import yaml_with_bases

    return str(yaml_with_bases(config_path(row.config))["run"]["name"])


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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--runs", nargs="+", default=[], metavar="DIR", help="folders in and below which finished runs lie"
    )
    parser.add_argument(
        "--table",
        nargs="+",
        metavar="N",
        help="tables of the paper (1, 2, 13, ...), or `runs` for one of your own runs alone",
    )
    add_output_arguments(parser)


def run(args: argparse.Namespace) -> int:
    runs = find_runs(args.runs) if args.runs else []
    if args.table == ["runs"]:
        if not runs:
            raise UserError("--table runs needs --runs DIR")
        write_tables([own_table(runs)], args)
        return 0
    tables = [paper_table(key) for key in args.table] if args.table else list(paper_tables().values())
    if not args.table and runs:
        # what has something of one's own to show
        tables = [table for table in tables if any(runs_of(row, runs) for row in table.rows)]
        if not tables:
            raise UserError(
                "none of these runs is a row of configs/paper; --table runs shows them in a table of their own"
            )
    write_tables([beside_the_paper(table, runs) for table in tables], args)
    return 0
