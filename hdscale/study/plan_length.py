"""How long a run is, from the sizes of the full data: optimizer steps, and hours of evaluation."""

from __future__ import annotations

import math

from hdscale.config import Config
from hdscale.data.tasks import expand_tasks
from hdscale.data.tasks.sizes import TABLE_10, TABLE_11, TABLE_12
from hdscale.study import compute
from hdscale.study.compute import Flops
from hdscale.study.hardware import Device
from hdscale.study.memory_model import Architecture

DECODING_BATCH = 256
"""Rows that greedy decoding is assumed to decode at once."""


def steps_of(config: Config) -> int | None:
    """Optimizer steps of the run; None where they depend on the size of data that the package does not know."""
    if config.train.epochs is None:
        return config.train.max_steps
    rows = full_rows(config, "train")
    return None if rows is None else math.ceil(config.train.epochs * rows / config.train.global_batch_size)


def full_rows(config: Config, split: str) -> int | None:
    """Rows of a split of all tasks at full size (Tables 10-12); None where a task is not in these tables."""
    total = 0
    for task in expand_tasks(config.data.tasks, config.data):
        known = next((table[task.name] for table in (TABLE_10, TABLE_11, TABLE_12) if task.name in table), None)
        if known is None:
            return None
        total += known.get(split, 0)
    return total


def evaluation_hours(
    config: Config, base: Architecture, flops: Flops, gpu: Device, gpus: int, efficiency: float, steps: int | None
) -> float | None:
    """Hours of all evaluations: the encoder's pass and greedy decoding up to the target limit.

    For labels, which are short, this is an upper bound. None where the number of rows or steps is unknown.
    """
    rows, test = full_rows(config, "validation"), full_rows(config, "test")
    if rows is None or test is None or steps is None:
        return None
    if config.eval.limit is not None:
        rows = min(rows, config.eval.limit * len(expand_tasks(config.data.tasks, config.data)))
    times = steps // config.eval.every if config.eval.every else 0
    total = times * rows + test + (rows if config.eval.select != "last" and not times else 0)
    e = 2 if config.train.dtype == "bf16" else 4
    encoder = compute.seconds_of(total * flops.encoder, gpu, config.train.dtype, efficiency)
    decoding = compute.decoding_seconds(base, total, config.data.max_target_length, DECODING_BATCH, e, gpu)
    return (encoder + decoding) / gpus / 3600
