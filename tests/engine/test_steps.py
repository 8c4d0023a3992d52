"""Steps and their times: a step's seconds are its own, the last one's too."""

from __future__ import annotations

import time
from types import SimpleNamespace

import torch

from hdscale.engine.steps import Steps
from hdscale.runs.state import RunState

SECONDS, ROWS, COUNT = 0.05, 8, 5


class SlowEngine:
    """Each step takes its time on the CPU, before `train_step` returns."""

    ranks = SimpleNamespace(device=torch.device("cpu"))
    step = 0

    def train_step(self, micro_batches, rows):
        time.sleep(SECONDS)
        self.step += 1
        return SimpleNamespace(result=lambda step=self.step: step)


class OneBatch:
    waited = 0.0

    def next(self):
        row = SimpleNamespace(input_ids=[1, 2], labels=[1])
        return SimpleNamespace(rows=[row] * ROWS, mine=[row] * ROWS, micro_batches=[], padded_tokens=3 * ROWS)


def test_no_step_is_faster_than_it_was() -> None:
    """With the time of two steps given to one and none to the last, the last one was a thousand times too fast."""
    logged: list[float] = []
    log = SimpleNamespace(step=lambda result, **numbers: logged.append(numbers["seconds"]))
    steps = Steps(SlowEngine(), OneBatch(), log, RunState())  # type: ignore[arg-type]
    for _ in range(COUNT):
        steps.next()
    steps.finish()
    spent = [after - before for before, after in zip([0.0, *logged], logged, strict=False)]
    assert len(spent) == COUNT and all(SECONDS <= one < 10 * SECONDS for one in spent), spent
