"""The plan's predictions for a run that is done, which the report shows beside what was measured."""

from __future__ import annotations

import dataclasses
from typing import Any

from hdscale.config import Config, config_from_dict
from hdscale.study import compute
from hdscale.study.hardware import match_device
from hdscale.study.inputs import architecture, counted, work_of
from hdscale.study.memory_model import Architecture, Sharding, Work, step_memory
from hdscale.study.rows import Forecast
from hdscale.study.spec import nested


def predict_run(config: dict[str, Any], results: dict[str, Any]) -> Forecast:
    """The plan's figures for a run that is done.

    FLOPs are counted at the mean length of the rows that the run saw, memory at the greatest. Throughput and memory are
    predicted for the GPUs that the plan has figures for only: the memory that a run on a CPU logs is that of its whole
    process, which the plan does not describe.

    Args:
        config: flat. results: `results.json`.
    """
    provenance = results.get("provenance", {})
    ranks = int(provenance.get("world_size") or 1)
    whole = to_config(config)
    mean = results["tokens"] / max(results["samples"], 1)
    relevant = {key: repr(value) for key, value in config.items() if key.startswith(("model.", "method.", "data."))}
    flops_row = mean_row_flops(tuple(sorted(relevant.items())), whole, mean)
    found = Forecast(flops=flops_row * results["samples"])
    device = match_device(str(provenance.get("device") or ""))
    if device is not None:
        seconds = compute.seconds_of(flops_row, device, whole.train.dtype, compute.EFFICIENCY)
        count, sides, heads = counted(whole)
        rows = rows_of_a_pass(whole, ranks)
        memory = step_memory(
            architecture(whole),
            work_of(whole, rows, "cuda", sides),
            Sharding(ranks, 2),
            count.base,
            count.trainable,
            heads,
        )
        found = dataclasses.replace(
            found,
            planned_samples_per_second=ranks / seconds,
            planned_memory_gb=(memory.peak - memory.workspace) / 1e9,
        )
    return found


def rows_of_a_pass(config: Config, ranks: int) -> int:
    """Rows of a micro-batch of the longest rows, which need the most memory."""
    rows = -(-config.train.global_batch_size // ranks)
    if config.train.micro_batch_size:
        rows = min(rows, config.train.micro_batch_size)
    budget = config.train.tokens_per_micro_batch
    if budget and budget.isdigit():
        rows = min(rows, max(1, int(budget) // (config.data.max_source_length + config.data.max_target_length)))
    return rows


_CACHE: dict[tuple[tuple[str, str], ...], tuple[Architecture, Work]] = {}
"""Shapes of the models that were seen: the runs of a study differ in little else than seeds."""


def mean_row_flops(key: tuple[tuple[str, str], ...], config: Config, mean: float) -> float:
    """Training FLOPs of a row with a mean number of tokens, source and target in the proportion of their limits."""
    if key not in _CACHE:
        _, sides, _ = counted(config)
        _CACHE[key] = (architecture(config), work_of(config, 1, "cuda", sides))
    base, work = _CACHE[key]
    share = config.data.max_source_length / (config.data.max_source_length + config.data.max_target_length)
    work = dataclasses.replace(work, source=max(1, round(mean * share)), target=max(1, round(mean * (1 - share))))
    return compute.row_flops(base, work, config.method.hypernet.bottleneck if work.generated else 0).training


def to_config(flat: dict[str, Any]) -> Config:
    """A configuration of dotted keys."""
    return config_from_dict(nested(flat), "the run's configuration")
