"""Several training sets as one stream: its order is a function of (seed, step), whatever the ranks."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np

from hdscale.data.batches import Row
from hdscale.data.tokenize import TokenizedSplit
from hdscale.errors import UserError

EPOCH_ORDER, SUBSET, WEIGHTED_DRAW, BATCH_TASK = 1, 2, 3, 4
"""Purposes of random numbers: each has a separate stream."""
DRAWS = 4096
"""Positions whose weighted draws are made at once."""


class Mixture:
    """The training rows of several tasks, mixed.

    With `temperature` 1 the sets are concatenated and shuffled anew in each epoch: every row is seen once an
    epoch, and tasks are in proportion to their sizes (Section 3.1). Otherwise each row is drawn with
    replacement: its task with probability proportional to `size ** (1 / temperature)`, then one of its rows.

    Args:
        sets: tokenised training sets.
        seed: of the order (`run.seed`).
        temperature: above 0; larger evens the tasks out.
        fraction: share of each set that is used, in (0, 1]; the rows of a smaller share are among those of a
            larger one.
        task_ids: the id of each set's task; by default its place.
        single_task: each global batch holds one task, drawn with those same probabilities (whatever the
            temperature, with replacement).

    Raises:
        UserError: if there is no training set, or an empty one.
    """

    def __init__(
        self,
        sets: Sequence[TokenizedSplit],
        seed: int,
        temperature: float = 1.0,
        fraction: float = 1.0,
        task_ids: Sequence[int] | None = None,
        single_task: bool = False,
    ) -> None:
        if not sets:
            raise UserError("no task of data.tasks has a training set; name one that has")
        for one in sets:
            if not len(one):
                raise UserError(f"the training set of task {one.task} is empty")
        self.sets, self.seed, self.temperature = list(sets), seed, temperature
        self.single_task = single_task
        self.task_ids = list(range(len(sets))) if task_ids is None else list(task_ids)
        self._chosen = [subset(len(one), fraction, seed, number) for number, one in enumerate(sets)]
        self.sizes = [
            len(one) if chosen is None else len(chosen) for one, chosen in zip(sets, self._chosen, strict=True)
        ]
        self._starts = np.cumsum([0, *self.sizes])
        # two epochs meet in one batch, so the orders of two are kept
        self._epoch_order = functools.lru_cache(maxsize=2)(self._shuffle)
        self._draws = functools.lru_cache(maxsize=3)(self._draw)

    def __len__(self) -> int:
        """Rows of one epoch."""
        return int(self._starts[-1])

    @property
    def proportions(self) -> dict[str, float]:
        """{task: share of the stream}."""
        weights = np.array(self.sizes, dtype=float) ** (1 / self.temperature)
        return {one.task: float(share) for one, share in zip(self.sets, weights / weights.sum(), strict=True)}

    def rows(self, step: int, global_batch_size: int) -> list[Row]:
        """The global batch of a step (counted from 0), the same on every rank, which takes its part of it."""
        return [
            self.sets[number].row(index, self.task_ids[number])
            for number, index in self.places(step, global_batch_size)
        ]

    def places(self, step: int, global_batch_size: int) -> list[tuple[int, int]]:
        """(set, row of the set) of each row of a step's global batch."""
        positions = np.arange(step * global_batch_size, (step + 1) * global_batch_size)
        if self.single_task:
            numbers, rows = self._drawn(positions, self._task_of(step))
        else:
            numbers, rows = self._shuffled(positions) if self.temperature == 1 else self._drawn(positions)
        return [
            (number, row if self._chosen[number] is None else int(self._chosen[number][row]))
            for number, row in zip(numbers.tolist(), rows.tolist(), strict=True)
        ]

    def _shuffled(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Sets and rows at positions of the concatenated, reshuffled epochs."""
        epochs, places = np.divmod(positions, len(self))
        indices = np.empty_like(places)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            indices[here] = self._epoch_order(epoch)[places[here]]
        numbers = np.searchsorted(self._starts, indices, side="right") - 1
        return numbers, indices - self._starts[numbers]

    def _drawn(self, positions: np.ndarray, only: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Sets and rows at positions of the weighted draws, or rows of one set `only`."""
        blocks, places = np.divmod(positions, DRAWS)
        numbers, fractions = np.empty_like(places), np.empty(len(places))
        for block in np.unique(blocks).tolist():
            here = blocks == block
            drawn = self._draws(block)
            numbers[here], fractions[here] = drawn[0][places[here]], drawn[1][places[here]]
        if only is not None:
            numbers[:] = only
        return numbers, (fractions * np.array(self.sizes)[numbers]).astype(np.int64)

    def _task_of(self, step: int) -> int:
        """The set that a single-task batch is drawn from."""
        block, place = divmod(step, DRAWS)
        return int(self._draws(block, BATCH_TASK)[0][place])

    def _shuffle(self, epoch: int) -> np.ndarray:
        return permutation(len(self), self.seed, EPOCH_ORDER, epoch)

    def _draw(self, block: int, purpose: int = WEIGHTED_DRAW) -> tuple[np.ndarray, np.ndarray]:
        uniform = (random_words(2 * DRAWS, self.seed, purpose, block) >> np.uint64(11)) * 2.0**-53
        bounds = np.cumsum(list(self.proportions.values()))
        numbers = np.minimum(np.searchsorted(bounds, uniform[:DRAWS], side="right"), len(self.sets) - 1)
        return numbers, uniform[DRAWS:]


def subset(size: int, fraction: float, seed: int, number: int) -> np.ndarray | None:
    """Ascending rows of a share of a set, at least one; None for all."""
    if fraction == 1:
        return None
    return np.sort(permutation(size, seed, SUBSET, number)[: max(1, round(size * fraction))])


def permutation(size: int, seed: int, purpose: int, number: int) -> np.ndarray:
    """A random order of `size` things, the same under every version of numpy (whose own shuffles promise no
    such thing)."""
    return np.argsort(random_words(size, seed, purpose, number), kind="stable")


def random_words(count: int, seed: int, purpose: int, number: int) -> np.ndarray:
    """`count` random 64-bit words that are a function of the other arguments."""
    generator = np.random.Philox(key=np.array([seed % 2**64, number], dtype=np.uint64), counter=[0, 0, 0, purpose])
    return generator.random_raw(count)
