"""`hdscale params`: parameters by part, counted on the meta device, and the trainable share."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from hdscale.analysis.paper import PaperRow, PaperTable, config_path, paper_tables, trained_rows
from hdscale.config import load_config
from hdscale.errors import UserError
from hdscale.modeling.config import HyperdecoderConfig
from hdscale.modeling.model import AdaptedModel, build_model
from hdscale.resolve import resolve_model


@dataclass
class ParameterCount:
    """Parameters of an adapted model.

    Attributes:
        base: of the base alone: what full fine-tuning trains (tied weights counted once).
        trainable: what the method trains.
        percent: 100 * trainable / base, as in the paper's tables.
        parts: trainable parameters by part of the method.
        base_parts: the base's parameters by part.
    """

    model: str
    method: str
    base: int
    trainable: int
    percent: float
    parts: dict[str, int]
    base_parts: dict[str, int]


def count_parameters(model: AdaptedModel) -> ParameterCount:
    """Count a built model's parameters (on any device, meta included)."""
    base = sum(parameter.numel() for parameter in model.base.parameters())
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    parts = model.method.parts()
    rest = trainable - sum(parts.values())
    if rest:
        parts["base"] = rest
    seen: set[int] = set()
    base_parts = {}
    for name in ("shared", "encoder", "decoder", "lm_head"):
        own = [p for p in getattr(model.base, name).parameters() if id(p) not in seen]
        seen |= {id(p) for p in own}
        base_parts["embeddings" if name == "shared" else name] = sum(p.numel() for p in own)
    return ParameterCount(
        model.config.model.name,
        model.config.method.name,
        base,
        trainable,
        100.0 * trainable / base,
        parts,
        base_parts,
    )


def count_for(config: HyperdecoderConfig) -> ParameterCount:
    """Count without memory or weights, in seconds at any size."""
    return count_parameters(build_model(config, dtype=torch.float32, device="meta"))


def count_paper_rows(keys: Sequence[str]) -> list[tuple[PaperTable, PaperRow, ParameterCount]]:
    """Counts of every trained row of the paper's tables; rows with the same model are counted once."""
    counts: dict[str, ParameterCount] = {}
    rows = []
    for table, row in trained_rows(keys):
        config = resolve_model(load_config(config_path(row.config)))
        known = json.dumps(config.to_dict(), sort_keys=True)
        if known not in counts:
            counts[known] = count_for(config)
        rows.append((table, row, counts[known]))
    return rows


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from hdscale.commands.arguments import add_config_arguments

    add_config_arguments(parser, required=False)
    parser.add_argument(
        "--all", action="store_true", help="the percentage column of Tables 1-3, 13, 14 and 16, row by row"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    if args.all:
        if args.config or args.overrides:
            raise UserError("params --all counts the rows of configs/paper; leave --config and key=value out")
        return print_paper_rows(args.json)
    if args.config is None:
        raise UserError("give --config FILE, or --all for the rows of the paper's tables")
    count = count_for(resolve_model(load_config(args.config, args.overrides)))
    if args.json:
        print(json.dumps(asdict(count), indent=2))
    else:
        print_count(count)
    return 0


def print_count(count: ParameterCount) -> None:
    """One model's parameters by part."""
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
    table.add_row("base, all of it", f"{count.base:,}", "100.00")
    table.add_row("trainable", f"{count.trainable:,}", f"{count.percent:.3f}")
    Console().print(table)


def print_paper_rows(as_json: bool) -> int:
    """The share of trainable parameters of every row that the paper trains, beside the printed one."""
    rows = count_paper_rows([key for key, table in paper_tables().items() if any(row.percent for row in table.rows)])
    if as_json:
        found = [
            {"table": table.key, "row": row.name, "config": row.config, "paper": row.percent, "trainable": count.trainable,
             "percent": count.percent, "note": row.percent_note}
            for table, row, count in rows
        ]  # fmt: skip
        print(json.dumps(found, indent=2))
        return 0
    printed = Table(title="Trainable parameters, % of the fully fine-tuned base")
    for header, justify in (
        ("table", "left"),
        ("row", "left"),
        ("trainable", "right"),
        ("exact %", "right"),
        ("paper", "right"),
    ):
        printed.add_column(header, justify=justify)
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
        paper = "" if row.percent is None else f"{row.percent:g}"
        printed.add_row(
            "" if last == table.key else table.key,
            row.name,
            f"{count.trainable:,}",
            f"{count.percent:.3f}",
            escape(paper + mark),
        )
        last = table.key
    console = Console()
    console.print(printed)
    for number, note in enumerate(notes, 1):
        console.print(escape(f"[{number}] {note}"))
    return 0
