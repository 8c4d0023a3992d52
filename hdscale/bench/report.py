"""A benchmark's table, its JSON, and where the figures come from."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import platform
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from hdscale.bench.options import ReportOptions
from hdscale.runs.machine import processor_name

WIDE = 400
"""Columns enough for any table."""


def progress(text: str) -> None:
    """Say on stderr what a long benchmark is doing."""
    Console(stderr=True).print(text, highlight=False)


def machine(device: torch.device) -> dict[str, Any]:
    """Hardware, versions, threads, date and command."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name()
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            **{package: importlib.metadata.version(package) for package in ("torch", "transformers", "deepspeed")},
        },
        "date": datetime.date.today().isoformat(),
        "command": command(sys.argv[1:]),
    }


def command(arguments: list[str]) -> str:
    """The command line, without where the table is written."""
    kept, skip = ["hdscale"], False
    for argument in arguments:
        if argument in ("--json", "--markdown"):
            skip = True
        elif not (skip and not argument.startswith("--")):
            kept.append(argument)
            skip = False
        else:
            skip = False
    return " ".join(kept)


def publish(title: str, rows: list[dict[str, Any]], options: ReportOptions, device: torch.device, **more: Any) -> None:
    """Print a table of rows (all with the same keys) and write the JSON where it is asked for.

    Args:
        more: further entries of the JSON, printed as lines below the table.
    """
    result = {"title": title, "machine": machine(device), "rows": rows, **more}
    if options.json == "-":
        print(json.dumps(result, indent=1))
        return
    console = Console()
    table = table_of(title, rows)
    if natural_width(table) > console.width:
        table = min(table, transposed(title, rows), key=natural_width)
    Console(width=max(console.width, natural_width(table))).print(table)
    for key, value in more.items():
        console.print(f"{spoken(key)}: {shown(value)}", highlight=False)
    if options.json:
        Path(options.json).write_text(json.dumps(result, indent=1) + "\n")
        console.print(f"written to {options.json}", highlight=False)
    if options.markdown:
        with Path(options.markdown).open("a", encoding="utf-8") as stream:
            stream.write(markdown(result, more))
        console.print(f"added to {options.markdown}", highlight=False)


def table_of(title: str, rows: list[dict[str, Any]]) -> Table:
    """One line per row."""
    table = Table(title=title, title_justify="left")
    for index, key in enumerate(rows[0]):
        table.add_column(spoken(key), justify="left" if index == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(shown(value) for value in row.values()))
    return table


def transposed(title: str, rows: list[dict[str, Any]]) -> Table:
    """One column per row, for narrow terminals."""
    first, *keys = rows[0]
    table = Table(title=title, title_justify="left")
    table.add_column(spoken(first), no_wrap=True)
    for row in rows:
        table.add_column(shown(row[first]), justify="right")
    for key in keys:
        table.add_row(spoken(key), *(shown(row[key]) for row in rows))
    return table


def natural_width(table: Table) -> int:
    """Characters that a table takes where nothing is cut."""
    wide = Console(width=WIDE)
    return Measurement.get(wide, wide.options, table).maximum


def markdown(result: dict[str, Any], more: dict[str, Any]) -> str:
    """A section for the committed results."""
    rows, about = result["rows"], result["machine"]
    lines = [f"## {result['title']}", "", f"`{about['command']}`", ""]
    lines += ["| " + " | ".join(spoken(key) for key in rows[0]) + " |", "|" + "---|" * len(rows[0])]
    lines += ["| " + " | ".join(shown(value) for value in row.values()) + " |" for row in rows]
    lines += ["", *(f"- {spoken(key)}: {shown(value)}" for key, value in more.items())]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    lines += [f"- {about['device']}, {about['threads']} threads; {versions}; {about['date']}", "", ""]
    return "\n".join(lines)


def spoken(key: str) -> str:
    """A key as a heading."""
    return key.replace("_", " ")


def shown(value: Any) -> str:
    """A cell: three significant digits for a fraction, thousands separated for a count."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    if isinstance(value, dict):
        between = "; " if any(isinstance(item, dict) for item in value.values()) else ", "
        return between.join(f"{spoken(str(key))} {shown(item)}" for key, item in value.items())
    if isinstance(value, list):
        return "; ".join(shown(item) for item in value)
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return str(value)
