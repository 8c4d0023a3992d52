"""Rows of token ids, and how several become tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
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


def pad_rows(rows: Sequence[Sequence[int]], value: int, multiple: int = 1) -> torch.Tensor:
    """Rows of numbers as one int64 tensor [B, longest], shorter rows filled up with `value` on the right.

    Args:
        multiple: the longest is rounded up to a multiple of this.
    """
    width = -(-max(map(len, rows)) // multiple) * multiple
    filled = np.full((len(rows), width), value, dtype=np.int64)
    # row by row: one list of lists takes torch ten times as long
    for place, row in zip(filled, rows, strict=True):
        place[: len(row)] = row
    return torch.from_numpy(filled)


def mask_of(rows: Sequence[Sequence[int]], width: int) -> torch.Tensor:
    """Where rows padded on the right to `width` have numbers of their own: bool [B, width]."""
    return torch.arange(width) < torch.tensor([len(row) for row in rows])[:, None]


def collate(rows: Sequence[Row], pad_id: int, multiple: int = 1) -> dict[str, torch.Tensor]:
    """A batch of rows, padded on the right to the longest source and target.

    Args:
        rows: B of them, B >= 1.
        pad_id: the tokenizer's padding id.
        multiple: lengths are rounded up to a multiple of this (8 suits tensor cores; fewer shapes suit a
            compiler).

    Returns:
        int64 tensors `input_ids` [B, S], `attention_mask` [B, S], `labels` [B, T] (-100 is padding),
        `task_ids` [B], and where what counts stands, so that no device has to be asked for it: `source_positions` [L],
        of the L source tokens among the B * S, and `target_positions` [M], of the M labels among the B * T.
    """

    input_ids = pad_rows([row.input_ids for row in rows], pad_id, multiple)
    labels = pad_rows([row.labels for row in rows], IGNORED, multiple)
    mask = mask_of([row.input_ids for row in rows], input_ids.shape[1])
    return {
        "input_ids": input_ids,
        "attention_mask": mask.long(),
        "labels": labels,
        "task_ids": torch.tensor([row.task_id for row in rows], dtype=torch.int64),
        "source_positions": mask.flatten().nonzero().squeeze(1),
        "target_positions": (labels.flatten() != IGNORED).nonzero().squeeze(1),
    }
