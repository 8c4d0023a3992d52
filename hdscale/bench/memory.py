"""`hdscale bench memory`: the plan's memory against measured peaks of real training steps under DeepSpeed.

The steps are those of a run: its model, engine, backend and `train.compile`, batches from a feed, one pass per step.
On a CPU five tiny shapes, from the allocator's events (`hdscale.bench.allocations`); on a GPU base and large, from the
caching allocator. What a GPU needs besides tensors (context, libraries) is in neither number.
"""

from __future__ import annotations

import gc
import logging
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from hdscale.bench.allocations import mark, track_cpu
from hdscale.bench.engine_step import random_engine
from hdscale.bench.options import MemoryOptions
from hdscale.bench.report import publish
from hdscale.config import Config, load_config
from hdscale.data.batches import Row, collate
from hdscale.data.feed import Feed
from hdscale.data.micro_batches import deal
from hdscale.engine.deepspeed_engine import Engine
from hdscale.engine.environment import read_environment
from hdscale.engine.ranks import Ranks
from hdscale.engine.tuning import choose_backend, compile_for_training
from hdscale.errors import UserError
from hdscale.modeling.model import AdaptedModel
from hdscale.runs.settled import Settled
from hdscale.study.inputs import architecture, counted, work_of
from hdscale.study.memory_model import Memory, Sharding, step_memory

logger = logging.getLogger("hdscale.bench")

STEPS = 3
"""The last one is measured: the first creates AdamW's moments."""


@dataclass(frozen=True)
class Case:
    """A shape: B rows of S source and T target tokens, all full, and the settings of the run."""

    name: str
    rows: int
    source: int
    target: int
    settings: tuple[str, ...]


SMALL = ("method.encoder.dim=16", "method.decoder.dim=16", "method.hypernet.bottleneck=16")
CPU_CASES = (
    Case("labels, fp32", 48, 48, 4, ("model.name=tiny-2", "train.dtype=fp32", *SMALL)),
    Case("bf16, no dropout", 48, 48, 8, ("model.name=tiny-4", "train.dtype=bf16", "model.dropout=0.0", *SMALL)),
    Case("long source, learned adapters", 8, 160, 8, ("model.name=tiny-4", "train.dtype=bf16", "method.name=adapter")),
    Case("recomputed, large hypernetwork", 16, 64, 16, ("model.name=tiny-4", "train.dtype=fp32",
         "model.activation_checkpointing=all")),
    Case("generated adapters kept", 64, 16, 12, ("model.name=tiny-2", "train.dtype=bf16",
         "method.backend=torch", "method.hypernet.bottleneck=32")),
)  # fmt: skip
GPU_CASES = (
    Case("GLUE, base", 64, 128, 16, ("model.name=t5-v1_1-base",)),
    Case("GLUE, large", 64, 128, 16, ("model.name=t5-v1_1-large",)),
    Case("MRQA, base", 16, 512, 64, ("model.name=t5-v1_1-base", "method.encoder.dim=512",
         "method.decoder.dim=36", "method.hypernet.bottleneck=72")),
    Case("long, large, recomputed", 32, 512, 128, ("model.name=t5-v1_1-large", "model.activation_checkpointing=all")),
)  # fmt: skip


def config_of(case: Case) -> Config:
    """The run's configuration of a case."""
    return load_config(
        None,
        [
            "data.tasks=[quickstart]", f"data.max_source_length={case.source}", f"data.max_target_length={case.target}",
            f"train.global_batch_size={case.rows}", f"train.micro_batch_size={case.rows}", *case.settings,
        ],
    )  # fmt: skip


def predicted(case: Case, device: str) -> Memory:
    """The plan's memory of a case on one rank, without workspace."""
    config = config_of(case)
    count, sides, heads = counted(config)
    work = work_of(config, case.rows, device, sides)
    return step_memory(architecture(config), work, Sharding(1, 2), count.base, count.trainable, heads, workspace=0.0)


def rows_of(case: Case, vocabulary: int) -> list[Row]:
    """Random rows of the greatest lengths, but for one of half as many source tokens: some padding."""
    generator = torch.Generator().manual_seed(0)
    sources = torch.randint(3, vocabulary, (case.rows, case.source), generator=generator).tolist()
    targets = torch.randint(3, vocabulary, (case.rows, case.target), generator=generator).tolist()
    sources[0] = sources[0][: case.source // 2]
    return [Row(*pair, 0, str(number), "bench") for number, pair in enumerate(zip(sources, targets, strict=True))]


def settle(engine: Engine, rows: list[Row]) -> None:
    """Choose the backend and compile, as a run does before its first step."""
    with tempfile.TemporaryDirectory() as folder:
        settled = Settled(Path(folder) / "settled.json", engine.ranks)
        choose_backend(cast(AdaptedModel, engine.module), settled, logger)
        compile_for_training(engine, engine.train.compile, [collate(rows, 0)], settled, logger)


def measured(case: Case, ranks: Ranks) -> int:
    """Most bytes that PyTorch has allocated at any moment of the last step, the model included."""
    config = config_of(case)
    rows = rows_of(case, architecture(config).vocabulary)
    train = config.train
    on_gpu = ranks.device.type == "cuda"
    peaks: list[int] = []

    def work() -> None:
        with random_engine(config, ranks) as engine:
            settle(engine, rows)
            steps(engine)

    def steps(engine: Engine) -> None:
        with Feed(
            lambda step: rows,
            lambda batch: deal(batch, ranks.world_size, train.micro_batch_size, train.sort_by_length)[ranks.rank],
            0,
            0,
            STEPS,
            pin=on_gpu,
        ) as feed:
            for step in range(STEPS):
                # DeepSpeed leaves cycles behind: what only they hold is garbage, and not the step's
                gc.collect()
                if on_gpu:
                    torch.cuda.reset_peak_memory_stats()
                batches = feed.next().micro_batches
                with mark(f"step {step}"):
                    pass
                engine.train_step(batches).result()
        if on_gpu:
            peaks.append(torch.cuda.max_memory_allocated())
        with mark("end"):
            pass

    if on_gpu:
        work()
        return peaks[0]
    return track_cpu(work).peaks[f"step {STEPS - 1}"]


def compare(ranks: Ranks, only: str | None = None) -> list[dict[str, Any]]:
    """Every case for this device, or those whose name contains `only`: plan, measurement, error."""
    rows = []
    for case in GPU_CASES if ranks.device.type == "cuda" else CPU_CASES:
        if only and only not in case.name:
            continue
        plan = predicted(case, ranks.device.type)
        peak = measured(case, ranks)
        rows.append(
            {
                "case": case.name,
                "shape": f"{case.rows} x ({case.source} + {case.target})",
                "settings": " ".join(case.settings),
                "plan_mb": round(plan.peak / 1e6, 3),
                "measured_mb": round(peak / 1e6, 3),
                "error_percent": round(100 * (plan.peak / peak - 1), 2),
                "moment": plan.moment,
            }
        )
    return rows


def run(options: MemoryOptions) -> None:
    """Measure the cases, and compare with the plan."""
    ranks = Ranks.start(read_environment(os.environ), None)
    try:
        rows = compare(ranks, options.only)
    finally:
        ranks.close()
    if not rows:
        raise UserError(f"--only {options.only}: no case has this word in its name")
    title = f"memory of a training step on {ranks.device.type}: plan against measurement"
    publish(title, rows, options, ranks.device)
