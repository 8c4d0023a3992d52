"""Batched adapter generation: one operator, its plain-PyTorch definition, and the kernels that compute it."""

from __future__ import annotations

from torch import Tensor

from hdscale.ops.reference import (
    AdapterHeads,
    AdapterWeights,
    apply_adapter,
    generate_adapter_weights,
    generated_adapter_reference,
)

__all__ = ["AdapterHeads", "AdapterWeights", "apply_adapter", "generate_adapter_weights", "generated_adapter"]


def generated_adapter(x: Tensor, code: Tensor, heads: AdapterHeads, backend: str = "auto") -> Tensor:
    """Generate one layer's adapters for B instances and apply them (Eq. 3-7).

    Args:
        x: hidden states [B, T, D].
        code: the hypernetwork's hidden vector for this layer [B, K].
        heads: the hypernetwork's output heads.
        backend: `auto`, `cpp`, `cuda` or `torch`.

    Returns:
        y [B, T, D], without the residual.
    """
    return generated_adapter_reference(x, code, heads)
