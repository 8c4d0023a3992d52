"""A benchmark's table, its JSON, and where the figures come from."""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import platform
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table


def add_report_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", metavar="FILE", nargs="?", const="-", help="write JSON to FILE, or print it instead of the table")


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
        "command": " ".join(["hdscale", *sys.argv[1:]]),
    }


def processor_name() -> str:
    """The processor as Linux names it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def publish(title: str, rows: list[dict[str, Any]], args: argparse.Namespace, device: torch.device, **more: Any) -> None:
    """Print a table of rows (all with the same keys) and write the JSON where it is asked for.

    Args:
        more: further entries of the JSON, printed as lines below the table.
    """
    result = {"title": title, "machine": machine(device), "rows": rows, **more}
    if args.json == "-":
        print(json.dumps(result, indent=1))
        return
    table = Table(title=title)
    for index, key in enumerate(rows[0]):
        table.add_column(key.replace("_", " "), justify="left" if index == 0 else "right")
    for row in rows:
        table.add_row(*(shown(value) for value in row.values()))
    console = Console()
    console.print(table)
    for key, value in more.items():
        console.print(f"{key.replace('_', ' ')}: {shown(value)}", highlight=False)
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1) + "\n")
        console.print(f"written to {args.json}", highlight=False)


def shown(value: Any) -> str:
    """A cell: three significant digits for a fraction, thousands separated for a count."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return str(value)
