"""The encoder over a micro-batch's tokens side by side in one sequence, without padding (`model.packing`).

Rows of unlike length are padded to the longest, and the encoder computes the padding too. Packed, the real tokens of all rows stand
in one sequence [1, L]; norms, linears, feed-forwards and learned adapters see no rows anyway, and the attention is told which tokens
belong together. On a GPU that is FlexAttention: a block mask by instance, so that blocks of two instances cost nothing, and T5's
relative position bias added to the scores. FlexAttention has no backward pass on a CPU, where the attention is taken instance by
instance. What leaves the encoder is a padded batch again: pooling, hypernetwork and decoder are as they were.

FlexAttention has no dropout of the attention's probabilities. A packed encoder leaves that dropout out on every device (all others
stay), so that a run computes the same wherever it goes on.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from hdscale.bases.interface import Adaptation

BLOCK = 128
"""Queries and keys of a block of FlexAttention. On a GPU the packed length is a multiple of it: fewer shapes."""


class Packing:
    """Where the tokens of a packed sequence come from, and how they attend to each other.

    Args:
        positions: [L], where the real tokens stand among the B * S of the padded batch, in ascending order, those of a row side by
            side; B * S itself stands for padding, at the end.
        shape: (B, S).
        bias: [1, H, S, S], the position bias of tokens of one row.

    Attributes:
        rows: [L], the instance of a token; B: padding. places: [L], its place within the row.
    """

    def __init__(self, positions: Tensor, shape: tuple[int, int], bias: Tensor) -> None:
        self.positions, self.shape, self.bias = positions, shape, bias
        self.rows, self.places = positions // shape[1], positions % shape[1]
        if positions.device.type == "cpu":
            self._attend = self._instance_by_instance()
        else:
            self._attend = self._flexible(compiled_flex_attention())

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention within instances, without T5's missing scale: all [1, H, L, d_kv]."""
        return self._attend(query, key, value)

    def padded(self, x: Tensor) -> Tensor:
        """[1, L, D] -> [B, S, D], zero at padding."""
        size_b, size_s = self.shape
        # one place more, for whatever is padding in the packed sequence
        filled = x.new_zeros(size_b * size_s + 1, x.shape[-1]).index_copy(0, self.positions, x.squeeze(0))
        return filled[:-1].view(size_b, size_s, -1)

    def _instance_by_instance(self) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        size_b = self.shape[0]
        counts = torch.bincount(self.rows, minlength=size_b + 1).tolist()
        lengths, rest = [length for length in counts[:size_b] if length], counts[size_b]

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            parts, start = [], 0
            for length, group in itertools.groupby(lengths):
                count = len(list(group))
                end = start + count * length
                # [1, H, L, d] -> [rows of this length, H, length, d]
                own = (x[0, :, start:end].unflatten(1, (count, length)).transpose(0, 1) for x in (query, key, value))
                mask = self.bias[:, :, :length, :length]
                mixed = functional.scaled_dot_product_attention(*own, attn_mask=mask, scale=1.0)
                parts.append(mixed.transpose(0, 1).flatten(1, 2))
                start = end
            if rest:
                parts.append(value[0, :, start:])
            return torch.cat(parts, dim=1).unsqueeze(0)

        return attend

    def _flexible(self, kernel: Callable[..., Tensor]) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        block_mask = block_mask_of(self.rows)
        places = self.places
        # the bias by the distance of key and query, from -(S - 1) to S - 1: [H, 2 S - 1]
        by_distance = torch.cat([self.bias[0, :, 1:, 0].flip(1), self.bias[0, :, 0]], dim=1)
        first = places - (self.shape[1] - 1)

        def score_mod(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return score + by_distance[h, places[k] - first[q]]

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return kernel(query, key, value, score_mod=score_mod, block_mask=block_mask, scale=1.0)

        return attend


def block_mask_of(rows: Tensor) -> BlockMask:
    """FlexAttention's mask of tokens that see their own instance only.

    The instances stand one behind the other, so the first and the last token of two blocks say whether they share an instance:
    nothing of size L * L is formed, and the host is told nothing.

    Args:
        rows: [L], the instance of each token, ascending.
    """
    length = rows.shape[0]
    blocks = -(-length // BLOCK)
    starts = torch.arange(blocks, device=rows.device) * BLOCK
    first, last = rows[starts], rows[(starts + BLOCK - 1).clamp(max=length - 1)]
    shared = (first[:, None] <= last) & (first <= last[:, None])
    # a block of one instance alone against another of the same needs no look at its tokens
    whole = (
        (first[:, None] == last)
        & (first == last[:, None])
        & (starts + BLOCK <= length)
        & (starts[:, None] + BLOCK <= length)
    )

    def listed(member: Tensor) -> tuple[Tensor, Tensor]:
        """Of each block of queries: how many blocks of keys are members, and their indices first."""
        order = member.int().argsort(dim=1, descending=True, stable=True)
        return member.sum(dim=1, dtype=torch.int32)[None, None], order.int()[None, None]

    def mask_mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return rows[q] == rows[k]

    return BlockMask.from_kv_blocks(
        *listed(shared & ~whole), *listed(whole), BLOCK_SIZE=BLOCK, mask_mod=mask_mod, seq_lengths=(length, length)
    )


@functools.cache
def compiled_flex_attention() -> Callable[..., Tensor]:
    """FlexAttention is a kernel only when compiled; once for all layers and lengths."""
    return torch.compile(flex_attention, dynamic=True)


def encode(
    stack: nn.Module, input_ids: Tensor, attention_mask: Tensor, positions: Tensor | None, adaptation: Adaptation | None
) -> Tensor:
    """The encoder's output [B, S, D], zero at padding.

    Args:
        stack: the encoder.
        input_ids: [B, S]. attention_mask: [B, S], the tokens of a row side by side.
        positions: [L], where the mask is 1 among the B * S (`collate` knows it); None: looked up, for which a GPU's host has to wait.
        adaptation: the same for all instances.
    """
    if positions is None:
        positions = attention_mask.flatten().nonzero().squeeze(1)
    padding = input_ids.numel()
    if positions.device.type != "cpu":
        positions = functional.pad(positions, (0, -positions.shape[0] % BLOCK), value=padding)
    size_s = input_ids.shape[1]
    bias = stack.block[0].layer[0].SelfAttention.compute_bias(size_s, size_s, device=input_ids.device)
    packing = Packing(positions, tuple(input_ids.shape), bias)
    # any token will do for padding
    tokens = input_ids.flatten().index_select(0, positions.clamp(max=padding - 1)).unsqueeze(0)
    x = stack.dropout(stack.embed_tokens(tokens))
    for block in stack.block:
        x, _, _ = block(x, packing=packing, adaptation=adaptation)
    return packing.padded(stack.dropout(stack.final_layer_norm(x)))
