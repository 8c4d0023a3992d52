"""Batched adapter generation: one operator, its plain-PyTorch definition, and its C++ and CUDA kernels."""

from __future__ import annotations

from hdscale.ops.generated import SharedHeads, generated_adapter, share_heads
from hdscale.ops.naive import (
    AdapterHeads,
    AdapterWeights,
    apply_adapter,
    generate_adapter_weights,
    generated_adapter_reference,
    group_by_instance,
)
from hdscale.requirements import require

require("torch")

__all__ = [
    "AdapterHeads",
    "AdapterWeights",
    "SharedHeads",
    "apply_adapter",
    "generate_adapter_weights",
    "generated_adapter",
    "generated_adapter_reference",
    "group_by_instance",
    "share_heads",
]
