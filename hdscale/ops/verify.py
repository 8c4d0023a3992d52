"""Compare the operator with double precision, for the tests and for the benchmark before it times anything."""

from __future__ import annotations

import torch
from torch import Tensor

from hdscale.ops.cases import Case, named_results, reference, relative_error
from hdscale.ops.generated import SharedHeads, generated_adapter, generated_biases, share_heads
from hdscale.ops.naive import AdapterHeads, generate_adapter_weights
from hdscale.ops.operator import forward_for


def outputs_and_gradients(case: Case, backend: str, shared: bool = True) -> dict[str, Tensor]:
    """Every output and gradient of `generated_adapter` on a case, by name."""
    x = [tensor.detach().requires_grad_() for tensor in case.x]
    code = case.code.detach().requires_grad_()
    heads = AdapterHeads(*(tensor.detach().requires_grad_() for tensor in case.heads))
    layers: list[tuple[Tensor, AdapterHeads | SharedHeads]]
    if shared:
        layers = share_heads(code, heads, case.x[0].shape[1], backend=backend)
    else:
        layers = [(layer_code, heads) for layer_code in code.unbind()]
    ys = [generated_adapter(x_l, *layer, backend=backend) for x_l, layer in zip(x, layers, strict=True)]
    gradients = torch.autograd.grad(ys, [*x, code, *heads], case.dy)
    return named_results(ys, list(gradients))


def relu_masks(case: Case, compiled: bool = True) -> list[Tensor]:
    """The ReLU masks of the compiled operator, or of the plain path in the case's own precision."""
    masks = []
    for x_l, code_l in zip(case.x, case.code.unbind(), strict=True):
        heads = case.heads
        if compiled:
            compute = forward_for(x_l, heads.down_bias_bias.shape[0])
            hidden = compute(x_l, code_l, *heads[:4], *generated_biases(code_l, heads))[1]
        else:
            weights = generate_adapter_weights(code_l, heads)
            hidden = torch.baddbmm(weights.down_bias.unsqueeze(1), x_l, weights.down)
        masks.append(hidden > 0)
    return masks


def relative_errors(case: Case, backend: str, shared: bool = True) -> dict[str, float]:
    """||out - ref|| / ||ref|| of every output and gradient; zero where both are empty or zero.

    Heads that the layers do not share (see `share_heads`) get one gradient per call, and autograd adds these in the
    heads' own type. There every call is compared separately, and the largest error of each tensor is returned.
    """
    if len(case.x) > 1 and not (shared and _shares(case, backend)):
        parts = zip(case.x, case.code.split(1), case.dy, strict=True)
        found = [relative_errors(Case([x], code, case.heads, [dy]), backend, shared) for x, code, dy in parts]
        return {name: max(errors[name] for errors in found) for name in found[0]}
    outputs = outputs_and_gradients(case, backend, shared)
    expected = reference(case, relu_masks(case, compiled=backend != "torch"))
    return {name: relative_error(outputs[name], expected[name]) for name in expected}


def _shares(case: Case, backend: str) -> bool:
    code = case.code.detach().requires_grad_()
    return isinstance(share_heads(code, case.heads, case.x[0].shape[1], backend=backend)[0][1], SharedHeads)
