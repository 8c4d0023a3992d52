"""AdamW's epsilon on the release's side: updates of transformers' old AdamW, in float64."""

from __future__ import annotations

import math

import pytest
import torch

from hdscale.engine.optimizer import EPSILON, uncorrected_epsilon


def old_adamw(gradients: list[torch.Tensor], rate: float, betas: tuple[float, float]) -> torch.Tensor:
    """The weights after updates from 0 as transformers 4.14's AdamW makes them: epsilon before the correction."""
    weights, first, second = (torch.zeros_like(gradients[0]) for _ in range(3))
    for number, gradient in enumerate(gradients, start=1):
        first = betas[0] * first + (1 - betas[0]) * gradient
        second = betas[1] * second + (1 - betas[1]) * gradient**2
        size = rate * math.sqrt(1 - betas[1] ** number) / (1 - betas[0] ** number)
        weights = weights - size * first / (second.sqrt() + EPSILON)
    return weights


@pytest.mark.parametrize("scale", [1.0, 1e-7])
def test_the_release_s_updates(scale: float) -> None:
    """Gradients near epsilon, as those of adapters that start at almost zero, are where the two differ."""
    generator = torch.Generator().manual_seed(0)
    gradients = [scale * torch.randn(50, generator=generator, dtype=torch.float64) for _ in range(20)]
    found = {}
    for name in ("corrected", "uncorrected"):
        weights = torch.nn.Parameter(torch.zeros(50, dtype=torch.float64))
        optimizer = torch.optim.AdamW([weights], lr=1e-3, eps=EPSILON, weight_decay=0.0)
        for step, gradient in enumerate(gradients):
            if name == "uncorrected":
                optimizer.param_groups[0]["eps"] = uncorrected_epsilon(step, 0.999)
            weights.grad = gradient
            optimizer.step()
        found[name] = weights.detach()
    expected = old_adamw(gradients, 1e-3, (0.9, 0.999))
    assert torch.allclose(found["uncorrected"], expected, rtol=1e-10, atol=0)
    if scale < 1:
        assert not torch.allclose(found["corrected"], expected, rtol=0.05, atol=0), "the difference is large here"
