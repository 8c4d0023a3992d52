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
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from hdscale.bases.attention import Heads, Prefix, SelfAttention
from hdscale.bases.interface import Source
from hdscale.bases.positions import Buckets, bias_by_distance, bias_matrix

BLOCK = 128
"""Queries and keys per block of FlexAttention. On a GPU the packed length is a multiple of it, for fewer shapes."""
SMALLEST_PACKED_HEAD = 16
"""Numbers of a head that FlexAttention needs at least on a GPU (torch 2.11 fails to compile it for fewer)."""


class Packed(SelfAttention):
    """Self-attention within the instances of a packed sequence.

    Args:
        heads: of the stack.
        source: whose tokens are packed. Without positions they are computed here, for which the host has to wait for a
            GPU.
        buckets: of the relative positions.

    Attributes:
        positions: [L], ascending: the indices of the real tokens among the B * S of the padded batch, those of a row
            adjacent; at the end B * S itself, which means padding.
        rows: [L], the instance of each token; B for padding.
        places: [L], the token's position within its row.
    """

    def __init__(self, heads: Heads, source: Source, buckets: Buckets) -> None:
        self.heads, self.shape, self.buckets = heads, tuple(source.input_ids.shape), buckets
        positions = source.positions
        if positions is None:
            positions = source.mask.flatten().nonzero().squeeze(1)
        if positions.device.type != "cpu":
            positions = F.pad(positions, (0, -positions.shape[0] % BLOCK), value=source.input_ids.numel())
        self.positions = positions
        self.rows, self.places = positions // self.shape[1], positions % self.shape[1]
        self.flexible = positions.device.type != "cpu"
        if self.flexible:
            self.block_mask = block_mask_of(self.rows)
        else:
            counts = torch.bincount(self.rows, minlength=self.shape[0] + 1).tolist()
            self.lengths, self.padding = [length for length in counts[: self.shape[0]] if length], counts[-1]

    def tokens(self, input_ids: Tensor) -> Tensor:
        """[B, S] -> [L], the packed tokens; padding can be any token."""
        return input_ids.flatten().index_select(0, self.positions.clamp(max=input_ids.numel() - 1))

    def padded(self, x: Tensor) -> Tensor:
        """[L, D] -> [B, S, D], zero at padding."""
        size_b, size_s = self.shape
        # one row more, for the padding of the packed sequence
        filled = x.new_zeros(size_b * size_s + 1, x.shape[-1]).index_copy(0, self.positions, x)
        return filled[:-1].view(size_b, size_s, -1)

    def mask(self, table: Tensor) -> Tensor:
        """The bias by the distance of key and query [H, 2 S - 1] for FlexAttention, [1, H, S, S] on a CPU."""
        by_distance = bias_by_distance(table, self.shape[1], self.buckets)
        return by_distance.contiguous() if self.flexible else bias_matrix(by_distance)

    def __call__(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, prefix: Prefix | None
    ) -> Tensor:
        if prefix is not None:
            raise NotImplementedError("a prefix belongs to an instance, and a packed sequence has many")
        queries, keys, values = (self.heads.split(x, 1) for x in (query, key, value))
        if self.flexible:
            mixed = self.attend_flexibly(queries, keys, values, mask, compiled_flex_attention())
        else:
            mixed = self.attend_by_instance(queries, keys, values, mask)
        return mixed.squeeze(0).transpose(0, 1).flatten(1)

    def attend_flexibly(
        self, query: Tensor, key: Tensor, value: Tensor, by_distance: Tensor, kernel: Callable[..., Tensor]
    ) -> Tensor:
        """[1, H, L, d] -> [1, H, L, d] by FlexAttention."""
        places, first = self.places, self.places - (self.shape[1] - 1)

        def score_mod(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return score + by_distance[h, places[k] - first[q]]

        return kernel(query, key, value, score_mod=score_mod, block_mask=self.block_mask, scale=1.0)

    def attend_by_instance(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
        """[1, H, L, d] -> [1, H, L, d], adjacent instances of one length at once."""
        parts, start = [], 0
        for length, group in itertools.groupby(self.lengths):
            count = len(list(group))
            end = start + count * length
            # [1, H, L, d] -> [rows of this length, H, length, d]
            q, k, v = (x[0, :, start:end].unflatten(1, (count, length)).transpose(0, 1) for x in (query, key, value))
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias[:, :, :length, :length], scale=1.0)
            parts.append(mixed.transpose(0, 1).flatten(1, 2))
            start = end
        if self.padding:
            parts.append(value[0, :, start:])
        return torch.cat(parts, dim=1).unsqueeze(0)


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
