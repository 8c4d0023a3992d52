"""Training steps of real size with random weights: as they are, and compiled or packed (`compiled.py`)."""

from __future__ import annotations

import math
import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from hdscale.bases.interface import Base
from hdscale.bench.engine_step import counted_flops, glue_batch, measure_step, random_engine, step_config
from hdscale.bench.timing import matmul_peak
from hdscale.doctor.gpu.lines import Finding, Lines, Wrong
from hdscale.engine.environment import Launch
from hdscale.engine.ranks import Ranks

SIZES = ("t5-v1_1-base", "t5-v1_1-large")
ROWS, TOKENS = 128, 16384
"""Rows of a step, and most tokens of a pass."""
STEPS = 8


def examine(lines: Lines, work: Path) -> None:
    """The checks of the stage `step`."""
    ranks = alone()
    peak = peak_of(lines, ranks)
    for size in SIZES:
        measured = None
        with ExitStack() as held:
            with lines.check(f"{size}, eager") as found:
                batches = glue_batch(size, ROWS, TOKENS)
                engine = held.enter_context(random_engine(step_config(size), ranks))
                measured = measure_step(engine, batches, STEPS)
                describe(found, size, "eager", measured)
            if measured:
                # last: the counter looks into every operation, and may meet one that it cannot take
                with lines.check(f"{size}, eager, MFU") as found:
                    describe_mfu(found, counted_flops(engine, batches), measured, peak)
    ranks.close()


def alone() -> Ranks:
    """This process as the only rank, on the first GPU."""
    return Ranks.start(Launch("none"))


def peak_of(lines: Lines, ranks: Ranks) -> float:
    """What large matrix products reach in bf16, FLOP/s; a line of its own."""
    peak = float("nan")
    with lines.check("matrix products in bf16") as found:
        peak = matmul_peak(torch.bfloat16, ranks.device)
        found.say(f"{peak / 1e12:.0f} TFLOP/s", flops=peak)
    return peak


def describe(found: Finding, size: str, way: str, measured: dict[str, Any]) -> None:
    """A measured step in words and as a row of the table.

    Raises:
        Wrong: if its loss is no number.
    """
    seconds, count = measured["seconds"], measured["launches"]
    row = {
        "model": size,
        "way": way,
        "rows": ROWS,
        "ms_per_step": 1e3 * seconds,
        "samples/s": ROWS / seconds,
        "host_ms": 1e3 * measured["host_seconds"],
        "launches": count,
        "peak_gb": measured["peak_gb"],
    }
    found.say(
        f"{row['samples/s']:.0f} samples/s, {row['ms_per_step']:.1f} ms per step of {ROWS} rows, host "
        f"{row['host_ms']:.1f} ms, {'launches not seen' if count is None else f'{count:,} launches'}, "
        f"{row['peak_gb']:.1f} GB",
        table=[row],
        loss=measured["loss"],
        load_average=os.getloadavg()[0],
    )
    if not math.isfinite(measured["loss"]):
        raise Wrong(f"the loss is {measured['loss']}; {found.detail}")


def describe_mfu(found: Finding, flops: int, measured: dict[str, Any], peak: float) -> None:
    """The share of the measured matrix-product peak that a step's products reach."""
    share = flops / measured["seconds"] / peak
    found.say(f"{share:.1%} of the speed of large matrix products, {flops / 1e12:.2f} TFLOP per step", mfu=share)


def base_of(module: torch.nn.Module) -> Base:
    """The base within the model that an engine trains."""
    base = module.get_submodule("base")
    assert isinstance(base, Base)
    return base
