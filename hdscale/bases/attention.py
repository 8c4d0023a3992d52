"""Attention without scaling, as in T5, over tokens in every arrangement that a stack computes.

A layer hands over its queries, keys and values flat, [N, H * d], and gets back the mixture [N, H * d]. What knows about
rows, packing and caches is the object that it hands them to: `WholeRows` (padded rows), `hdscale.bases.packing`
(one sequence without padding), `hdscale.bases.caches` (one or more tokens after those of a cache).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hdscale.bases import fused
from hdscale.bases.dropout import dropout as dropped
from hdscale.bases.interface import Adaptation
from hdscale.bases.positions import Buckets, bias_by_distance, bias_matrix, joined, with_prefix
from hdscale.ops.precision import at_least_float32

MOST_EXPLICIT_SCORES = 128 * 128
"""Queries times keys up to which a CPU computes the scores of a batch at once instead of using SDPA."""

Prefix = tuple[Tensor, Tensor]
"""Keys and values [B, H, P, d] in front of the tokens' own."""


class Heads(NamedTuple):
    """How an attention computes.

    Attributes:
        number: H.
        size: d.
        explicit: compute the scores as a tensor of their own instead of in a fused kernel (`model.attention=eager`).
        dropout: of the attention's probabilities.
    """

    number: int
    size: int
    explicit: bool = False
    dropout: float = 0.0

    def split(self, x: Tensor, rows: int) -> Tensor:
        """[N, H * d] -> [R, H, L, d]."""
        return x.view(rows, -1, self.number, self.size).transpose(1, 2)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        """Attention of all heads.

        Args:
            query: [R, H, L, d]. key, value: [R, H, keys, d].
            mask: added to the scores, broadcastable to [R, H, L, keys].

        Returns:
            [N, H * d].
        """
        return merge(attention(query, key, value, mask, self.dropout, self.explicit))


def merge(x: Tensor) -> Tensor:
    """[R, H, L, d] -> [N, H * d]."""
    rows, heads, length, size = x.shape
    return x.transpose(1, 2).reshape(rows * length, heads * size)


def attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, dropout: float = 0.0, explicit: bool = False
) -> Tensor:
    """Attention without scaling, as in T5: [R, H, L, d] -> [R, H, L, d]; see `Heads.attend`."""
    if explicit:
        scores = torch.matmul(query, key.transpose(2, 3)) + mask
        shares = torch.softmax(scores, dim=-1, dtype=at_least_float32(scores.dtype)).to(scores.dtype)
        return torch.matmul(dropped(shares, dropout), value)
    small = query.shape[2] * key.shape[2] <= MOST_EXPLICIT_SCORES
    if small and query.device.type == "cpu" and not torch.is_grad_enabled():
        # no fused attention of a CPU is fast for so few scores; in float32, as the fused ones sum
        wide_query, wide_key, wide_value = (tensor.to(at_least_float32(tensor.dtype)) for tensor in (query, key, value))
        scores = torch.matmul(wide_query, wide_key.transpose(2, 3))
        return torch.matmul(scores.add_(mask).softmax(dim=-1), wide_value).to(value.dtype)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout, scale=1.0)


def prefixed(prefix: Prefix | None, key: Tensor, value: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Keys, values and mask with a prefix in front.

    Args:
        prefix: of the layer, for every row or for every instance; None: nothing changes.
        key, value: [R, H, keys, d].
        mask: added to the scores.
    """
    if prefix is None:
        return key, value, mask
    rows = key.shape[0]
    keys, values = (for_rows(tensor, rows).to(key.dtype) for tensor in prefix)
    return torch.cat([keys, key], 2), torch.cat([values, value], 2), with_prefix(mask, keys.shape[2])


def for_rows(tensor: Tensor, rows: int) -> Tensor:
    """Of one entry per instance one per row: the beams of an instance have the same."""
    return tensor if tensor.shape[0] == rows else tensor.repeat_interleave(rows // tensor.shape[0], dim=0)


class SelfAttention(ABC):
    """Self-attention over the tokens of one pass."""

    @abstractmethod
    def mask(self, table: Tensor) -> Tensor:
        """What is added to the scores in every layer that has these relative position biases [buckets, H]."""

    @abstractmethod
    def __call__(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, prefix: Prefix | None
    ) -> Tensor:
        """The mixture [N, H * d]; everything flat but `mask` (of `self.mask`) and the prefix."""

    def joined(self, together: Tensor, mask: Tensor) -> Tensor | None:
        """The same for queries, keys and values side by side, [N, 3 * H * d]; None: call it with each of them."""
        return None


class CrossAttention(ABC):
    """The attention of targets to a source."""

    @abstractmethod
    def __call__(
        self, layer: int, query: Tensor, key: nn.Linear, value: nn.Linear, adaptation: Adaptation | None
    ) -> Tensor:
        """The mixture [N, H * d].

        Args:
            layer: index of the layer.
            query: [N, H * d].
            key, value: the layer's linears for the source.
            adaptation: if it adapts these linears; otherwise None.
        """


class WholeRows(SelfAttention):
    """All tokens of all rows at once, padded to one length.

    Args:
        heads: of the stack.
        rows: R.
        buckets: of the relative positions.
        visible: boolean, broadcastable to [R, 1, L, L].
    """

    def __init__(self, heads: Heads, rows: int, buckets: Buckets, visible: Tensor) -> None:
        self.heads, self.rows, self.buckets, self.visible = heads, rows, buckets, visible

    def joined(self, together: Tensor, mask: Tensor) -> Tensor | None:
        heads = self.heads
        if heads.explicit or not together.requires_grad or mask.requires_grad or not fused.attends(together):
            return None
        sides = together.view(self.rows, -1, 3, heads.number, heads.size)
        return fused.attention(sides, mask, heads.dropout).view(-1, heads.number * heads.size)

    def mask(self, table: Tensor) -> Tensor:
        length = self.visible.shape[-1]
        return joined(bias_matrix(bias_by_distance(table, length, self.buckets)), self.visible)

    def __call__(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, prefix: Prefix | None
    ) -> Tensor:
        queries, keys, values = (self.heads.split(x, self.rows) for x in (query, key, value))
        return self.heads.attend(queries, *prefixed(prefix, keys, values, mask))


def causal(length: int, device: torch.device) -> Tensor:
    """Boolean [L, L]: a token sees itself and those before it."""
    return torch.ones(length, length, dtype=torch.bool, device=device).tril()
