"""Steps of a layer on a GPU as one autograd function each, with fewer launches than torch's own composition.

What they compute is defined by the plain functions (`hdscale.bases.steps`, `hdscale.bases.attention`), which every
other device uses. They take no weights: base weights that train have their gradients by plain autograd.

Whole sub-layers as one function each were tried as well, and dropout masks drawn once per layer: 46.5 launches per
layer instead of 48, and no time gained, neither on an H200 nor of the host in simulation.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

aten = torch.ops.aten


def attends(x: Tensor) -> bool:
    """Whether `attention` is possible for x: it needs operators of torch that are not public."""
    return x.is_cuda and hasattr(aten, "_efficient_attention_backward")


def attention(sides: Tensor, mask: Tensor, dropout: float) -> Tensor:
    """Self-attention without scaling by the memory-efficient kernel, whose gradient is written as one tensor.

    Args:
        sides: queries, keys and values, [R, L, 3, H, d].
        mask: added to the scores, broadcastable to [R, H, L, L], rows a multiple of 8 apart.
        dropout: of the probabilities.

    Returns:
        [R, L, H, d].
    """
    rows, length, _, heads, _ = sides.shape
    return _Attention.apply(sides, mask.expand(rows, heads, length, length), dropout)


class _Attention(torch.autograd.Function):
    """See `attention`. SDPA's own backward pass returns three tensors, which would have to be copied into one."""

    @staticmethod
    def forward(ctx: Any, sides: Tensor, mask: Tensor, dropout: float) -> Tensor:
        query, key, value = sides.unbind(2)
        out, logsumexp, seed, offset, most_queries, most_keys = aten._efficient_attention_forward(
            query, key, value, mask, None, None, None, None, dropout, 0, True, scale=1.0
        )
        ctx.save_for_backward(sides, mask, out, logsumexp, seed, offset)
        ctx.sizes, ctx.dropout = (most_queries, most_keys), dropout
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        sides, mask, out, logsumexp, seed, offset = ctx.saved_tensors
        query, key, value = sides.unbind(2)
        # the three gradients are views of one tensor of the shape of `sides`
        first, *_ = aten._efficient_attention_backward(
            gradient, query, key, value, mask, out, None, None, *ctx.sizes, logsumexp, ctx.dropout, seed, offset, 0,
            False, scale=1.0, shared_storage_dqdkdv=True,
        )  # fmt: skip
        return first.as_strided(sides.shape, sides.stride(), first.storage_offset()), None, None


MOST_TOKENS_JOINED = 8192
"""Tokens of a pass up to which the two input products of a gated feed-forward are one: the host is the limit there. For
more the GPU is, and elementwise kernels are slower on halves of a tensor than on tensors of their own."""


def gated_gelu(together: Tensor, dropout: float) -> Tensor:
    """dropout(gelu(a) * b) for a and b side by side, [N, 2 F] -> [N, F]."""
    return _GatedGelu.apply(together, dropout)


class _GatedGelu(torch.autograd.Function):
    """See `gated_gelu`. The gradients of a and b are written into the halves of one tensor."""

    @staticmethod
    def forward(ctx: Any, together: Tensor, dropout: float) -> Tensor:
        gate, linear = together.chunk(2, -1)
        bent = F.gelu(gate, approximate="tanh")
        product = bent * linear
        mask = None
        if dropout:
            product, mask = torch.native_dropout(product, dropout, True)
        ctx.save_for_backward(together, bent, mask)
        ctx.scale = 1.0 / (1.0 - dropout)
        return product

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        together, bent, mask = ctx.saved_tensors
        if mask is not None:
            gradient = aten.native_dropout_backward(gradient, mask, ctx.scale)
        gate, linear = together.chunk(2, -1)
        result = torch.empty_like(together)
        of_gate, of_linear = result.chunk(2, -1)
        torch.mul(gradient, bent, out=of_linear)
        aten.gelu_backward.grad_input(gradient * linear, gate, approximate="tanh", grad_input=of_gate)
        return result, None
