"""The steps of a layer between its products, as functions of tensors: the places of fused kernels.

Each is one operation of torch where there is one. Transformers writes GELU as eight operations that keep four tensors
of size F for the backward pass, where its input would be enough, and the norm as six that keep a float32 copy of its
input.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.activations import ACT2FN

from hdscale.bases.dropout import dropout as dropped

MOST_GRAPHS = 32
"""Graphs of one function before torch stops compiling it: with and without mask or gradient, with one row or many."""


def norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """[N, D] -> [N, D]: division by the root mean square, no mean, no bias."""
    if weight.dtype != x.dtype:
        weight = weight.to(x.dtype)
    return torch.rms_norm(x, x.shape[-1:], weight, epsilon)


def add_norm(
    x: Tensor, y: Tensor | None, weight: Tensor, epsilon: float, dropout: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Close a residual and norm it.

    Args:
        x: [N, D], the residual stream.
        y: [N, D], the output of the last sub-layer; None: x is complete.
        weight: [D], of the norm.
        epsilon: of the norm.
        dropout: of y.

    Returns:
        x + dropout(y), and its norm: both [N, D].
    """
    if y is not None:
        x = x + dropped(y, dropout)
    return x, norm(x, weight, epsilon)


@functools.cache
def activation(name: str, gated: bool) -> Callable[..., Tensor]:
    """The feed-forward's function between its products: (hidden, dropout) -> [N, F].

    `hidden` is (a, b), each [N, F], for dropout(activation(a) * b), or (a,) for dropout(activation(a)).

    Args:
        name: of the activation, in transformers.
        gated: whether b multiplies it.
    """
    function: Callable[[Tensor], Tensor]
    if name == "gelu_new":
        function = functools.partial(F.gelu, approximate="tanh")
    else:
        function = torch.relu if name == "relu" else ACT2FN[name]

    def apply(hidden: tuple[Tensor, ...], dropout: float = 0.0) -> Tensor:
        product = function(hidden[0]) * hidden[1] if gated else function(hidden[0])
        return dropped(product, dropout)

    return apply


class Steps(NamedTuple):
    """The functions that a layer calls between its products."""

    add_norm: Callable[..., tuple[Tensor, Tensor]]
    activation: Callable[..., Tensor]


@functools.cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that is compiled, once for all layers and lengths, when a gradient is needed."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MOST_GRAPHS)
    fast = torch.compile(function, dynamic=True)

    @functools.wraps(function)
    def choose(*args: Any, **kwargs: Any) -> Any:
        return (fast if torch.is_grad_enabled() else function)(*args, **kwargs)

    return choose
