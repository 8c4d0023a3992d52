"""One training step after the other, the numbers of each read while the next one runs."""

from __future__ import annotations

import time
from typing import Protocol

import torch

from hdscale.data.feed import Feed
from hdscale.engine.deepspeed_engine import Engine, PendingStep
from hdscale.engine.devices import out_of_memory
from hdscale.runs.log import RunLog


class Spent(Protocol):
    """What a run adds up over its steps."""

    seconds: float
    samples: int
    tokens: int


class Steps:
    """Takes steps from a feed, and on a GPU logs them one step late, so that it never waits for its host.

    Args:
        engine: that trains. feed: its batches, beginning with the engine's step. log: of the run.
        spent: seconds, samples and (real) tokens so far; counted on for each step that is finished.
    """

    def __init__(self, engine: Engine, feed: Feed, log: RunLog, spent: Spent) -> None:
        self._engine, self._feed, self._log, self._spent = engine, feed, log, spent
        self._pending: tuple[PendingStep, dict[str, int]] | None = None
        self._since = time.monotonic()

    def next(self) -> None:
        """Start the next step, and finish the one before it.

        Raises:
            NonFiniteError: on every rank, for the step before it or this one.
            OutOfGpuMemory: on a rank whose GPU is too small for the step.
        """
        if self._pending is None:
            self._since = time.monotonic()
        batches = self._feed.next()
        try:
            pending = self._engine.train_step(batches.micro_batches, batches.mine)
        except torch.OutOfMemoryError as error:
            raise out_of_memory(error, self._engine.step + 1, self._engine.train) from error
        counts = {
            "samples": len(batches.rows),
            "tokens": sum(len(row.input_ids) + len(row.labels) for row in batches.rows),
            "own_tokens": sum(len(row.input_ids) + len(row.labels) for row in batches.mine),
            "padded_tokens": batches.padded_tokens,
        }
        self.finish()
        self._pending = pending, counts
        if self._engine.ranks.device.type == "cpu":
            # the step is done already: its time must not be counted with the next one's
            self.finish()

    def finish(self) -> None:
        """Wait for the step that was started, if any, and log it: before anything is saved or evaluated.

        Raises:
            NonFiniteError: on every rank, if its loss or gradient is not finite.
        """
        if self._pending is None:
            return
        (pending, counts), self._pending = self._pending, None
        result = pending.result()
        now = time.monotonic()
        self._spent.seconds += now - self._since
        self._since = now
        self._spent.samples += counts["samples"]
        self._spent.tokens += counts["tokens"]
        self._log.step(
            result,
            samples=self._spent.samples,
            tokens=self._spent.tokens,
            seconds=self._spent.seconds,
            waited=self._feed.waited,
            padding=1 - counts["own_tokens"] / counts["padded_tokens"],
        )
