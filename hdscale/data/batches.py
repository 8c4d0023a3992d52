"""Rows of token ids, and how several become tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch

IGNORED = -100
"""Label of padding: left out of the loss."""


class Row(NamedTuple):
    """One tokenised training instance."""

    input_ids: list[int]
    labels: list[int]
    task_id: int
    """Place of the task among the run's tasks."""
    id: str
    task: str


def collate(rows: Sequence[Row], pad_id: int, multiple: int = 1) -> dict[str, torch.Tensor]:
    """A batch of rows, padded on the right to the longest source and target.

    Args:
        rows: B of them, B >= 1.
        pad_id: the tokenizer's padding id.
        multiple: lengths are rounded up to a multiple of this (8 suits tensor cores; fewer shapes suit a
            compiler).

    Returns:
        int64 tensors `input_ids` [B, S], `attention_mask` [B, S], `labels` [B, T] (-100 is padding),
        `task_ids` [B], and where what counts stands, so that no device has to be asked for it: `source_positions` [L], of the
        L source tokens among the B * S, and `target_positions` [M], of the M labels among the B * T.
    """
    import torch

    def padded(sequences: list[list[int]], filler: int) -> torch.Tensor:
        longest = max(map(len, sequences))
        length = -(-longest // multiple) * multiple
        return torch.tensor([ids + [filler] * (length - len(ids)) for ids in sequences], dtype=torch.int64)

    sources = [row.input_ids for row in rows]
    mask = padded([[1] * len(ids) for ids in sources], 0)
    labels = padded([row.labels for row in rows], IGNORED)
    return {
        "input_ids": padded(sources, pad_id),
        "attention_mask": mask,
        "labels": labels,
        "task_ids": torch.tensor([row.task_id for row in rows], dtype=torch.int64),
        "source_positions": mask.flatten().nonzero().squeeze(1),
        "target_positions": (labels.flatten() != IGNORED).nonzero().squeeze(1),
    }
