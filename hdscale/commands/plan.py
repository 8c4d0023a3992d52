"""`hdscale plan`: memory, time and communication of a run, before it costs a GPU hour (formulas: docs/plan.md)."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

from rich.console import Console
from rich.table import Table

from hdscale.commands.arguments import add_config_arguments
from hdscale.config import Config, load_config
from hdscale.errors import EXIT_DONE, UserError
from hdscale.study.compute import EFFICIENCY
from hdscale.study.hardware import DEVICES, find_device
from hdscale.study.plan_tables import MACHINES, SIZES, SizeRow, paper_plans, size_rows
from hdscale.study.planner import Plan, gb, make_plan


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    add_config_arguments(parser, required=False)
    parser.add_argument("--gpu", default="a100-80gb", help=f"one of {', '.join(DEVICES)} (default: a100-80gb)")
    parser.add_argument("--gpus", type=int, default=1, metavar="N", help="GPUs in all (default: 1)")
    parser.add_argument(
        "--efficiency",
        type=float,
        default=EFFICIENCY,
        help="assumed share of the GPU's dense peak (default: 0.35)",
    )
    parser.add_argument(
        "--sizes", action="store_true", help="which sizes fit one A100-40, one A100-80 and eight of them"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """The verb."""
    if args.gpus < 1:
        raise UserError(f"--gpus {args.gpus}: at least one")
    if not 0.0 < args.efficiency <= 1.0:
        raise UserError(f"--efficiency {args.efficiency}: must be above 0 and at most 1")
    if not args.config:
        raise UserError("which run? name it with --config FILE (configs/)")
    config = load_config(args.config, args.overrides)
    if args.sizes:
        rows = size_rows(config, args.efficiency)
        if args.json:
            print(json.dumps([asdict(row) for row in rows], indent=2))
        else:
            print_sizes(config, rows)
        return EXIT_DONE
    plan = make_plan(config, find_device(args.gpu), args.gpus, args.efficiency)
    plan.command = plan.command.replace("FILE", " ".join([args.config, *args.overrides]))
    if args.json:
        tree = asdict(plan)
        tree["memory"] |= {
            "peak": plan.memory.peak,
            "moment": plan.memory.moment,
            "moments": plan.memory.moments_of_peak,
        }
        print(json.dumps(tree, indent=2))
    else:
        print_plan(plan, config)
    return EXIT_DONE


def print_plan(plan: Plan, config: Config) -> None:
    """The plan as tables and sentences."""
    console = Console(width=max(100, Console().width), highlight=False)
    console.print(
        f"{plan.method} on {plan.model}: {plan.parameters:,} parameters, {plan.trainable:,} trainable "
        f"({100 * plan.trainable / plan.parameters:.2f}%); {plan.gpus} x {plan.gpu}"
    )
    console.print(memory_table(plan))
    for line in memory_lines(plan, config):
        console.print(line)
    for line in time_lines(plan):
        console.print(line)
    for line in plan.advice:
        console.print(f"- {line}")
    console.print(f"run: {plan.command}", soft_wrap=True)
    console.print(paper_table())


def memory_table(plan: Plan) -> Table:
    """The memory of a rank by part."""
    memory = plan.memory
    table = Table(title=f"memory per rank, micro-batch {plan.micro_batch_size}", title_justify="left")
    table.add_column("part")
    table.add_column("GB", justify="right")
    for name, value in (
        ("frozen weights", memory.frozen),
        ("trainables, as computed with", memory.trainable),
        ("float32 masters", memory.masters),
        ("AdamW's moments", memory.moments),
        ("gradients kept between steps (ZeRO-1)", memory.accumulation),
    ):
        table.add_row(name, f"{value / 1e9:.3f}")
    table.add_section()
    for name, value in (
        ("activations of the encoder", memory.encoder),
        ("activations of the decoder", memory.decoder),
        ("generated adapters kept", memory.generated),
        ("loss over the vocabulary", memory.loss),
        ("gradients and reduction", memory.gradients),
        ("AdamW's temporaries", memory.update),
    ):
        table.add_row(name, f"{value / 1e9:.3f}")
    table.add_section()
    table.add_row("workspace: context, libraries, fragmentation", f"{memory.workspace / 1e9:.3f}")
    table.add_row(f"peak, at the {memory.moment}", f"{memory.peak / 1e9:.3f}", style="bold")
    return table


def memory_lines(plan: Plan, config: Config) -> list[str]:
    """What else there is to say about memory."""
    lines = [
        f"with activation_checkpointing={one}: {gb(peak)}" for one, peak in plan.memory_other_checkpointing.items()
    ]
    kept = plan.generated_by_backend
    lines.append(
        f"generated adapters kept by the torch backend: {gb(kept['torch'])}; by the compiled ones: {gb(kept['cuda'])}"
    )
    host = (
        f"host memory: {gb(plan.loading_host)} per rank while loading, besides the checkpoint's pages, "
        "which the ranks share"
    )
    if plan.offload:
        host += f"; {gb(plan.memory.host)} per rank for the offloaded optimizer"
    lines.append(host)
    if plan.fits:
        lines.append(
            f"fits with ZeRO-{plan.stage}{' and optimizer offload' if plan.offload else ''}, "
            f"activation_checkpointing={plan.checkpointing}: {plan.gpus} ranks x {plan.micro_batch_size} rows x "
            f"{plan.accumulation} micro-batches make {config.train.global_batch_size}"
        )
    return lines


def time_lines(plan: Plan) -> list[str]:
    """How long a step and the run take."""
    step = (
        f"per step: {plan.step_flops / 1e12:,.1f} TFLOP, {plan.step_seconds:.3f} s at {plan.efficiency:.0%} of the "
        f"dense peak, {gb(plan.communication.total)} sent per rank ({plan.communication_seconds * 1e3:.1f} ms of it)"
    )
    if plan.training_hours is None:
        return [step, "the run: its length is unknown before the data are read (train.epochs)"]
    evaluation = (
        "unknown (the data are not the paper's)" if plan.evaluation_hours is None else f"{plan.evaluation_hours:.2f} h"
    )
    return [
        step,
        f"the run of {plan.steps:,} steps: {plan.training_hours:.2f} h of training, evaluation {evaluation}; "
        f"{plan.gpu_hours:.2f} GPU-hours. Every row is counted at its greatest length: "
        "batches without padding take less",
    ]


def paper_table() -> Table:
    """The hours of the paper's three trainings, with the plan's for the same runs."""
    table = Table(title="the paper's runs on one A100-80GB (Appendix B), fp32 as released", title_justify="left")
    for column in ("run", "paper, h (all included)", "plan: training, h", "evaluation, h"):
        table.add_column(column, justify="left" if column == "run" else "right")
    for name, hours, plan in paper_plans():
        table.add_row(name, f"{hours:g}", hours_text(plan.training_hours), hours_text(plan.evaluation_hours))
    return table


def hours_text(value: float | None) -> str:
    """Hours with one decimal; nothing where they are unknown."""
    return "" if value is None else f"{value:.1f}"


def print_sizes(config: Config, rows: list[SizeRow]) -> None:
    """Which sizes of T5 v1.1 fit which machines."""
    lengths = f"{config.data.max_source_length}+{config.data.max_target_length} tokens"
    title = f"{config.method.name}, {lengths}, batch {config.train.global_batch_size}"
    table = Table(title=title, title_justify="left")
    table.add_column("T5 v1.1")
    for gpu, gpus in MACHINES:
        table.add_column(f"{gpus} x {gpu}")
    for size in SIZES:
        table.add_row(size, *(size_cell(row) for row in rows if row.size == size))
    Console(width=max(120, Console().width)).print(table)


def size_cell(row: SizeRow) -> str:
    """How a size fits a machine."""
    if not row.fits:
        return f"no: {row.peak_gb} GB"
    extras = [f"ZeRO-{row.stage}"] + (["offload"] if row.offload else [])
    extras += [f"recompute {row.checkpointing}"] if row.checkpointing != "none" else []
    return f"{row.micro_batch_size} rows, {row.peak_gb} GB\n{', '.join(extras)}"
