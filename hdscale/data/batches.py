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


def pad_rows(rows: Sequence[Sequence[int]], value: int) -> torch.Tensor:
    """Rows of numbers as one int64 tensor [B, longest], shorter rows filled up with `value` on the right."""
    filled = np.full((len(rows), max(map(len, rows))), value, dtype=np.int64)
    # row by row: one list of lists takes torch ten times as long
    for place, row in zip(filled, rows, strict=True):
        place[: len(row)] = row
    return torch.from_numpy(filled)


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

    def padded(sequences: list[list[int]], filler: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(ids, where they are)."""
        lengths = np.array([len(ids) for ids in sequences])
        width = -(-int(lengths.max()) // multiple) * multiple
        real = np.arange(width) < lengths[:, None]
        # row by row: one list of lists takes torch ten times as long
        filled = np.full(real.shape, filler, dtype=np.int64)
        for place, ids in zip(filled, sequences, strict=True):
            place[: len(ids)] = ids
        return torch.from_numpy(filled), torch.from_numpy(real)

    input_ids, mask = padded([row.input_ids for row in rows], pad_id)
    labels, _ = padded([row.labels for row in rows], IGNORED)
    return {
        "input_ids": input_ids,
        "attention_mask": mask.long(),
        "labels": labels,
        "task_ids": torch.tensor([row.task_id for row in rows], dtype=torch.int64),
        "source_positions": mask.flatten().nonzero().squeeze(1),
        "target_positions": (labels.flatten() != IGNORED).nonzero().squeeze(1),
    }
