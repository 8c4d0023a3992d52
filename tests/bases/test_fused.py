"""The steps that a GPU computes as one function each, against their plain definitions."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from hdscale.bases import fused
from hdscale.bases.steps import activation


def test_the_gradient_of_the_gated_gelu():
    """In float64, by finite differences; without dropout it is the plain function to the bit."""
    torch.manual_seed(0)
    together = torch.randn(5, 14, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: fused.gated_gelu(x, 0.0), together)
    plain = activation("gelu_new", True)(tuple(together.chunk(2, -1)))
    assert torch.equal(fused.gated_gelu(together, 0.0), plain)


def test_dropout_of_the_gated_gelu():
    """What is dropped has no gradient, what stays is scaled in both directions."""
    together = torch.randn(200, 40, dtype=torch.float64, requires_grad=True)
    out = fused.gated_gelu(together, 0.25)
    plain = activation("gelu_new", True)(tuple(together.detach().requires_grad_().chunk(2, -1)))
    kept = out != 0
    assert 0.7 < kept.double().mean() < 0.8
    assert torch.allclose(out[kept], plain[kept] / 0.75)
    (gradient,) = torch.autograd.grad(out.sum(), together)
    again = together.detach().clone().requires_grad_()
    product = activation("gelu_new", True)(tuple(again.chunk(2, -1))) * kept / 0.75
    (expected,) = torch.autograd.grad(product.sum(), again)
    assert torch.allclose(gradient, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_attention_with_one_gradient(dtype, tolerance):
    """Output and gradient are those of SDPA over the three parts, with a mask whose rows are padded to 8."""
    torch.manual_seed(0)
    sides = torch.randn(3, 13, 3, 4, 16, device="cuda", dtype=dtype, requires_grad=True)
    mask = F.pad(torch.randn(3, 4, 13, 13, device="cuda", dtype=dtype), (0, 3))[..., :13]
    found = fused.attention(sides, mask, 0.0)
    query, key, value = (side.transpose(1, 2) for side in sides.unbind(2))
    wanted = F.scaled_dot_product_attention(query, key, value, mask, scale=1.0).transpose(1, 2)
    weight = torch.randn_like(wanted)
    gradients = [torch.autograd.grad((out * weight).sum(), sides)[0] for out in (found, wanted)]
    assert (found - wanted).abs().max() <= tolerance * wanted.abs().max()
    assert (gradients[0] - gradients[1]).abs().max() <= tolerance * gradients[1].abs().max()
