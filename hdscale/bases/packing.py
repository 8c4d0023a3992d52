"""The encoder over a micro-batch whose tokens are concatenated to one sequence without padding (`model.packing`).

Rows of different lengths are padded to the longest, and the encoder computes the padding too. Packed, the real tokens
of all rows form one sequence [1, L]. Norms, linears, feed-forwards and learned adapters do not depend on rows, and the
attention is told which tokens belong together. On a GPU it is FlexAttention, with a block mask by instance, so that
blocks of two instances cost nothing, and with T5's relative position bias added to the scores. FlexAttention has no
backward pass on a CPU, so the attention is computed instance by instance there. The encoder's output is a padded batch
again, and pooling, hypernetwork and decoder are not affected.

FlexAttention has no dropout of the attention's probabilities. A packed encoder omits that dropout on every device (but
no other), so that a run computes the same when it resumes on another device.
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
"""Queries and keys per block of FlexAttention. On a GPU the packed length is a multiple of it, for fewer shapes."""


class Packing:
    """Where the tokens of a packed sequence come from, and how they attend to each other.

    Args:
        positions: [L], ascending: the indices of the real tokens among the B * S of the padded batch, those of a row
            adjacent; at the end B * S itself, which means padding.
        shape: (B, S).
        bias: [1, H, S, S], the position bias of the tokens of one row.

    Attributes:
        rows: [L], the instance of each token; B for padding.
        places: [L], the token's position within its row.
    """

    def __init__(self, positions: Tensor, shape: tuple[int, int], bias: Tensor) -> None:
        self.positions, self.shape, self.bias = positions, shape, bias
        self.rows, self.places = positions // shape[1], positions % shape[1]
        if positions.device.type == "cpu":
            self._attend = self._instance_by_instance()
        else:
            self._attend = self._flexible(compiled_flex_attention())

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention within instances, without scaling as in T5: all [1, H, L, d_kv]."""
        return self._attend(query, key, value)

    def padded(self, x: Tensor) -> Tensor:
        """[1, L, D] -> [B, S, D], zero at padding."""
        size_b, size_s = self.shape
        # one row more, for the padding of the packed sequence
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
    """FlexAttention's mask by which tokens see their own instance only.

    The instances follow each other, so the first and the last token of two blocks show whether the blocks share an
    instance. Nothing of size L * L is computed, and no value is copied to the host.

    Args:
        rows: [L], the instance of each token, ascending.
    """
    length = rows.shape[0]
    blocks = -(-length // BLOCK)
    starts = torch.arange(blocks, device=rows.device) * BLOCK
    first, last = rows[starts], rows[(starts + BLOCK - 1).clamp(max=length - 1)]
    shared = (first[:, None] <= last) & (first <= last[:, None])
    # two blocks that both lie within one instance need no mask
    whole = (
        (first[:, None] == last)
        & (first == last[:, None])
        & (starts + BLOCK <= length)
        & (starts[:, None] + BLOCK <= length)
    )

    def listed(member: Tensor) -> tuple[Tensor, Tensor]:
        """For each block of queries: how many blocks of keys are members, and all indices, members first."""
        order = member.int().argsort(dim=1, descending=True, stable=True)
        return member.sum(dim=1, dtype=torch.int32)[None, None], order.int()[None, None]

    def mask_mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return rows[q] == rows[k]

    return BlockMask.from_kv_blocks(
        *listed(shared & ~whole), *listed(whole), BLOCK_SIZE=BLOCK, mask_mod=mask_mod, seq_lengths=(length, length)
    )


@functools.cache
def compiled_flex_attention() -> Callable[..., Tensor]:
    """FlexAttention, compiled once for all layers and lengths; only compiled is it a single kernel."""
    return torch.compile(flex_attention, dynamic=True)


def encode(
    stack: nn.Module, input_ids: Tensor, attention_mask: Tensor, positions: Tensor | None, adaptation: Adaptation | None
) -> Tensor:
    """The encoder's output [B, S, D], zero at padding.

    Args:
        stack: the encoder.
        input_ids: [B, S].
        attention_mask: [B, S], the tokens of a row adjacent.
        positions: [L], the indices of ones among the B * S of the mask (`collate` computes them); None: computed here,
            for which the host has to wait for a GPU.
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
    # padding can be any token
    tokens = input_ids.flatten().index_select(0, positions.clamp(max=padding - 1)).unsqueeze(0)
    x = stack.dropout(stack.embed_tokens(tokens))
    for block in stack.block:
        x, _, _ = block(x, packing=packing, adaptation=adaptation)
    return packing.padded(stack.dropout(stack.final_layer_norm(x)))
