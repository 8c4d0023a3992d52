"""Compare the operator with double precision: used by the tests, by the benchmark before it times anything,
and by the first use of the CUDA kernels on a machine.

The error of a tensor is ||out - ref|| / ||ref||. The reference takes the operator's own ReLU mask: one unit
among thousands that rounds to the other side of zero moves a gradient by more than all other rounding
together.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hdscale.ops import operator
from hdscale.ops.naive import AdapterHeads, AdapterWeights, generate_adapter_weights

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


class Shape(NamedTuple):
    """Sizes of a call: instances, tokens, model, adapter, bottleneck, layers."""

    B: int
    T: int
    D: int
    A: int
    K: int
    N: int = 1


class Case(NamedTuple):
    """Random inputs of N layers, and the gradient with respect to each output."""

    x: list[Tensor]  # N x [B, T, D]
    code: Tensor  # [N, B, K]
    heads: AdapterHeads
    dy: list[Tensor]  # N x [B, T, D]


def random_case(shape: Shape, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> Case:
    """Inputs scaled so that every intermediate value is of order one."""
    B, T, D, A, K, N = shape
    generator = torch.Generator().manual_seed(seed)

    def draw(*size: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*size, generator=generator).mul_(scale).to(device, dtype)

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


def outputs_and_gradients(case: Case, backend: str, shared: bool = True) -> dict[str, Tensor]:
    """Every output and gradient of `generated_adapter` on a case, by name."""
    from hdscale.ops.generated import generated_adapter, share_heads

    x = [tensor.detach().requires_grad_() for tensor in case.x]
    code = case.code.detach().requires_grad_()
    heads = AdapterHeads(*(tensor.detach().requires_grad_() for tensor in case.heads))
    if shared:
        layers = share_heads(code, heads, case.x[0].shape[1], backend=backend)
    else:
        layers = [(layer_code, heads) for layer_code in code.unbind()]
    ys = [generated_adapter(x_l, *layer, backend=backend) for x_l, layer in zip(x, layers, strict=True)]
    gradients = torch.autograd.grad(ys, [*x, code, *heads], case.dy)
    return _named(ys, list(gradients))


def reference(case: Case, masks: list[Tensor]) -> dict[str, Tensor]:
    """The same in double precision, with given ReLU masks [B, T, A] for each layer."""

    def double(tensor: Tensor) -> Tensor:
        return tensor.detach().double().requires_grad_()

    x, code, heads = [double(t) for t in case.x], double(case.code), AdapterHeads(*map(double, case.heads))
    ys = []
    for x_l, code_l, mask in zip(x, code.unbind(), masks, strict=True):
        weights: AdapterWeights = generate_adapter_weights(code_l, heads)
        hidden = torch.baddbmm(weights.down_bias.unsqueeze(1), x_l, weights.down) * mask
        ys.append(torch.baddbmm(weights.up_bias.unsqueeze(1), hidden, weights.up))
    gradients = torch.autograd.grad(ys, [*x, code, *heads], [dy.double() for dy in case.dy])
    return _named(ys, list(gradients))


def relu_masks(case: Case, compiled: bool = True) -> list[Tensor]:
    """The ReLU masks of the compiled operator, or of the plain path in the case's own precision."""
    from hdscale.ops.generated import generated_biases

    masks = []
    for x_l, code_l in zip(case.x, case.code.unbind(), strict=True):
        heads = case.heads
        if compiled:
            compute = operator.forward_for(x_l, heads.down_bias_bias.shape[0])
            hidden = compute(x_l, code_l, *heads[:4], *generated_biases(code_l, heads))[1]
        else:
            weights = generate_adapter_weights(code_l, heads)
            hidden = torch.baddbmm(weights.down_bias.unsqueeze(1), x_l, weights.down)
        masks.append(hidden > 0)
    return masks


def relative_errors(case: Case, backend: str, shared: bool = True) -> dict[str, float]:
    """||out - ref|| / ||ref|| of every output and gradient; zero where both are empty or zero.

    Heads that layers do not share (or may not, see `share_heads`) have a gradient for each call, added by autograd in the heads' own type: there
    every call is judged by itself, and the largest error of each tensor is returned.
    """
    if len(case.x) > 1 and not (shared and _shares(case, backend)):
        parts = zip(case.x, case.code.split(1), case.dy, strict=True)
        found = [relative_errors(Case([x], code, case.heads, [dy]), backend, shared) for x, code, dy in parts]
        return {name: max(errors[name] for errors in found) for name in found[0]}
    outputs = outputs_and_gradients(case, backend, shared)
    expected = reference(case, relu_masks(case, compiled=backend != "torch"))
    return {name: relative_error(outputs[name], expected[name]) for name in expected}


def _shares(case: Case, backend: str) -> bool:
    from hdscale.ops.generated import SharedHeads, share_heads

    code = case.code.detach().requires_grad_()
    return isinstance(share_heads(code, case.heads, case.x[0].shape[1], backend=backend)[0][1], SharedHeads)


def relative_error(out: Tensor, expected: Tensor) -> float:
    """||out - expected|| / ||expected|| in double precision."""
    difference, norm = (
        float((out.detach().double() - expected.detach()).norm()),
        float(expected.detach().norm()),
    )
    return difference / norm if norm else difference


def _named(ys: list[Tensor], gradients: list[Tensor]) -> dict[str, Tensor]:
    layers = len(ys)
    named = {"y": torch.stack(ys).detach(), "x": torch.stack(gradients[:layers]), "code": gradients[layers]}
    return named | dict(zip(AdapterHeads._fields, gradients[layers + 1 :], strict=True))
