"""Faults to plant: each must make the tier fail, and a test of the tests sees that it does."""

from __future__ import annotations

import subprocess
from pathlib import Path

import torch
from torch import Tensor

from hdscale.bases import fused
from hdscale.engine import deepspeed_engine


def a_wait_in_each_step() -> None:
    """The host reads the loss of every micro-batch."""
    loss_of = deepspeed_engine.loss_of

    def read(output: object) -> Tensor:
        loss = loss_of(output)
        loss.item()
        return loss

    deepspeed_engine.loss_of = read


def a_mask_copied_in_each_layer() -> None:
    """Each layer of the encoder makes its own copy of the attention's mask, for every row and head."""
    attention = fused.attention

    def copying(sides: Tensor, mask: Tensor, dropout: float) -> Tensor:
        rows, length, _, heads, _ = sides.shape
        if length >= 64:  # the encoder's
            mask = mask.expand(rows, heads, length, length).clone(memory_format=torch.contiguous_format)
        return attention(sides, mask, dropout)

    fused.attention = copying


def unlink(build: Path, toolkit: Path) -> None:
    """Link a built CUDA library again, without naming torch's libraries."""
    command = ["c++", "-shared", *map(str, build.glob("*.o")), "-o", str(build / "hdscale_cuda.so")]
    folders = [f"-L{toolkit / name}" for name in ("lib64", "lib")]
    subprocess.run([*command, *folders, "-lcudart"], check=True)
