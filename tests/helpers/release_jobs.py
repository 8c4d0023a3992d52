"""What tests/test_release.py runs on a rank: training on the release's side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from hdscale.config import load_config
from hdscale.engine.deepspeed_config import resolve_deepspeed_config
from hdscale.engine.deepspeed_engine import build_engine
from hdscale.engine.ranks import Ranks
from hdscale.modeling import build_model
from tests.helpers.adapted import SIZES, method_config, random_batch

STEPS, WARMUP, ROWS = 20, 5, 3
FIRST_SEED = 200


def batch_of(step: int) -> dict[str, torch.Tensor]:
    """The rows of a step; from batches in which no ReLU is so close to its edge that rounding decides its side."""
    return random_batch(seed=FIRST_SEED + step)


def train(ranks: Ranks, base: str, overrides: list[str]) -> dict[str, Any]:
    """20 steps of a tiny hyperdecoder with `release: true`: its weights before and after, losses and norms."""
    settings = [f"train.max_steps={STEPS}", f"train.warmup_steps={WARMUP}", f"train.global_batch_size={ROWS}"]
    config = load_config(None, ["release=true", *settings, *overrides])
    model = build_model(method_config(Path(base), **SIZES), label_smoothing=config.train.label_smoothing)
    deepspeed = resolve_deepspeed_config(config.deepspeed, config.train, ranks.world_size)
    engine = build_engine(model, config.train, deepspeed, ranks, config.run.seed)
    before = {name: tensor.clone() for name, tensor in engine.trainable_tensors()}
    done = []
    for step in range(STEPS):
        batch = batch_of(step)
        micro_batches = [{name: rows[part] for name, rows in batch.items()} for part in (slice(0, 2), slice(2, 3))]
        done.append(engine.train_step(micro_batches).result())
    after = {name: torch.clone(tensor) for name, tensor in engine.trainable_tensors()}
    engine.close()
    return {
        "before": before,
        "after": after,
        "losses": [step.loss for step in done],
        "norms": [step.grad_norm for step in done],
    }
