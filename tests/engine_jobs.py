"""What the engine's tests run on the ranks."""

from __future__ import annotations

from typing import Any

from hdscale.engine.deepspeed_engine import build_engine
from hdscale.engine.distributed import Ranks
from tests.toy import BATCH, ToyModel, micro_batches, settings


def train(ranks: Ranks, steps: int, micro: int = BATCH, dropout: float = 0.1, **config: Any) -> dict[str, Any]:
    """Losses and final masters of a few steps."""
    engine = build_engine(ToyModel(dropout), settings(**config), ranks)
    results = [engine.train_step(micro_batches(step, ranks.rank, ranks.world_size, micro)) for step in range(steps)]
    masters = dict(engine.trainable_tensors())
    engine.close()
    return {"losses": [result.loss for result in results], "masters": masters, "norms": [r.grad_norm for r in results]}
