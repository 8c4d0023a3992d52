"""Passes without gradients over the stacks, with fewer and larger operations than transformers' modules use.

Masks and position biases are computed once for all layers, and the decoder writes keys and values into tensors that are
allocated at the start. Linears, norms and feed-forwards are the base's own modules, and the hooks of an `Adaptation`
are called at the same places as in training. Results equal those of the stacks' own passes up to rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hdscale.bases.cross_attention import DECODING_GAIN, few_targets, unprojected_attention
from hdscale.bases.interface import Adaptation
from hdscale.bases.stacks import masked, source_mask
from hdscale.ops.precision import at_least_float32

MOST_EXPLICIT_SCORES = 128 * 128
"""Queries times keys up to which a CPU computes the scores of a batch at once instead of using SDPA."""


def encode(stack: nn.Module, input_ids: Tensor, attention_mask: Tensor, adaptation: Adaptation | None) -> Tensor:
    """The encoder's output [B, S, D], equal to that of the stack's own forward in evaluation.

    Args:
        input_ids: [B, S]. attention_mask: [B, S].
    """
    x = stack.embed_tokens(input_ids)
    length = input_ids.shape[1]
    bias = stack.block[0].layer[0].SelfAttention.compute_bias(length, length, device=x.device)
    bias = masked(bias, attention_mask[:, None, None, :].bool())
    for layer, block in enumerate(stack.block):
        attention = block.layer[0].SelfAttention
        normed = block.layer[0].layer_norm(x)
        query, key, value = (
            split_heads(attention, project(attention, "self", name, layer, normed, adaptation)) for name in "qkv"
        )
        seen, prefix = bias, None if adaptation is None else adaptation.prefix(layer)
        if prefix is not None:
            seen = F.pad(bias, (prefix[0].shape[2], 0))
            key, value = (
                torch.cat([extra.to(own.dtype), own], dim=2) for extra, own in zip(prefix, (key, value), strict=True)
            )
        mixed = merge_heads(attend(query, key, value, seen))
        x = x + self_attention_output(attention, layer, mixed, adaptation)
        x = add_feed_forward(block.layer[-1], layer, x, adaptation)
    return stack.final_layer_norm(x)


class TokenDecoder:
    """The decoder, one token per row at a time.

    Args:
        stack: the decoder.
        hidden: [B, S, D], the encoding.
        attention_mask: [B, S].
        adaptation: of the decoder, made by `for_generation`.
        most_tokens: largest number of tokens that will be decoded.
        project_source: compute and keep keys and values of the source; otherwise the source is not projected (see
            `hdscale.bases.cross_attention`). Default: the cheaper way.
    """

    def __init__(
        self,
        stack: nn.Module,
        hidden: Tensor,
        attention_mask: Tensor,
        adaptation: Adaptation | None,
        most_tokens: int,
        project_source: bool | None = None,
    ) -> None:
        self.stack, self.adaptation = stack, adaptation
        self.adapts_attention = adaptation is not None and adaptation.adapts_attention
        attention = stack.block[0].layer[0].SelfAttention
        if project_source is None:
            project_source = not few_targets(most_tokens, hidden.shape[1], attention.key_value_proj_dim, DECODING_GAIN)
        self.project_source = project_source or self.adapts_attention
        # no fused attention of a CPU is fast for one query: the scores are computed in float32 there
        self.kept = at_least_float32(hidden.dtype) if hidden.device.type == "cpu" else hidden.dtype
        self.bias = attention.compute_bias(most_tokens, most_tokens, device=hidden.device).to(self.kept)  # [1, H, T, T]
        self.decoded = 0
        self.prefixes = [0] * len(stack.block)
        self.keys: list[Tensor] = []  # per layer: [B, H, prefix + T, d_kv]
        self.values: list[Tensor] = []
        for layer in range(len(stack.block)):
            self._make_room(layer, hidden, most_tokens)
        if self.project_source:
            self.source_bias = source_mask(attention_mask, self.kept)  # [B, 1, 1, S]
            self.source = [self._projected(layer, hidden) for layer in range(len(stack.block))]
        else:
            self.hidden = hidden.to(at_least_float32(hidden.dtype))
            self.source_bias = source_mask(attention_mask, self.hidden.dtype)

    def _make_room(self, layer: int, hidden: Tensor, most_tokens: int) -> None:
        attention = self.stack.block[layer].layer[0].SelfAttention
        prefix = self.adaptation.prefix(layer) if self.adapts_attention else None
        length = 0 if prefix is None else prefix[0].shape[2]
        self.prefixes[layer] = length
        shape = (hidden.shape[0], attention.n_heads, length + most_tokens, attention.key_value_proj_dim)
        for number, rooms in enumerate((self.keys, self.values)):
            room = torch.empty(shape, dtype=self.kept, device=hidden.device)
            if prefix is not None:
                room[:, :, :length] = prefix[number]
            rooms.append(room)

    def _projected(self, layer: int, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [B, H, S, d_kv] of the source."""
        attention = self.stack.block[layer].layer[1].EncDecAttention
        key, value = (
            split_heads(attention, project(attention, "cross", name, layer, hidden, self.adaptation))
            .to(self.kept)
            .contiguous()
            for name in "kv"
        )
        return key, value

    def keep(self, rows: Tensor) -> bool:
        """Continue with some of the rows, and return whether the adaptation allows that.

        Args:
            rows: int64, the rows to keep, in order.
        """
        if self.adaptation is not None:
            adaptation = self.adaptation.select(rows)
            if adaptation is None:
                return False
            self.adaptation = adaptation
        self.keys = [room.index_select(0, rows) for room in self.keys]
        self.values = [room.index_select(0, rows) for room in self.values]
        self.source_bias = self.source_bias.index_select(0, rows)
        if self.project_source:
            self.source = [(key.index_select(0, rows), value.index_select(0, rows)) for key, value in self.source]
        else:
            self.hidden = self.hidden.index_select(0, rows)
        return True

    def __call__(self, tokens: Tensor) -> Tensor:
        """tokens [B], the last of each row -> [B, D], the input of the head."""
        x = self.stack.embed_tokens(tokens.unsqueeze(1))
        place = self.decoded
        bias = self.bias[:, :, place : place + 1, : place + 1]
        for layer, block in enumerate(self.stack.block):
            x = x + self._self_attention(block.layer[0], layer, x, bias)
            x = x + self._cross_attention(block.layer[1], layer, x)
            x = add_feed_forward(block.layer[-1], layer, x, self.adaptation)
        self.decoded += 1
        return self.stack.final_layer_norm(x.squeeze(1))

    def _self_attention(self, sub: nn.Module, layer: int, x: Tensor, bias: Tensor) -> Tensor:
        attention, prefix = sub.SelfAttention, self.prefixes[layer]
        normed = sub.layer_norm(x)
        query, key, value = (
            split_heads(attention, project(attention, "self", name, layer, normed, self.adaptation)).to(self.kept)
            for name in "qkv"
        )
        place = prefix + self.decoded
        self.keys[layer][:, :, place] = key.squeeze(2)
        self.values[layer][:, :, place] = value.squeeze(2)
        seen = F.pad(bias, (prefix, 0)) if prefix else bias
        mixed = attend(query, self.keys[layer][:, :, : place + 1], self.values[layer][:, :, : place + 1], seen)
        return self_attention_output(attention, layer, merge_heads(mixed).to(x.dtype), self.adaptation)

    def _cross_attention(self, sub: nn.Module, layer: int, x: Tensor) -> Tensor:
        attention = sub.EncDecAttention
        query = project(attention, "cross", "q", layer, sub.layer_norm(x), self.adaptation)
        if self.project_source:
            mixed = attend(split_heads(attention, query).to(self.kept), *self.source[layer], self.source_bias)
            mixed = merge_heads(mixed).to(x.dtype)
        else:
            query = split_heads(attention, query)
            mixed = unprojected_attention(query, self.hidden, attention.k.weight, attention.v.weight, self.source_bias)
        return project(attention, "cross", "o", layer, mixed, self.adaptation)


