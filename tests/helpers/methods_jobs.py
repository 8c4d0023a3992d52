"""What the methods' tests run on ranks (see tests/helpers/ranks.py)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from hdscale.engine.checkpoint import load_newest_checkpoint, save_checkpoint
from hdscale.engine.deepspeed_engine import Engine
from hdscale.engine.ranks import Ranks
from hdscale.modeling import HyperdecoderConfig, build_model
from tests.helpers.engine_jobs import Recorder
from tests.helpers.toy import settings, toy_engine


def built(config: dict[str, Any], ranks: Ranks) -> Engine:
    model = build_model(HyperdecoderConfig.from_dict(config), seed=7)
    return toy_engine(model, settings(learning_rate=0.01, warmup_steps=1, global_batch_size=4), ranks)


def steps(engine: Engine, batches: list[dict[str, torch.Tensor]], until: int) -> list[float]:
    """Losses of the steps up to `until`, each over one batch in two micro-batches."""
    losses = []
    while engine.step < until:
        batch = batches[engine.step % len(batches)]
        micro = [{name: tensor[part] for name, tensor in batch.items()} for part in (slice(0, 2), slice(2, 4))]
        losses.append(engine.train_step(micro).result().loss)
    return losses


def resume(
    ranks: Ranks, configs: dict[str, dict[str, Any]], batches: list[dict[str, torch.Tensor]], folder: str
) -> dict[str, dict[str, Any]]:
    """For each method: four steps with dropout without a break, and the last two again from the checkpoint between."""
    found = {}
    for number, (name, config) in enumerate(configs.items()):
        place = Path(folder) / str(number)
        engine = built(config, ranks)
        frozen = {key: p.detach().clone() for key, p in engine.module.named_parameters() if not p.requires_grad}
        first = steps(engine, batches, 2)
        save_checkpoint(engine, place, {})
        whole = steps(engine, batches, 4)
        masters, moments = dict(engine.trainable_tensors()), dict(engine.optimizer_tensors())
        rates = sorted({group["peak_lr"] for group in engine._deepspeed.optimizer.param_groups})
        parameters = dict(engine.module.named_parameters())
        kept = all(torch.equal(parameters[key], value) for key, value in frozen.items())
        engine.close()

        engine = built(config, ranks)
        load_newest_checkpoint(engine, place, Recorder())
        resumed = steps(engine, batches, 4)
        found[name] = {
            "first": first,
            "losses": (whole, resumed),
            "masters": (masters, dict(engine.trainable_tensors())),
            "moments": (moments, dict(engine.optimizer_tensors())),
            "frozen": len(frozen),
            "frozen_kept": kept,
            "rates": rates,
        }
        engine.close()
    return found
