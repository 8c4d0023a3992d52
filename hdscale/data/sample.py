"""Samples of rows: drawn without replacement from a seed, so the same on every rank and at every evaluation."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hdscale.data.task import SPLIT_SEED, Example


def sample_rows(total: int, limit: int | None) -> list[int]:
    """Positions of at most `limit` of `total` rows, ascending; all of them without a limit.

    It is the sample of the paper's release: torch's permutation for seed 42, of which the first `limit` are kept.
    """
    if limit is None or limit >= total:
        return list(range(total))
    shuffled = torch.randperm(total, generator=torch.Generator().manual_seed(SPLIT_SEED))
    return sorted(shuffled[:limit].tolist())


def sample_examples(examples: Sequence[Example], limit: int | None, chunked: bool) -> tuple[list[int], int]:
    """(positions of the examples of a sample, number of rows that it was drawn from).

    Args:
        limit: most rows. chunked: examples are chunks, and a row is a question with all of its chunks.
    """
    if not chunked:
        return sample_rows(len(examples), limit), len(examples)
    groups: dict[str, list[int]] = {}
    for position, example in enumerate(examples):
        groups.setdefault(str(example.group), []).append(position)
    chosen = sample_rows(len(groups), limit)
    members = list(groups.values())
    return [position for number in chosen for position in members[number]], len(groups)
