"""Self- and cross-attention of tokens that follow those of a cache: our own for greedy decoding, or transformers'."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hdscale.bases.attention import CrossAttention, Heads, Prefix, SelfAttention, for_rows, prefixed
from hdscale.bases.cross_attention import project_source
from hdscale.bases.interface import Adaptation
from hdscale.bases.positions import Buckets, aligned, bias_by_distance, bias_matrix, bias_of_next, joined, with_prefix
from hdscale.ops.precision import at_least_float32


def kept_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype of cached keys and values: no fused attention of a CPU is fast for one query, so there scores are
    computed in float32."""
    return at_least_float32(tensor.dtype) if tensor.device.type == "cpu" else tensor.dtype


class NextToken(SelfAttention):
    """One more token of each row at a time, with room for all keys and values made at the start.

    Args:
        heads: of the stack.
        rows: R.
        most_tokens: largest number of tokens that will be decoded.
        buckets: of the relative positions.

    Attributes:
        decoded: number of tokens before the present one.
    """

    def __init__(self, heads: Heads, rows: int, most_tokens: int, buckets: Buckets) -> None:
        self.heads, self.rows, self.most_tokens, self.buckets = heads, rows, most_tokens, buckets
        self.decoded = 0
        self.rooms: dict[int, Tensor] = {}  # of each layer: [2, R, H, prefix + most tokens, d]
        self.prefixes: dict[int, int] = {}
        self.biases: dict[int, Tensor] = {}  # of each table of biases: [1, H, most tokens, most tokens]

    def mask(self, table: Tensor) -> Tensor:
        key = table.data_ptr()
        if key not in self.biases:
            bias = bias_matrix(bias_by_distance(table, self.most_tokens, self.buckets))
            self.biases[key] = aligned(bias.to(kept_dtype(table)))
        return self.biases[key][:, :, self.decoded : self.decoded + 1, : self.decoded + 1]

    def __call__(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, prefix: Prefix | None
    ) -> Tensor:
        if layer not in self.rooms:
            self.make_room(layer, query, prefix)
        room, length = self.rooms[layer], self.prefixes[layer]
        place = length + self.decoded
        room[0, :, :, place] = key.view(self.rows, self.heads.number, -1)
        room[1, :, :, place] = value.view(self.rows, self.heads.number, -1)
        queries = self.heads.split(query, self.rows).to(room.dtype)
        seen = with_prefix(mask, length) if length else mask
        keys, values = room[:, :, :, : place + 1].unbind(0)
        return self.heads.attend(queries, keys, values, seen).to(query.dtype)

    def make_room(self, layer: int, like: Tensor, prefix: Prefix | None) -> None:
        """Allocate a layer's keys and values, behind its prefix."""
        length = 0 if prefix is None else prefix[0].shape[2]
        shape = (2, self.rows, self.heads.number, length + self.most_tokens, self.heads.size)
        room = torch.empty(shape, dtype=kept_dtype(like), device=like.device)
        if prefix is not None:
            for own, tensor in zip(room, prefix, strict=True):
                own[:, :, :length] = for_rows(tensor, self.rows)
        self.rooms[layer], self.prefixes[layer] = room, length

    def keep(self, rows: Tensor) -> None:
        """Continue with some of the rows [R'], in this order."""
        self.rows = rows.shape[0]
        self.rooms = {layer: room.index_select(1, rows) for layer, room in self.rooms.items()}


class KeptSource(CrossAttention):
    """Keys and values of the source, computed at the first token and kept.

    Args:
        heads: of the stack.
        source: [R, S, D].
        mask: [R, 1, 1, S], added to the scores; in `kept_dtype`.
    """

    def __init__(self, heads: Heads, source: Tensor, mask: Tensor) -> None:
        self.heads, self.source, self.rows, self.bias = heads, source.flatten(0, 1), source.shape[0], mask
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}

    def __call__(
        self, layer: int, query: Tensor, key: nn.Linear, value: nn.Linear, adaptation: Adaptation | None
    ) -> Tensor:
        if layer not in self.kept:
            dtype = kept_dtype(query)
            keys, values = (
                self.heads.split(x, self.rows).to(dtype).contiguous()
                for x in project_source(layer, self.source, key, value, adaptation)
            )
            self.kept[layer] = keys, values
        queries = self.heads.split(query, self.rows).to(self.bias.dtype)
        return self.heads.attend(queries, *self.kept[layer], self.bias).to(query.dtype)

    def keep(self, rows: Tensor) -> None:
        """Continue with some of the rows [R'], in this order."""
        self.rows, self.bias = rows.shape[0], self.bias.index_select(0, rows)
        self.kept = {
            layer: (key.index_select(0, rows), value.index_select(0, rows)) for layer, (key, value) in self.kept.items()
        }


class LibraryCache(SelfAttention):
    """The next tokens of each row, with keys and values in a cache of transformers.

    Args:
        heads: of the stack.
        rows: R.
        length: number of tokens of each row in this pass.
        cache: of transformers, for self-attention.
        buckets: of the relative positions.
    """

    def __init__(self, heads: Heads, rows: int, length: int, cache: Any, buckets: Buckets) -> None:
        self.heads, self.rows, self.length, self.cache, self.buckets = heads, rows, length, cache, buckets
        # a static cache changes its counter in place
        self.seen = int(cache.get_seq_length())
        self.keys: int = cache.get_mask_sizes(length, 0)[0]

    def mask(self, table: Tensor) -> Tensor:
        place = torch.arange(self.keys, device=table.device)
        visible = place <= place[self.seen : self.seen + self.length, None]
        return joined(bias_of_next(table, self.seen, self.length, self.keys, self.buckets), visible)

    def __call__(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, prefix: Prefix | None
    ) -> Tensor:
        queries, keys, values = (self.heads.split(x, self.rows) for x in (query, key, value))
        keys, values = self.cache.update(keys, values, layer)
        # the cache has the tokens' own keys and values only: the prefix is put in front of them each time
        return self.heads.attend(queries, *prefixed(prefix, keys, values, mask))


class LibrarySource(CrossAttention):
    """Keys and values of the source, in a cache of transformers after the first pass.

    Args:
        heads: of the stack.
        source: [R, S, D].
        mask: [R, 1, 1, S], added to the scores.
        cache: of transformers, for both attentions.
    """

    def __init__(self, heads: Heads, source: Tensor, mask: Tensor, cache: Any) -> None:
        self.heads, self.rows, self.source, self.bias, self.cache = heads, source.shape[0], source, mask, cache

    def __call__(
        self, layer: int, query: Tensor, key: nn.Linear, value: nn.Linear, adaptation: Adaptation | None
    ) -> Tensor:
        cache = self.cache.cross_attention_cache
        if self.cache.is_updated.get(layer):
            keys, values = cache.layers[layer].keys, cache.layers[layer].values
        else:
            projected = project_source(layer, self.source.flatten(0, 1), key, value, adaptation)
            keys, values = cache.update(*(self.heads.split(x, self.rows) for x in projected), layer)
            self.cache.is_updated[layer] = True
        return self.heads.attend(self.heads.split(query, self.rows), keys, values, self.bias)
