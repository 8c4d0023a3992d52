"""Random inputs of the operator, what they give in double precision, and how far a result is from it.

The error of a tensor is ||out - ref|| / ||ref||. The reference takes the operator's own ReLU mask: one unit among
thousands that rounds to the other side of zero changes a gradient by more than all other rounding together.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hdscale.ops.naive import AdapterHeads, Shape, generate_adapter_weights

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
"""Largest relative error of the operator's outputs and gradients, by number type."""


class Case(NamedTuple):
    """Random inputs of N layers, and the gradient with respect to each output."""

    x: list[Tensor]  # N x [B, T, D]
    code: Tensor  # [N, B, K]
    heads: AdapterHeads
    dy: list[Tensor]  # N x [B, T, D]


def random_case(shape: Shape, dtype: torch.dtype, device: str | torch.device = "cpu", seed: int = 0) -> Case:
    """Inputs scaled so that every intermediate value is of order one."""
    B, T, D, A, K, N = shape
    generator = torch.Generator("cpu").manual_seed(seed)

    def draw(*size: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*size, generator=generator, device="cpu").mul_(scale).to(device, dtype)

    heads = AdapterHeads(
        down_weight=draw(D * A, K, scale=(D * K) ** -0.5),
        down_bias=draw(D * A, scale=D**-0.5),
        up_weight=draw(A * D, K, scale=(A * K) ** -0.5),
        up_bias=draw(A * D, scale=A**-0.5),
        down_bias_weight=draw(A, K, scale=K**-0.5),
        down_bias_bias=draw(A, scale=0.1),
        up_bias_weight=draw(D, K, scale=K**-0.5),
        up_bias_bias=draw(D, scale=0.1),
    )
    return Case(
        x=[draw(B, T, D) for _ in range(N)],
        code=draw(N, B, K).relu_(),
        heads=heads,
        dy=[draw(B, T, D) for _ in range(N)],
    )


def reference(case: Case, masks: list[Tensor]) -> dict[str, Tensor]:
    """Every output and gradient of a case in double precision, by name.

    Args:
        case: the inputs.
        masks: for each layer the ReLU mask [B, T, A] to use.
    """

    def double(tensor: Tensor) -> Tensor:
        return tensor.detach().double().requires_grad_()

    x, code, heads = [double(t) for t in case.x], double(case.code), AdapterHeads(*map(double, case.heads))
    ys = []
    for x_l, code_l, mask in zip(x, code.unbind(), masks, strict=True):
        weights = generate_adapter_weights(code_l, heads)
        hidden = torch.baddbmm(weights.down_bias.unsqueeze(1), x_l, weights.down) * mask
        ys.append(torch.baddbmm(weights.up_bias.unsqueeze(1), hidden, weights.up))
    gradients = torch.autograd.grad(ys, [*x, code, *heads], [dy.double() for dy in case.dy])
    return named_results(ys, list(gradients))


def relative_error(out: Tensor, expected: Tensor) -> float:
    """||out - expected|| / ||expected|| in double precision."""
    difference = float((out.detach().double() - expected.detach()).norm())
    norm = float(expected.detach().norm())
    return difference / norm if norm else difference


def named_results(ys: list[Tensor], gradients: list[Tensor]) -> dict[str, Tensor]:
    """Outputs of the layers, and gradients with respect to [*x, code, *heads], by name."""
    layers = len(ys)
    named = {"y": torch.stack(ys).detach(), "x": torch.stack(gradients[:layers]), "code": gradients[layers]}
    return named | dict(zip(AdapterHeads._fields, gradients[layers + 1 :], strict=True))
