"""Cross-attention: the source's keys and values, or, for short targets, the source itself.

A label has two to four tokens, its source fifty. Projecting the whole source in each decoder layer for so few queries
takes a sixth of a training step at T5-large. Matrix products are associative, so it can be avoided:

    q (h W_k)^T = (q W_k^T) h^T        p (h W_v) = (p h) W_v

W_k and W_v are multiplied with T queries instead of S source tokens. For the backward pass the source itself is kept,
once for all layers, instead of keys and values in each layer. A GPU projects all the same: what it saves in products it
loses in launches (T5-large on an H200, 4 targets: 0.83 to 1.0 of the speed from 16 x 64 to 64 x 512 source tokens).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hdscale.bases.attention import CrossAttention, Heads
from hdscale.bases.dropout import dropout as dropped
from hdscale.bases.interface import Adaptation
from hdscale.bases.linears import together
from hdscale.ops.precision import at_least_float32

TRAINING_GAIN, DECODING_GAIN = 4.0, 2.0
"""How many times fewer operations are needed for a gain in time, since the products are smaller. What training keeps,
T H D, is then smaller than keys and values, 2 S H d."""


MOST_BYTES_AT_ONCE = 256 * 2**20
"""Bytes of all layers' keys and values up to which they come from one product."""


def leaves_source(source: Tensor, targets: int, d_kv: int, gain: float = TRAINING_GAIN) -> bool:
    """Whether to attend to a source [B, S, D] without projecting it."""
    return source.device.type == "cpu" and few_targets(targets, source.shape[1], d_kv, gain)


def few_targets(targets: int, sources: int, d_kv: int, gain: float = TRAINING_GAIN) -> bool:
    """Whether T queries of S source tokens are cheaper without projecting the source: gain T (d_kv + S) <= d_kv S.

    Per head and D: projecting needs S d_kv multiplications for keys, and as many for values. Not projecting needs T
    d_kv for the queries and T S for the scores, and the same again for values.
    """
    return gain * targets * (d_kv + sources) <= d_kv * sources


class Projected(CrossAttention):
    """Keys and values of the source, computed in each layer.

    Args:
        heads: of the stack.
        source: [B, S, D].
        mask: [B, 1, 1, S], added to the scores.
    """

    def __init__(self, heads: Heads, source: Tensor, mask: Tensor) -> None:
        self.heads, self.rows, self.mask = heads, source.shape[0], mask
        self.source = source.reshape(-1, source.shape[-1])

    def __call__(
        self, layer: int, query: Tensor, key: nn.Linear, value: nn.Linear, adaptation: Adaptation | None
    ) -> Tensor:
        keys, values = project_source(layer, self.source, key, value, adaptation)
        split = self.heads.split
        return self.heads.attend(split(query, self.rows), split(keys, self.rows), split(values, self.rows), self.mask)


def project_source(
    layer: int, source: Tensor, key: nn.Linear, value: nn.Linear, adaptation: Adaptation | None
) -> tuple[Tensor, Tensor]:
    """The adapted keys and values [N, H * d] of source tokens [N, D]."""
    if adaptation is None:
        keys, values = together(source, key, value)
        return keys, values
    return (
        adaptation.projection(layer, "cross", "k", source, F.linear(source, key.weight)),
        adaptation.projection(layer, "cross", "v", source, F.linear(source, value.weight)),
    )


class ProjectedAtOnce(CrossAttention):
    """Keys and values of the source for all layers from one product; they cannot be adapted.

    One launch instead of one per layer, and in the backward pass one instead of three. All layers' gradients of keys
    and values are held until that product, so it is for small passes.

    Args:
        heads: of the stack.
        together: keys and values of each layer in turn, side by side, [B * S, layers * 2 * H * d].
        mask: [B, 1, 1, S], added to the scores.
    """

    def __init__(self, heads: Heads, together: Tensor, mask: Tensor) -> None:
        self.heads, self.mask, self.rows = heads, mask, mask.shape[0]
        shape = (self.rows, mask.shape[-1], -1, heads.number, heads.size)
        self.sides = [side.transpose(1, 2) for side in together.view(shape).unbind(2)]

    def __call__(
        self, layer: int, query: Tensor, key: nn.Linear, value: nn.Linear, adaptation: Adaptation | None
    ) -> Tensor:
        keys, values = self.sides[2 * layer : 2 * layer + 2]
        return self.heads.attend(self.heads.split(query, self.rows), keys, values, self.mask)


class Unprojected(CrossAttention):
    """The source itself, which all layers share; keys and values cannot be adapted.

    Args:
        heads: of the stack.
        source: [B, S, D], in the weights' dtype or a wider one, in which scores and mixtures are computed.
        mask: [B, 1, 1, S], added to the scores.
    """

    def __init__(self, heads: Heads, source: Tensor, mask: Tensor) -> None:
        self.heads, self.source, self.mask = heads, source, mask

    def __call__(
        self, layer: int, query: Tensor, key: nn.Linear, value: nn.Linear, adaptation: Adaptation | None
    ) -> Tensor:
        queries = self.heads.split(query, self.source.shape[0])
        mixed = unprojected_attention(queries, self.source, key.weight, value.weight, self.mask, self.heads.dropout)
        return mixed.flatten(0, 1)

    def keep(self, rows: Tensor) -> None:
        """Continue with some of the rows [B'], in this order."""
        self.source, self.mask = self.source.index_select(0, rows), self.mask.index_select(0, rows)


def unprojected_attention(
    query: Tensor, source: Tensor, key_weight: Tensor, value_weight: Tensor, mask: Tensor, dropout: float = 0.0
) -> Tensor:
    """The output of the attention of all heads, before the output projection.

    Args:
        query: [B, H, T, d_kv].
        source: [B, S, D], in the weights' dtype or a wider one, in which scores and mixtures are computed.
        key_weight, value_weight: [H * d_kv, D], of the linears that would compute keys and values.
        mask: [B, 1, 1, S], added to the scores.
        dropout: of the attention's probabilities.

    Returns:
        [B, T, H * d_kv].
    """
    size_b, heads, size_t, width = query.shape
    size_s, size_d = source.shape[1:]
    # [H, B T, d_kv] x [H, d_kv, D]
    queries = query.transpose(0, 1).reshape(heads, size_b * size_t, width)
    moved = torch.bmm(queries, key_weight.view(heads, width, size_d)).view(heads, size_b, size_t, size_d)
    moved = moved.transpose(0, 1).reshape(size_b, heads * size_t, size_d).to(source.dtype)
    scores = torch.bmm(moved, source.transpose(1, 2)).view(size_b, heads, size_t, size_s) + mask
    # the softmax in float32 at least, as in a fused kernel
    shares = torch.softmax(scores, dim=-1, dtype=at_least_float32(scores.dtype)).to(source.dtype)
    shares = dropped(shares, dropout).view(size_b, heads * size_t, size_s)
    seen = torch.bmm(shares, source).to(query.dtype).view(size_b, heads, size_t, size_d)
    seen = seen.transpose(0, 1).reshape(heads, size_b * size_t, size_d)
    mixed = torch.bmm(seen, value_weight.view(heads, width, size_d).transpose(1, 2))
    return mixed.view(heads, size_b, size_t, width).permute(1, 2, 0, 3).reshape(size_b, size_t, heads * width)
