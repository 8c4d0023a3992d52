"""Micro-batches made ready by a thread while the step before them runs."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, NamedTuple

from hdscale.data.batches import Row, collate

if TYPE_CHECKING:
    import torch


class StepBatches(NamedTuple):
    """What one rank needs for one step.

    Attributes:
        rows: the global batch. mine: this rank's rows, in the order of its micro-batches.
        micro_batches: their tensors, in pinned memory where that is asked for.
        padded_tokens: source and target tokens of this rank's micro-batches, padding included.
    """

    rows: list[Row]
    mine: list[Row]
    micro_batches: list[dict[str, torch.Tensor]]
    padded_tokens: int


class Feed:
    """The batches of one step after the other, some steps ahead of whoever takes them.

    What a step gets is a function of the step alone, so how far the thread is ahead changes nothing.

    Args:
        rows_of: step -> the global batch.
        micro_batches_of: global batch -> this rank's micro-batches.
        pad_id: the tokenizer's.
        first: the first step taken. last: the step that is not taken any more.
        ahead: steps made ready in advance.
        pin: put tensors into pinned memory, from which a GPU copies them while it computes.

    Attributes:
        waited: seconds that `next` has waited for batches that were not ready.
    """

    def __init__(
        self,
        rows_of: Callable[[int], list[Row]],
        micro_batches_of: Callable[[list[Row]], list[list[Row]]],
        pad_id: int,
        first: int,
        last: int,
        ahead: int = 2,
        pin: bool = False,
    ) -> None:
        self._rows_of, self._micro_batches_of, self._pad_id, self._pin = rows_of, micro_batches_of, pad_id, pin
        self._next, self._last, self._ahead = first, last, ahead
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="hdscale-feed")
        self._ready: deque[Future[StepBatches]] = deque()
        self.waited = 0.0
        self._fill()

    def __enter__(self) -> Feed:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def next(self) -> StepBatches:
        """The next step's batches.

        Raises:
            IndexError: after the last step.
            Exception: whatever went wrong when they were made.
        """
        start = time.monotonic()
        batches = self._ready.popleft().result()
        self.waited += time.monotonic() - start
        self._fill()
        return batches

    def _fill(self) -> None:
        while len(self._ready) < self._ahead and self._next < self._last:
            self._ready.append(self._pool.submit(self._prepare, self._next))
            self._next += 1

    def _prepare(self, step: int) -> StepBatches:
        rows = self._rows_of(step)
        parts = self._micro_batches_of(rows)
        tensors = [collate(part, self._pad_id) for part in parts]
        if self._pin:
            tensors = [{name: tensor.pin_memory() for name, tensor in batch.items()} for batch in tensors]
        padded = sum(batch["input_ids"].numel() + batch["labels"].numel() for batch in tensors)
        return StepBatches(rows, [row for part in parts for row in part], tensors, padded)
