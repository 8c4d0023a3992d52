"""Number types: their names in settings and on command lines, and the type in which sums are taken."""

from __future__ import annotations

import torch

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
"""The number types of weights and activations, by their names in `train.dtype` and `--dtype`."""


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """The type in which sums over tokens, biases and softmaxes are computed: float32 for 16-bit types."""
    return torch.promote_types(dtype, torch.float32)
