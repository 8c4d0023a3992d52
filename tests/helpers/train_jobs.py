"""Jobs of tests/test_train.py: whole runs inside test ranks."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import torch

from hdscale import train as train_module
from hdscale.bases import dropout
from hdscale.config import load_config
from hdscale.engine.deepspeed_engine import Engine


def run(
    ranks: Any,
    overrides: list[str],
    config: str = "configs/glue_large.yaml",
    fresh: bool = False,
    kill_at: int | None = None,
    signal_at: int | None = None,
    signal_rank: int = 0,
    dropout_of_torch: bool = False,
) -> dict[str, Any]:
    """A whole run; the exit code, and what the main rank trained on.

    Args:
        kill_at: each rank kills itself with SIGKILL in the middle of this step.
        signal_at: `signal_rank` sends itself SIGTERM in the middle of this step.
        dropout_of_torch: its masks, as in version 0.1, in place of our own.
    """
    if dropout_of_torch:
        dropout._Dropout.apply = lambda x, rate: torch.dropout(x, rate, True)
    seen: list[list[str]] = []
    step_of = Engine.train_step
    backward_of: dict[str, Any] = {}

    def recorded(engine: Engine, micro_batches: Any, rows: Any = ()) -> Any:
        seen.append([f"{row.task}/{row.id}" for row in rows])
        if engine.step == kill_at:
            deepspeed = engine._deepspeed
            backward_of["backward"] = deepspeed.backward

            def die(*args: Any, **kwargs: Any) -> None:
                backward_of["backward"](*args, **kwargs)
                os.kill(os.getpid(), signal.SIGKILL)

            deepspeed.backward = die
        if engine.step == signal_at and engine.ranks.rank == signal_rank:
            os.kill(os.getpid(), signal.SIGTERM)
        return step_of(engine, micro_batches, rows)

    Engine.train_step = recorded
    code = train_module.train(load_config(config, overrides), ranks, fresh)
    shares = ranks.gather_objects(seen)
    order = [sorted(name for share in shares for name in share[index]) for index in range(len(seen))]
    return {"code": code, "order": order}


def losses(folder: Path) -> dict[int, float]:
    """{step: loss} of a run's metrics."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if line["kind"] == "train"}
