"""Relative positions and masks: transformers' biases, and rows that a GPU's attention takes without a copy."""

from __future__ import annotations

import pytest
import torch
from transformers.models.t5.modeling_t5 import T5Attention

from hdscale.bases.interface import Source
from hdscale.bases.positions import (
    ALIGNMENT,
    Buckets,
    aligned,
    bias_by_distance,
    bias_matrix,
    bias_of_next,
    bucket_of,
    joined,
    source_mask,
    with_prefix,
)

LENGTH = 150


@pytest.mark.parametrize("both_ways", [True, False])
def test_buckets_and_biases_are_those_of_transformers(both_ways):
    """Over more distances than the furthest bucket has, for whole rows and for tokens that follow others."""
    distance = torch.arange(LENGTH) - torch.arange(LENGTH)[:, None]
    buckets = Buckets(32, 128, both_ways)
    theirs = T5Attention._relative_position_bucket(distance, both_ways, 32, 128)
    assert torch.equal(bucket_of(distance, buckets), theirs)
    table = torch.randn(32, 3)
    wanted = table[theirs].permute(2, 0, 1).unsqueeze(0)
    assert torch.equal(bias_matrix(bias_by_distance(table, LENGTH, buckets)), wanted)
    assert torch.equal(bias_of_next(table, 40, 2, 60, buckets), wanted[:, :, 40:42, :60])


@pytest.mark.parametrize("length", [1, 8, 13, 505])
def test_rows_of_masks_are_aligned_on_a_gpu(length):
    """Only then does every layer take the mask as it is: last stride 1, all others multiples of 8. (The meta device
    stands for the GPU: strides without memory.)"""
    with torch.device("meta"):
        bias, visible = torch.empty(1, 4, length, length), torch.ones(2, 1, 1, length, dtype=torch.bool)
        # one more token after those of a library's cache: heads come last in memory
        next_token = bias_of_next(torch.empty(32, 4), length - 1, 1, length, Buckets(32, 128, False))
        masks = [joined(bias, visible), source_mask(visible[:, 0, 0], torch.bfloat16), joined(next_token, visible[:1])]
        masks.append(with_prefix(aligned(bias), 3))
    for mask, size in zip(masks, (length, length, length, length + 3), strict=True):
        *others, last = mask.stride()
        assert mask.shape[-1] == size and last == 1 and all(stride % ALIGNMENT == 0 for stride in others)


def test_masks_of_a_cpu_have_no_padding():
    mask = aligned(torch.randn(2, 3, 5, 13))
    assert mask.is_contiguous() and mask.untyped_storage().nbytes() == mask.numel() * 4


def test_a_padded_source_has_the_same_tokens_at_their_new_positions():
    ids = torch.arange(1, 11).view(2, 5)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    source = Source(ids, mask, mask.flatten().nonzero().squeeze(1))
    padded = source.padded(8)
    assert padded.input_ids.shape == padded.mask.shape == (2, 8) and not padded.mask[:, 5:].any()
    assert torch.equal(padded.positions, padded.mask.flatten().nonzero().squeeze(1))
    assert torch.equal(padded.input_ids.flatten()[padded.positions], ids[mask.bool()])
    assert source.padded(5) is source
