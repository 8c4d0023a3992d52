"""`hdscale params`: number of parameters by part, and the trainable share."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from hdscale.analysis.paper import PaperRow, PaperTable, config_path, paper_tables, trained_rows
from hdscale.commands.arguments import add_config_arguments
from hdscale.config import load_config
from hdscale.errors import EXIT_DONE, UserError
from hdscale.modeling.parameters import ParameterCount, count_for
from hdscale.resolve import resolve_model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    add_config_arguments(parser, required=False)
    parser.add_argument(
        "--all", action="store_true", help="the percentage column of Tables 1-3, 13, 14 and 16, row by row"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """The verb."""
    if args.all:
        if args.config or args.overrides:
            raise UserError("params --all counts the rows of configs/paper; leave out --config and key=value")
        rows = count_paper_rows()
        if args.json:
            print(json.dumps([as_json(*row) for row in rows], indent=2))
        else:
            print_paper_rows(rows)
        return EXIT_DONE
    if args.config is None:
        raise UserError("give --config FILE, or --all for the rows of the paper's tables")
    count = count_for(resolve_model(load_config(args.config, args.overrides)))
    if args.json:
        print(json.dumps(asdict(count), indent=2))
    else:
        print_count(count)
    return EXIT_DONE


def count_paper_rows() -> list[tuple[PaperTable, PaperRow, ParameterCount]]:
    """Counts of every trained row of the tables that print percentages; equal models are counted once."""
    keys = [key for key, table in paper_tables().items() if any(row.percent for row in table.rows)]
    counts: dict[str, ParameterCount] = {}
    rows = []
    for table, row in trained_rows(keys):
        config = resolve_model(load_config(config_path(str(row.config))))
        model = json.dumps(config.to_dict(), sort_keys=True)
        if model not in counts:
            counts[model] = count_for(config)
        rows.append((table, row, counts[model]))
    return rows


def as_json(table: PaperTable, row: PaperRow, count: ParameterCount) -> dict[str, str | int | float | None]:
    """A counted row as JSON values."""
    return {
        "table": table.key,
        "row": row.name,
        "config": row.config,
        "paper": row.percent,
        "trainable": count.trainable,
        "percent": count.percent,
        "note": row.percent_note,
    }


def print_count(count: ParameterCount) -> None:
    """Print one model's parameters by part."""
    table = Table(title=f"{count.method} on {count.model}")
    table.add_column("part")
    table.add_column("parameters", justify="right")
    table.add_column("% of the base", justify="right")
    for name, number in count.base_parts.items():
        table.add_row(f"base: {name}", f"{number:,}", f"{100 * number / count.base:.2f}")
    table.add_section()
    for name, number in count.parts.items():
        table.add_row(f"trained: {name}", f"{number:,}", f"{100 * number / count.base:.3f}")
    table.add_section()
    table.add_row("whole base", f"{count.base:,}", "100.00")
    table.add_row("trainable", f"{count.trainable:,}", f"{count.percent:.3f}")
    Console().print(table)


def print_paper_rows(rows: list[tuple[PaperTable, PaperRow, ParameterCount]]) -> None:
    """Print the share of trainable parameters of every row that the paper trains, next to the printed share."""
    printed = Table(title="Trainable parameters, % of the fully fine-tuned base")
    for header in ("table", "row"):
        printed.add_column(header)
    for header in ("trainable", "exact %", "paper"):
        printed.add_column(header, justify="right")
    notes: list[str] = []
    last = None
    for table, row, count in rows:
        mark = ""
        if row.percent_note:
            if row.percent_note not in notes:
                notes.append(row.percent_note)
            mark = f" [{notes.index(row.percent_note) + 1}]"
        if last not in (None, table.key):
            printed.add_section()
        printed.add_row(
            "" if last == table.key else table.key,
            row.name,
            f"{count.trainable:,}",
            f"{count.percent:.3f}",
            escape(("" if row.percent is None else f"{row.percent:g}") + mark),
        )
        last = table.key
    console = Console()
    console.print(printed)
    for number, note in enumerate(notes, 1):
        console.print(escape(f"[{number}] {note}"))
