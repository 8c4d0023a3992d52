"""What the tests of ZeRO-3 run on the ranks: passes of unlike lengths, and the collectives that they start."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hdscale.bases import t5
from hdscale.engine.ranks import Ranks
from hdscale.modeling import HyperdecoderConfig, build_model
from tests.helpers.toy import settings, text_batch, toy_engine

ROWS = 7


class Collectives(TorchDispatchMode):
    """Notes every collective that torch starts, with the shapes of its tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "c10d":
            self.found.append(f"{function} {shapes(args)}")
        return function(*args, **(kwargs or {}))


def shapes(value: Any) -> Any:
    """The shapes of the tensors in nested lists."""
    if isinstance(value, torch.Tensor):
        return tuple(value.shape)
    if isinstance(value, list | tuple):
        return [found for part in value if (found := shapes(part))]
    return None


def unlike(step: int, rank: int) -> list[dict[str, torch.Tensor]]:
    """Two micro-batches of a rank. Even ranks have few targets of long sources, odd ones many targets of short ones."""
    batches = []
    for index in range(2):
        generator = torch.Generator().manual_seed(100 * step + 10 * index + rank)
        source, target = (23 + step % 3, 2) if (rank + index) % 2 == 0 else (5, 7)
        batches.append(text_batch(generator, source, target))
    return batches


def train(
    ranks: Ranks, base: str, method: dict[str, Any], variants: list[dict[str, Any]], steps: int
) -> list[dict[str, Any]]:
    """For each variant of the settings: losses, collectives of a step, ways of cross-attention, and what is decoded."""
    results = []
    ways: set[str] = set()
    for way in (t5.Projected, t5.Unprojected):

        def noted(*given: Any, way: Any = way, call: Any = way.__call__) -> torch.Tensor:
            ways.add(way.__name__)
            return call(*given)

        way.__call__ = noted
    for variant in variants:
        config = HyperdecoderConfig.from_dict(
            {"model": {"name": base, "dropout": 0.0}, "method": method, "tasks": ["a", "b"]}
        )
        run = settings(
            warmup_steps=0,
            global_batch_size=6 * ranks.world_size,
            learning_rate=1e-4,
            gradient_clipping=0.0,
            max_steps=40,
            **variant,
        )
        dtype = torch.bfloat16 if run.train.dtype == "bf16" else torch.float32
        model = build_model(config, dtype, ranks.device, seed=0, trainable_dtype=torch.float32)
        engine = toy_engine(model, run, ranks)
        with Collectives() as first:
            losses = [engine.train_step(unlike(0, ranks.rank)).result().loss]
        moments = dict(engine.optimizer_tensors())
        losses += [engine.train_step(unlike(step, ranks.rank)).result().loss for step in range(1, steps)]
        ways.clear()
        with Collectives() as collectives:
            losses.append(engine.train_step(unlike(steps, ranks.rank)).result().loss)
        seen = sorted(ways)
        decoded = []
        with engine.evaluating() as evaluated:
            for row in range(ranks.rank, ROWS, ranks.world_size):
                rows = unlike(row, row)[0].items()
                batch = {key: value[:1].to(ranks.device) for key, value in rows if key != "labels"}
                for beams in (1, 2):
                    found = evaluated.generate(**batch, max_new_tokens=3 + row % 3, num_beams=beams)
                    decoded.append((row, beams, found.tolist()))
        losses.append(engine.train_step(unlike(steps + 1, ranks.rank)).result().loss)
        results.append(
            {
                "losses": losses, "first": first.found, "collectives": collectives.found,
                "ways": seen, "decoded": decoded,
                "masters": dict(engine.trainable_tensors()),
                "gradients": {name: moments[f"exp_avg.{name}"] * 10 for name in engine.parameters},
            }
        )  # fmt: skip
        engine.close()
    return results
