"""`hdscale params`: parameters by part, counted on the meta device, and the trainable share."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass

import torch
from rich.console import Console
from rich.table import Table

from hdscale.config import load_config, model_config
from hdscale.modeling.config import HyperdecoderConfig
from hdscale.modeling.model import AdaptedModel, build_model


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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from hdscale.cli import add_config_arguments

    add_config_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    count = count_for(model_config(load_config(args.config, args.overrides)))
    if args.json:
        print(json.dumps(asdict(count), indent=2))
        return 0
    table = Table(title=f"{count.method} on {count.model}")
    table.add_column("part")
    table.add_column("parameters", justify="right")
    table.add_column("% of the base", justify="right")
    for name, number in count.base_parts.items():
        table.add_row(f"base: {name} (frozen)", f"{number:,}", f"{100 * number / count.base:.2f}")
    table.add_section()
    for name, number in count.parts.items():
        table.add_row(f"trained: {name}", f"{number:,}", f"{100 * number / count.base:.3f}")
    table.add_section()
    table.add_row("base, all of it", f"{count.base:,}", "100.00")
    table.add_row("trainable", f"{count.trainable:,}", f"{count.percent:.3f}")
    Console().print(table)
    return 0
