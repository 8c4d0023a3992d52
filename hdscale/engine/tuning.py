"""Sizes that depend on a device's memory, found by trying."""

from __future__ import annotations

from collections.abc import Callable

import torch

from hdscale.runs.ranks import RankGroup


def largest_that_fits(attempt: Callable[[int], object], ranks: RankGroup, largest: int) -> int:
    """The largest of `largest`, `largest`/2, ..., 1 that fits into the memory of every rank's device. Collective.

    Args:
        attempt: does the work with this size; raises `torch.OutOfMemoryError` where it is too large.
        ranks: every rank tries, and all get the same answer.

    Returns:
        the size; 0 if not even 1 fits.
    """
    size = largest
    while size >= 1:
        try:
            attempt(size)
            fits = True
        except torch.OutOfMemoryError:
            fits = False
        if ranks.all_true(fits):
            return size
        # outside of the handler: the error's traceback holds the tensors of the attempt
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        size //= 2
    return 0
