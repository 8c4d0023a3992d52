"""T5's relative position bias and the masks of attention, as tensors that are added to the scores.

A bias depends on the distance of key and query alone, so it is looked up once per distance. What is added to the scores
(bias and mask joined) is formed once for all layers that share it: autograd keeps it for the backward pass, and one
[B, H, S, S] per layer would be more than all other activations. On a GPU the fused kernels take it as it is only if its
rows begin at multiples of 8 numbers, so its rows are padded there; otherwise every layer would copy it.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

ALIGNMENT = 8
"""Numbers: rows of masks, and lengths of sources on a GPU, are multiples of it."""
LENGTHS_REMEMBERED = 32


class Buckets(NamedTuple):
    """How distances of key and query share biases.

    Attributes:
        number: of biases of a head.
        furthest: distances from this one on share a bias.
        both_ways: whether keys after the query have biases of their own (the encoder).
    """

    number: int
    furthest: int
    both_ways: bool


def bucket_of(distance: Tensor, buckets: Buckets) -> Tensor:
    """The index of the bias of each distance, key minus query: half of them exact, the rest logarithmic."""
    count, start = buckets.number, torch.zeros_like(distance)
    if buckets.both_ways:
        count //= 2
        start = torch.where(distance > 0, count, start)
        distance = distance.abs()
    else:
        distance = -distance.clamp(max=0)
    exact = count // 2
    far = torch.log(distance.clamp(min=1).float() / exact) / math.log(buckets.furthest / exact) * (count - exact)
    return start + torch.where(distance < exact, distance, (exact + far.long()).clamp(max=count - 1))


@functools.lru_cache(maxsize=LENGTHS_REMEMBERED)
def buckets_by_distance(length: int, buckets: Buckets, device: torch.device) -> Tensor:
    """int64 [2 L - 1], the bucket of each distance from -(L - 1) to L - 1."""
    with torch.inference_mode(False):
        return bucket_of(torch.arange(1 - length, length, device=device), buckets)


def bias_by_distance(table: Tensor, length: int, buckets: Buckets) -> Tensor:
    """[H, 2 L - 1], the bias of each distance from -(L - 1) to L - 1.

    Args:
        table: [buckets, H], the weights.
        length: L.
        buckets: of the distances.
    """
    return F.embedding(buckets_by_distance(length, buckets, table.device), table).t()


def bias_matrix(by_distance: Tensor) -> Tensor:
    """[H, 2 L - 1] -> [1, H, L, L], the bias of each query and key."""
    length = (by_distance.shape[-1] + 1) // 2
    # windows of L distances: the last window belongs to the first query
    return by_distance.unfold(-1, length, 1).flip(1).unsqueeze(0)


def bias_of_next(table: Tensor, seen: int, length: int, keys: int, buckets: Buckets) -> Tensor:
    """[1, H, L, keys], the bias of L queries that follow `seen` tokens, with the keys of all tokens from the first."""
    queries = torch.arange(seen, seen + length, device=table.device)
    distance = torch.arange(keys, device=table.device) - queries[:, None]
    return F.embedding(bucket_of(distance, buckets), table).permute(2, 0, 1).unsqueeze(0)


def joined(bias: Tensor, visible: Tensor) -> Tensor:
    """What is added to the scores: the bias where a query may see a key, elsewhere the smallest number.

    Args:
        bias: broadcastable to [B, H, L, keys]. visible: boolean, the same.
    """
    return aligned(torch.where(visible, bias, torch.finfo(bias.dtype).min))


def source_mask(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, S] -> [B, 1, 1, S]: 0 at tokens, the smallest number at padding. Cross-attention has no position bias."""
    zero = torch.zeros((), dtype=dtype, device=mask.device)
    return joined(zero, mask[:, None, None, :].bool())


def aligned(mask: Tensor) -> Tensor:
    """The same numbers, contiguous; on a GPU with rows padded in memory to multiples of 8 numbers."""
    length = mask.shape[-1]
    if mask.device.type == "cpu" or length % ALIGNMENT == 0:
        return mask.contiguous()
    # not by `pad`, which keeps the order of the dimensions in memory: a single row can have a last stride of H
    padded = mask.new_zeros(*mask.shape[:-1], length + -length % ALIGNMENT)
    padded[..., :length] = mask
    return padded[..., :length]


def with_prefix(mask: Tensor, length: int) -> Tensor:
    """The mask for keys that begin with a prefix of this length, which every query may see."""
    return aligned(F.pad(mask, (length, 0)))
