"""Passes of a built engine that leave no trace: what a size or a compiler is worth is tried out before the first step."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from hdscale.engine.deepspeed_engine import Batch, Engine, loss_of


def one_pass(engine: Engine, batch: Batch) -> None:
    """Forward and backward; the gradients are thrown away before anyone sees them. ZeRO stages 1 and 2."""
    engine.module.train()
    moved = {name: tensor.to(engine.ranks.device) for name, tensor in batch.items()}
    # not `backward`: it would set off DeepSpeed's reductions
    torch.autograd.grad(loss_of(engine.module(**moved)), list(engine.parameters.values()), allow_unused=True)


def seconds_of_passes(engine: Engine, batches: Sequence[Batch]) -> float:
    """Seconds of one pass over each, all ranks at once and the device's work included."""
    engine.ranks.barrier()
    synchronize(engine)
    start = time.perf_counter()
    for batch in batches:
        one_pass(engine, batch)
    synchronize(engine)
    return time.perf_counter() - start


def synchronize(engine: Engine) -> None:
    """Wait for the device."""
    if engine.ranks.device.type == "cuda":
        torch.cuda.synchronize()
