"""The operator as the model calls it: choice of backend, autocast, and heads shared by all layers of a
forward pass.

Shape legend: N layers, B instances, T tokens, D model size, A adapter size, K hypernetwork bottleneck.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hdscale.ops import operator  # noqa: F401  (defines torch.ops.hdscale)
from hdscale.ops.backend import few_tokens, resolve_backend
from hdscale.ops.reference import AdapterHeads, generated_adapter_reference


class SharedHeads(NamedTuple):
    """One layer's claim on heads that all layers of a forward pass share (see `share_heads`)."""

    heads: AdapterHeads
    hidden_bias: Tensor  # [B, A], generated
    out_bias: Tensor  # [B, D], generated
    tokens: list[Tensor]  # carry this layer's part of the heads' gradient; see hdscale/ops/operator.py


def generated_adapter(x: Tensor, code: Tensor, heads: AdapterHeads | SharedHeads, backend: str = "auto") -> Tensor:
    """Generate one layer's adapters for B instances and apply them (Eq. 3-7).

    Args:
        x: hidden states [B, T, D].
        code: the hypernetwork's hidden vector for this layer [B, K].
        heads: the hypernetwork's output heads, or one of the pairs that `share_heads` returned:
            `generated_adapter(x, *layers[l])`.
        backend: `auto` (the compiled operator where it can be had, takes these tensors and gains something,
            else PyTorch; it gains for few tokens, see `few_tokens`), `cpp`, `cuda` or `torch`.

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
    few = few_tokens(x.shape[1], x.shape[2], heads.down_bias_bias.shape[0])
    if (backend == "auto" and not few) or resolve_backend(backend, x, code, *heads) == "torch":
        return generated_adapter_reference(x, code, heads)
    hidden_bias = F.linear(code, heads.down_bias_weight, heads.down_bias_bias)
    out_bias = F.linear(code, heads.up_bias_weight, heads.up_bias_bias)
    return torch.ops.hdscale.generated_adapter(x, code, *heads[:4], hidden_bias, out_bias)[0]


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
    size_n, size_a, size_d = code.shape[0], heads.down_bias_bias.shape[0], heads.up_bias_bias.shape[0]
    wanted = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (code, *heads))
    factors_are_small = few_tokens(length, size_d, size_a)
    if not wanted or not factors_are_small or resolve_backend(backend, code, *heads) == "torch":
        return [(layer_code, heads) for layer_code in code.unbind()]

    hidden_bias = F.linear(code, heads.down_bias_weight, heads.down_bias_bias).unbind()  # N x [B, A]
    out_bias = F.linear(code, heads.up_bias_weight, heads.up_bias_bias).unbind()  # N x [B, D]
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


def _autocast(x: Tensor | None, code: Tensor, heads: AdapterHeads) -> tuple[Tensor | None, Tensor, AdapterHeads]:
    """Under autocast, everything in its dtype: like a matrix product, and once for all layers in
    `share_heads`."""
    device = code.device.type
    if not torch.is_autocast_enabled(device):
        return x, code, heads
    dtype = torch.get_autocast_dtype(device)
    x = x if x is None else x.to(dtype)
    return x, code.to(dtype), AdapterHeads(*(tensor.to(dtype) for tensor in heads))
