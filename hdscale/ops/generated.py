"""The operator as the model calls it: choice of backend, autocast, and heads shared by all layers of a forward pass.

Shape legend: N layers, B instances, T tokens, D model size, A adapter size, K hypernetwork bottleneck.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hdscale.ops.backend import resolve_backend
from hdscale.ops.naive import AdapterHeads, Shape, generated_adapter_reference
from hdscale.ops.operator import forward_for, matrix_products_are_faster, operator_is_faster
from hdscale.ops.precision import at_least_float32


class SharedHeads(NamedTuple):
    """Heads that all layers of a forward pass share, as one layer uses them (see `share_heads`)."""

    heads: AdapterHeads
    hidden_bias: Tensor  # [B, A], generated, float32
    out_bias: Tensor  # [B, D], generated, float32
    tokens: list[Tensor]  # carry this layer's part of the heads' gradient; see hdscale/ops/operator.py


def generated_adapter(x: Tensor, code: Tensor, heads: AdapterHeads | SharedHeads, backend: str = "auto") -> Tensor:
    """Generate one layer's adapters for B instances and apply them (Eq. 3-7).

    Args:
        x: hidden states [B, T, D].
        code: the hypernetwork's hidden vector for this layer [B, K].
        heads: the hypernetwork's output heads, or one of the pairs that `share_heads` returned:
            `generated_adapter(x, *layers[l])`.
        backend: `auto` (the compiled operator where it is available, supports these tensors and is faster, else
            PyTorch; it is faster for few tokens, see `operator_is_faster`), `cpp`, `cuda` or `torch`.

    Returns:
        y [B, T, D], without the residual. For the backward pass the compiled operator keeps x, code and [B, T, A], and
        generates the adapters again; PyTorch keeps the generated adapters.

    Raises:
        UserError: if the named backend is not available on this machine.
    """
    if isinstance(heads, SharedHeads):
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(code.dtype)
        return torch.ops.hdscale.generated_adapter_shared(
            x, code, *heads.heads[:4], heads.hidden_bias, heads.out_bias, heads.tokens
        )[0]
    x, (code, heads) = _autocast(x), _autocast_heads(code, heads)
    size_b, size_t, size_d = x.shape
    size_a = heads.down_bias_bias.shape[0]
    shape = Shape(size_b, size_t, size_d, size_a, code.shape[-1])
    faster = operator_is_faster(x.device.type, x.dtype, size_t, size_d, size_a)
    if (backend == "auto" and not faster) or resolve_backend(backend, x, code, *heads, shape=shape) == "torch":
        return generated_adapter_reference(x, code, heads)
    return forward_for(x, size_a)(x, code, *heads[:4], *generated_biases(code, heads))[0]


def share_heads(
    code: Tensor, heads: AdapterHeads, length: int, backend: str = "auto"
) -> list[tuple[Tensor, AdapterHeads | SharedHeads]]:
    """Prepare the heads for all layers of one forward pass, so that their gradient is computed once for all layers.

    Without it, N layers write N gradients of both heads, and autograd adds them one by one. With it, the heads'
    gradient is one pass over the factors of all layers: it is written once, summed in float32, and each head's
    gradient hook fires once. The result is a plain value. Call this function in each forward pass, outside any
    checkpointed region, and use each layer's pair in one call of `generated_adapter`: a second use of the same pair
    raises an error in the backward pass. Recomputation by non-reentrant activation checkpointing is not a second use.

    Args:
        code: the codes of all layers [N, B, K].
        heads: the hypernetwork's output heads.
        length: T, the number of tokens that every layer will see.
        backend: as for `generated_adapter`.

    Returns:
        N pairs `(code_l, heads_l)` for `generated_adapter(x, *pair)`. Where sharing saves nothing (no gradient is
        needed, the backend is PyTorch, or there are so many tokens that the factors are larger than the generated
        weights), these are the layer's code and the heads themselves.
    """
    code, heads = _autocast_heads(code, heads)
    size_n, size_b, size_k = code.shape
    size_a, size_d = heads.down_bias_bias.shape[0], heads.up_bias_bias.shape[0]
    needs_gradient = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (code, *heads))
    # the factors are 2 T (D + A) numbers per instance and layer; PyTorch would keep 2 D A + T (D + A)
    products = matrix_products_are_faster(code.device.type, length, size_d, size_a)
    factors_are_small = length * (size_d + size_a) <= (4 if products else 1) * size_d * size_a
    if backend == "auto" and not operator_is_faster(code.device.type, code.dtype, length, size_d, size_a):
        backend = "torch"
    shape = Shape(size_b, length, size_d, size_a, size_k, size_n)
    if not needs_gradient or not factors_are_small or resolve_backend(backend, code, *heads, shape=shape) == "torch":
        return [(layer_code, heads) for layer_code in code.unbind()]

    biases = generated_biases(code, heads)
    hidden_bias, out_bias = biases[0].unbind(), biases[1].unbind()  # N x [B, A], N x [B, D]
    count_uses = not torch.compiler.is_compiling()
    tokens = torch.ops.hdscale.generated_adapter_tokens(code, *heads[:4], length, size_a, count_uses)
    step = len(tokens) // size_n
    # the layers compute with detached values: the gradient of codes and heads arrives through the tokens
    fixed = AdapterHeads(*(tensor.detach() for tensor in heads))
    return [
        (
            layer_code,
            SharedHeads(fixed, hidden_bias[layer], out_bias[layer], tokens[layer * step : (layer + 1) * step]),
        )
        for layer, layer_code in enumerate(code.detach().unbind())
    ]


def generated_biases(code: Tensor, heads: AdapterHeads) -> tuple[Tensor, Tensor]:
    """The generated biases [..., A] and [..., D], in float32 for bfloat16 heads.

    Their gradients are then summed in float32, over instances and layers, and rounded once.
    """
    wide = at_least_float32(code.dtype)
    with torch.autocast(code.device.type, enabled=False):
        code = code.to(wide)
        return (
            F.linear(code, heads.down_bias_weight.to(wide), heads.down_bias_bias.to(wide)),
            F.linear(code, heads.up_bias_weight.to(wide), heads.up_bias_bias.to(wide)),
        )


def _autocast(x: Tensor) -> Tensor:
    """Under autocast, a tensor in its number type, as a matrix product would take it."""
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


def _autocast_heads(code: Tensor, heads: AdapterHeads) -> tuple[Tensor, AdapterHeads]:
    """The same for codes and heads; in `share_heads` once for all layers."""
    return _autocast(code), AdapterHeads(*(_autocast(tensor) for tensor in heads))
