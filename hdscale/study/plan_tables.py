"""What `hdscale plan` prints."""

from __future__ import annotations

import json

from rich.console import Console
from rich.table import Table

from hdscale.config import Config, load_config
from hdscale.errors import EXIT_DONE
from hdscale.study.hardware import DEVICES
from hdscale.study.plan import PAPER_HOURS, Plan, gb, make_plan

SIZES = ("small", "base", "large", "xl", "xxl")
MACHINES = (("a100-40gb", 1), ("a100-80gb", 1), ("a100-40gb", 8), ("a100-80gb", 8))

PAPER_RUNS = {
    "GLUE, T5-large": (
        "model.name=t5-v1_1-large", "data.tasks=[glue]", "train.max_steps=65536", "train.global_batch_size=128",
        "data.max_source_length=128", "data.max_target_length=16", "eval.every=1000", "train.dtype=fp32",
    ),
    "MRQA, T5-base": (
        "model.name=t5-v1_1-base", "data.tasks=[mrqa]", "train.epochs=4", "train.global_batch_size=128",
        "data.max_source_length=512", "data.max_target_length=64", "eval.every=0", "eval.select=last",
        "method.encoder.dim=512", "method.decoder.dim=36", "method.hypernet.bottleneck=72", "train.dtype=fp32",
    ),
    "summarisation + NLI, T5-base": (
        "model.name=t5-v1_1-base", "data.tasks=[summ_nli]", "train.max_steps=100000", "train.global_batch_size=64",
        "data.max_source_length=512", "data.max_target_length=128", "eval.every=5000", "eval.limit=1600",
        "method.encoder.dim=512", "method.decoder.dim=36", "method.hypernet.bottleneck=72", "train.dtype=fp32",
    ),
}  # fmt: skip
"""The paper's three trainings (3.1, 3.2, Appendix B), in fp32 as released."""


def print_plan(plan: Plan, config: Config) -> None:
    """The plan as tables and sentences."""
    console = Console(width=max(100, Console().width), highlight=False)
    memory = plan.memory
    console.print(
        f"{plan.method} on {plan.model}: {plan.parameters:,} parameters, {plan.trainable:,} trainable "
        f"({100 * plan.trainable / plan.parameters:.2f}%); {plan.gpus} x {plan.gpu}"
    )
    table = Table(title=f"memory of a rank, micro-batch {plan.micro_batch_size}", title_justify="left")
    table.add_column("part")
    table.add_column("GB", justify="right")
    for name, value in (
        ("frozen weights", memory.frozen),
        ("trainables, as computed with", memory.trainable),
        ("float32 masters", memory.masters),
        ("AdamW's moments", memory.moments),
        ("standing gradients (ZeRO-1)", memory.accumulation),
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
    console.print(table)
    for one, peak in plan.memory_other_checkpointing.items():
        console.print(f"with activation_checkpointing={one}: {gb(peak)}")
    kept = plan.generated_by_backend
    console.print(
        f"generated adapters kept by the torch backend: {gb(kept['torch'])}; by the compiled ones: {gb(kept['cuda'])}"
    )
    host = f"host memory: {gb(plan.loading_host)} a rank while loading, beside the checkpoint's pages, which the ranks share"
    if plan.offload:
        host += f"; {gb(memory.host)} a rank for the offloaded optimizer"
    console.print(host)
    if plan.fits:
        console.print(
            f"fits with ZeRO-{plan.stage}{' and optimizer offload' if plan.offload else ''}, "
            f"activation_checkpointing={plan.checkpointing}: {plan.gpus} ranks x {plan.micro_batch_size} rows x "
            f"{plan.accumulation} micro-batches make {config.train.global_batch_size}"
        )
    sent = plan.communication
    console.print(
        f"a step: {plan.step_flops / 1e12:,.1f} TFLOP, {plan.step_seconds:.3f} s at {plan.efficiency:.0%} of the dense peak, "
        f"{gb(sent.total)} sent by a rank ({plan.communication_seconds * 1e3:.1f} ms of it)"
    )
    if plan.training_hours is None:
        console.print("a run: its length is unknown before the data are read (train.epochs)")
    else:
        evaluation = (
            "unknown (the data are not the paper's)"
            if plan.evaluation_hours is None
            else f"{plan.evaluation_hours:.2f} h"
        )
        console.print(
            f"a run of {plan.steps:,} steps: {plan.training_hours:.2f} h of training, evaluation {evaluation}; "
            f"{plan.gpu_hours:.2f} GPU-hours. Every row counted at its greatest length: padding-free batches take less"
        )
    for line in plan.advice:
        console.print(f"- {line}")
    console.print(f"run: {plan.command}", soft_wrap=True)
    console.print(paper_table())


def paper_table() -> Table:
    """The paper's three runtimes beside the plan's for the same runs."""
    table = Table(title="the paper's runs on one A100-80GB (Appendix B), fp32 as released", title_justify="left")
    for column in ("run", "paper, h (all included)", "plan: training, h", "evaluation, h"):
        table.add_column(column, justify="left" if column == "run" else "right")
    for name, hours in PAPER_HOURS.items():
        plan = make_plan(load_config(None, list(PAPER_RUNS[name])), DEVICES["a100-80gb"], 1)
        table.add_row(name, f"{hours:g}", number(plan.training_hours), number(plan.evaluation_hours))
    return table


def number(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def print_sizes(config: Config, efficiency: float, as_json: bool) -> int:
    """Which sizes of T5 v1.1 fit which machines, with this run's method and lengths."""
    import dataclasses

    rows = []
    for size in SIZES:
        sized = dataclasses.replace(
            config, model=dataclasses.replace(config.model, name=f"t5-v1_1-{size}", revision=None)
        )
        for gpu, gpus in MACHINES:
            plan = make_plan(sized, DEVICES[gpu], gpus, efficiency)
            rows.append(
                {
                    "size": size, "gpu": gpu, "gpus": gpus, "fits": plan.fits, "stage": plan.stage, "offload": plan.offload,
                    "checkpointing": plan.checkpointing, "micro_batch_size": plan.micro_batch_size,
                    "peak_gb": round(plan.memory.peak / 1e9, 2), "frozen_gb": round(plan.memory.frozen / 1e9, 2),
                    "gpu_hours": None if plan.gpu_hours is None else round(plan.gpu_hours, 2),
                }
            )  # fmt: skip
    if as_json:
        print(json.dumps(rows, indent=2))
        return EXIT_DONE
    table = Table(title=f"{config.method.name}, {config.data.max_source_length}+{config.data.max_target_length} tokens, batch "
                  f"{config.train.global_batch_size}", title_justify="left")  # fmt: skip
    table.add_column("T5 v1.1")
    for gpu, gpus in MACHINES:
        table.add_column(f"{gpus} x {gpu}")
    for size in SIZES:
        cells = []
        for row in (row for row in rows if row["size"] == size):
            if not row["fits"]:
                cells.append(f"no: {row['peak_gb']} GB")
                continue
            extras = [f"ZeRO-{row['stage']}"] + (["offload"] if row["offload"] else [])
            extras += [f"recompute {row['checkpointing']}"] if row["checkpointing"] != "none" else []
            cells.append(f"{row['micro_batch_size']} rows, {row['peak_gb']} GB\n{', '.join(extras)}")
        table.add_row(size, *cells)
    Console(width=max(120, Console().width)).print(table)
    return EXIT_DONE