def project(attention: nn.Module, kind: str, name: str, layer: int, x: Tensor, adaptation: Adaptation | None) -> Tensor:
    """The adapted output of a linear of an attention."""
    y = getattr(attention, name)(x)
    if adaptation is not None and adaptation.adapts_attention:
        return adaptation.projection(layer, kind, name, x, y)
    return y


def self_attention_output(attention: nn.Module, layer: int, mixed: Tensor, adaptation: Adaptation | None) -> Tensor:
    """The adapted output of the self-attention sub-layer, without the residual."""
    y = project(attention, "self", "o", layer, mixed, adaptation)
    return y if adaptation is None else adaptation.after_self_attention(layer, y)


def add_feed_forward(sub: nn.Module, layer: int, x: Tensor, adaptation: Adaptation | None) -> Tensor:
    """The feed-forward sub-layer with its residual."""
    normed = sub.layer_norm(x)
    y = sub.DenseReluDense(normed)
    if adaptation is None:
        return x + y
    y = x + adaptation.after_feed_forward(layer, y)
    branch = adaptation.parallel(layer, x, normed)
    return y if branch is None else y + branch


def split_heads(attention: nn.Module, x: Tensor) -> Tensor:
    """[B, L, H * d_kv] -> [B, H, L, d_kv]."""
    return x.unflatten(-1, (attention.n_heads, attention.key_value_proj_dim)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """[B, H, L, d_kv] -> [B, L, H * d_kv]."""
    return x.transpose(1, 2).flatten(2)


def attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
    """Attention without scaling, as in T5: [B, H, L, d_kv]; `bias` is added to the scores."""
    if query.device.type == "cpu" and query.shape[2] * key.shape[2] <= MOST_EXPLICIT_SCORES:
        wide_query, wide_key, wide_value = (tensor.to(at_least_float32(tensor.dtype)) for tensor in (query, key, value))
        scores = torch.matmul(wide_query, wide_key.transpose(2, 3))
        return torch.matmul(scores.add_(bias).softmax(dim=-1), wide_value).to(value.dtype)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=1.0)
