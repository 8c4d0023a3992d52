"""Dropout on a CPU: its rate, its mean, and what its elements have to do with each other."""

from __future__ import annotations

import pytest
import torch

from hdscale.bases.dropout import draw_mask, dropout

DTYPES = [torch.bfloat16, torch.float32, torch.float64]
SIDE = 1001
"""Rows and columns: odd, so that the last draw is used in part."""


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rate", [0.001, 0.1, 0.5, 0.9])
def test_rate_and_mean(dtype, rate):
    """Within five standard deviations. Fails if the rate is that of the kept ones, or the scale is left out."""
    torch.manual_seed(0)
    y = dropout(torch.full((SIDE, SIDE), 3.0, dtype=dtype), rate)
    deviation = 5 * (rate * (1 - rate)) ** 0.5 / SIDE
    assert abs((y == 0).double().mean().item() - rate) < deviation
    kept = y[y != 0].double()
    assert kept.min() == kept.max() == pytest.approx(3 / (1 - rate), rel=2**-8 if dtype == torch.bfloat16 else 1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_neighbours_are_independent(dtype):
    """Elements that share a draw of the generator among them. Fails if two of them have the same bits."""
    torch.manual_seed(0)
    dropped = (dropout(torch.ones(SIDE * SIDE, dtype=dtype), 0.3) == 0).double()
    for distance in range(1, 9):
        together = (dropped[:-distance] * dropped[distance:]).mean().item()
        assert together == pytest.approx(0.09, abs=5 * 0.3 / SIDE), distance


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_has_the_mask_of_the_output(dtype):
    """For a transposed input and a transposed gradient too, whose memory is in another order."""
    torch.manual_seed(0)
    x = torch.ones(40, 30, dtype=dtype).t().requires_grad_()
    y = dropout(x, 0.4)
    y.backward(torch.ones(40, 30, dtype=dtype).t())
    assert 0 < (y == 0).sum() < y.numel() and torch.equal(x.grad, y)


def test_bits_follow_the_seed():
    x = torch.ones(50, 50)
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(dropout(x, 0.1))
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_ends_of_the_rate():
    x = torch.ones(100)
    assert dropout(x, 0.0) is x
    _, kept = draw_mask(x.bfloat16(), 0.99999)
    assert kept == 2**-15
