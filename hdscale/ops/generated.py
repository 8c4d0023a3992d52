"""The operator as the model calls it: choice of backend, autocast, and heads shared by all layers of a
forward pass.

Shape legend: N layers, B instances, T tokens, D model size, A adapter size, K hypernetwork bottleneck.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hdscale.ops.backend import resolve_backend
from hdscale.ops.naive import AdapterHeads, generated_adapter_reference
from hdscale.ops.operator import by_products, forward_for, gains, wide_type
from hdscale.ops.verify import Shape


class SharedHeads(NamedTuple):
    """One layer's claim on heads that all layers of a forward pass share (see `share_heads`)."""

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
        backend: `auto` (the compiled operator where it can be had, takes these tensors and gains something,
            else PyTorch; it gains for few tokens, see `gains` in `hdscale/ops/operator.py`), `cpp`, `cuda` or `torch`.

    Returns:
        y [B, T, D], without the residual. The compiled operator keeps x, code and [B, T, A] for the backward
        pass and generates the adapters again; PyTorch keeps the generated adapters.

    Raises:
        UserError: the named backend is not to be had here.
    """
    if isinstance(heads, SharedHeads):
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(code.dtype)
        return torch.ops.hdscale.generated_adapter_shared(
            x, code, *heads.heads[:4], heads.hidden_bias, heads.out_bias, heads.tokens
        )[0]
    x, code, heads = _autocast(x, code, heads)
    size_b, size_t, size_d = x.shape
    size_a = heads.down_bias_bias.shape[0]
    shape = Shape(size_b, size_t, size_d, size_a, code.shape[-1])
    gain = gains(x.device.type, x.dtype, size_t, size_d, size_a)
    if (backend == "auto" and not gain) or resolve_backend(backend, x, code, *heads, shape=shape) == "torch":
        return generated_adapter_reference(x, code, heads)
    return forward_for(x, size_a)(x, code, *heads[:4], *generated_biases(code, heads))[0]


def share_heads(
    code: Tensor, heads: AdapterHeads, length: int, backend: str = "auto"
) -> list[tuple[Tensor, AdapterHeads | SharedHeads]]:
    """Prepare the heads for all layers of one forward pass, so that their gradient is formed once, for all
    layers.

    Without it, N layers write N gradients of both heads and autograd adds them, one after the other. With it,
    the heads' gradient is one pass over all layers' factors: it is written once, summed in float32, and each
    head's gradient hook fires once. The result is a plain value: call it at each forward pass, outside any
    checkpointed region, and use each layer's pair in one call of `generated_adapter` (a second use of the
    same pair raises in the backward pass; a recomputation by non-reentrant activation checkpointing does not
    count as one).

    Args:
        code: the codes of all layers [N, B, K].
        heads: the hypernetwork's output heads.
        length: T, the number of tokens that every layer will see.
        backend: as for `generated_adapter`.

    Returns:
        N pairs `(code_l, heads_l)` for `generated_adapter(x, *pair)`. Where sharing gains nothing (no
        gradient wanted, the PyTorch backend, or so many tokens that the factors outgrow the generated
        weights) these are simply the layer's code and the heads.
    """
    _, code, heads = _autocast(None, code, heads)
    size_n, size_b, size_k = code.shape
    size_a, size_d = heads.down_bias_bias.shape[0], heads.up_bias_bias.shape[0]
    wanted = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (code, *heads))
    # The factors are 2 T (D + A) numbers for each instance and layer; what PyTorch would keep, 2 D A + T (D + A).
    products = by_products(code.device.type, length, size_d, size_a)
    factors_are_small = length * (size_d + size_a) <= (4 if products else 1) * size_d * size_a
    if backend == "auto" and not gains(code.device.type, code.dtype, length, size_d, size_a):
        backend = "torch"
    shape = Shape(size_b, length, size_d, size_a, size_k, size_n)
    if not wanted or not factors_are_small or resolve_backend(backend, code, *heads, shape=shape) == "torch":
        return [(layer_code, heads) for layer_code in code.unbind()]

    biases = generated_biases(code, heads)
    hidden_bias, out_bias = biases[0].unbind(), biases[1].unbind()  # N x [B, A], N x [B, D]
    count_uses = not torch.compiler.is_compiling()
    tokens = torch.ops.hdscale.generated_adapter_tokens(code, *heads[:4], length, size_a, count_uses)
    step = len(tokens) // size_n
    # the layers compute with the values alone: the gradient of codes and heads arrives through the tokens
    fixed = AdapterHeads(*(tensor.detach() for tensor in heads))
    return [
        (
            layer_code,
            SharedHeads(fixed, hidden_bias[layer], out_bias[layer], tokens[layer * step : (layer + 1) * step]),
        )
        for layer, layer_code in enumerate(code.detach().unbind())
    ]


def generated_biases(code: Tensor, heads: AdapterHeads) -> tuple[Tensor, Tensor]:
    """[..., A] and [..., D], in float32 for bfloat16 heads: so their gradients are summed in float32, over instances
    and layers, and rounded once."""
    wide = wide_type(code.dtype)
    with torch.autocast(code.device.type, enabled=False):
        code = code.to(wide)
        return (
            F.linear(code, heads.down_bias_weight.to(wide), heads.down_bias_bias.to(wide)),
            F.linear(code, heads.up_bias_weight.to(wide), heads.up_bias_bias.to(wide)),
        )


def _autocast(x: Tensor | None, code: Tensor, heads: AdapterHeads) -> tuple[Tensor | None, Tensor, AdapterHeads]:
    """Under autocast, everything in its dtype: like a matrix product, and once for all layers in
    `share_heads`."""
    device = code.device.type
    if not torch.is_autocast_enabled(device):
        return x, code, heads
    dtype = torch.get_autocast_dtype(device)
    x = x if x is None else x.to(dtype)
    return x, code.to(dtype), AdapterHeads(*(tensor.to(dtype) for tensor in heads))
