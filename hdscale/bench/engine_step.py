"""A training step as a run takes it, under DeepSpeed, with random weights: samples per second, the host's time, the
kernels that it launches, and the share of the device's speed that it reaches.
"""

from __future__ import annotations

import contextlib
import gc
import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from hdscale.bench.options import StepOptions
from hdscale.bench.rows import make_rows
from hdscale.config import Config, load_config
from hdscale.data.batches import collate
from hdscale.data.micro_batches import deal
from hdscale.engine.deepspeed_engine import Batch, Engine, build_engine
from hdscale.engine.ranks import Ranks
from hdscale.modeling.model import build_model
from hdscale.ops.precision import DTYPES
from hdscale.resolve import resolve

LAUNCHES = ("cudaLaunch", "cuLaunch", "cudaGraphLaunch", "hipLaunch", "hipExtLaunch", "hipModuleLaunch")
"""What the calls of the runtime and of the driver that start kernels begin with."""


def step_config(size: str, *settings: str) -> Config:
    """The configuration of a step with Table 1's hyperdecoder on a built-in size."""
    return load_config(None, ["data.tasks=[quickstart]", f"model.name={size}", *settings])


@contextlib.contextmanager
def random_engine(config: Config, ranks: Ranks) -> Iterator[Engine]:
    """The engine of a run on a built-in size; its memory is free again afterwards."""
    resolved = resolve(config, ranks.world_size)
    dtype = DTYPES[config.train.dtype]
    model = build_model(
        resolved.model,
        dtype,
        ranks.device,
        seed=config.run.seed,
        trainable_dtype=torch.float32,
        label_smoothing=config.train.label_smoothing,
    )
    engine = build_engine(model, config.train, resolved.deepspeed, ranks, config.run.seed)
    del model
    try:
        yield engine
    finally:
        engine.close()
        del engine
        gc.collect()
        if ranks.device.type == "cuda":
            torch.cuda.empty_cache()


def glue_batch(size: str, count: int, tokens: int) -> list[Batch]:
    """`count` rows of GLUE's lengths as micro-batches of at most so many tokens, pinned where there is a GPU."""
    rows = make_rows(StepOptions(lengths="glue"), count, size)
    parts = deal(rows, 1, None, True, tokens)[0]
    batches = [collate(part, 0) for part in parts]
    if not torch.cuda.is_available():
        return list(batches)
    return [{name: tensor.pin_memory() for name, tensor in batch.items()} for batch in batches]


def measure_step(engine: Engine, batches: Sequence[Batch], steps: int, warm_up: int = 3) -> dict[str, Any]:
    """Seconds of a step, and of the host; kernels that it launches; peak memory.

    Steps follow one another as in training: the numbers of each are read while the next one runs. For the host's time
    a step begins on an idle device, and the time is that until the call returns.

    Returns:
        `seconds`, `host_seconds`, `launches` (None where the profiler does not see them), `peak_gb`, `loss`.
    """
    for _ in range(warm_up):
        loss = engine.train_step(batches).result().loss
    synchronize(engine)
    on_gpu = engine.ranks.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    began, pending = time.perf_counter(), None
    for _ in range(steps):
        started = engine.train_step(batches)
        if pending is not None:
            pending.result()
        pending = started
    if pending is not None:
        pending.result()
    synchronize(engine)
    seconds = (time.perf_counter() - began) / steps
    return {
        "seconds": seconds,
        "host_seconds": statistics.median(host_seconds(engine, batches) for _ in range(3)),
        "launches": launches(engine, batches) if on_gpu else None,
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9 if on_gpu else None,
        "loss": loss,
    }


def host_seconds(engine: Engine, batches: Sequence[Batch]) -> float:
    """How long the call of a step takes on an idle device."""
    synchronize(engine)
    began = time.perf_counter()
    pending = engine.train_step(batches)
    taken = time.perf_counter() - began
    pending.result()
    return taken


def launches(engine: Engine, batches: Sequence[Batch]) -> int | None:
    """Kernels (and graphs) that a step launches, by the profiler; None where it sees none or is not allowed to."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    try:
        with torch.profiler.profile(activities=activities, acc_events=True) as profiler:
            engine.train_step(batches).result()
            synchronize(engine)
        events = profiler.profiler.kineto_results.events()
    except RuntimeError:
        return None
    return sum(event.name().startswith(LAUNCHES) for event in events) or None


def counted_flops(engine: Engine, batches: Sequence[Batch]) -> int:
    """Floating-point operations of a step's matrix products, counted by torch while it runs."""
    with plain_adapters(engine.module), FlopCounterMode(display=False) as counter:
        engine.train_step(batches).result()
    return counter.get_total_flops()


@contextlib.contextmanager
def plain_adapters(model: nn.Module) -> Iterator[None]:
    """Generated adapters by their plain definition: the counter knows torch's own products only."""
    heads: list[Any] = [module for module in model.modules() if hasattr(module, "backend")]
    before = [module.backend for module in heads]
    for module in heads:
        module.backend = "torch"
    try:
        yield
    finally:
        for module, backend in zip(heads, before, strict=True):
            module.backend = backend


def synchronize(engine: Engine) -> None:
    """Wait for the device."""
    if engine.ranks.device.type == "cuda":
        torch.cuda.synchronize()
