"""Plans of several runs: the paper's own, and all sizes of T5 v1.1 on several machines."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from hdscale.config import Config, load_config
from hdscale.study.hardware import DEVICES
from hdscale.study.planner import Plan, make_plan

SIZES = ("small", "base", "large", "xl", "xxl")
MACHINES = (("a100-40gb", 1), ("a100-80gb", 1), ("a100-40gb", 8), ("a100-80gb", 8))

PAPER_HOURS = {
    "GLUE, T5-large": 18.0,
    "MRQA, T5-base": 13.0,
    "summarisation + NLI, T5-base": 22.5,
}
"""Appendix B: hours on one A100-80GB, preprocessing and all evaluation included."""

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


@dataclass(frozen=True)
class SizeRow:
    """How one size of T5 v1.1 fits one machine: what `hdscale plan --sizes --json` prints."""

    size: str
    gpu: str
    gpus: int
    fits: bool
    stage: int
    offload: bool
    checkpointing: str
    micro_batch_size: int
    peak_gb: float
    frozen_gb: float
    gpu_hours: float | None


def paper_plans() -> list[tuple[str, float, Plan]]:
    """(run, the paper's hours, the plan) of the paper's three trainings on one A100-80GB."""
    return [
        (name, hours, make_plan(load_config(None, list(PAPER_RUNS[name])), DEVICES["a100-80gb"], 1))
        for name, hours in PAPER_HOURS.items()
    ]


def size_rows(config: Config, efficiency: float) -> list[SizeRow]:
    """All sizes of T5 v1.1 on all of `MACHINES`, with this run's method and lengths."""
    rows = []
    for size in SIZES:
        model = dataclasses.replace(config.model, name=f"t5-v1_1-{size}", revision=None)
        sized = dataclasses.replace(config, model=model)
        for gpu, gpus in MACHINES:
            plan = make_plan(sized, DEVICES[gpu], gpus, efficiency)
            rows.append(
                SizeRow(
                    size=size,
                    gpu=gpu,
                    gpus=gpus,
                    fits=plan.fits,
                    stage=plan.stage,
                    offload=plan.offload,
                    checkpointing=plan.checkpointing,
                    micro_batch_size=plan.micro_batch_size,
                    peak_gb=round(plan.memory.peak / 1e9, 2),
                    frozen_gb=round(plan.memory.frozen / 1e9, 2),
                    gpu_hours=None if plan.gpu_hours is None else round(plan.gpu_hours, 2),
                )
            )
    return rows
