"""Several linears of one input as one matrix product, where their weights are frozen and lie on a GPU.

The product is one launch instead of two or three, forward and backward. Nothing is kept twice: the weights move into
one tensor, and each of them becomes a view of its rows, with the same name and the same bits. A CPU gains nothing by
it, and there the weights may be mapped from a file, which a copy would undo.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

JOINED_ON = {"cuda"}
"""Types of devices on which weights are joined, and sums are formed within products: those that launches limit."""


def together(x: Tensor, *linears: nn.Linear) -> tuple[Tensor, ...]:
    """The outputs of linears without biases that read the same x [N, in]; views of one tensor where they are joined."""
    joined = joined_product(x, *linears)
    if joined is None:
        return tuple(F.linear(x, linear.weight) for linear in linears)
    return joined.split([linear.out_features for linear in linears], dim=-1)


def add_product(x: Tensor, hidden: Tensor, linear: nn.Linear, plain: bool) -> tuple[Tensor, Tensor | None]:
    """A residual stream x and what is still to be added to it: the output of a linear, (x, y), or (x + y, None).

    Args:
        x: [N, D].
        hidden: [N, in], what the linear reads.
        linear: [D, in].
        plain: whether y is added as it is, without dropout or a hook; in inference a GPU then adds within the product.
    """
    if plain and x.device.type in JOINED_ON and not torch.is_grad_enabled():
        return torch.addmm(x, hidden, linear.weight.t()), None
    return x, F.linear(hidden, linear.weight)


def joined_product(x: Tensor, *linears: nn.Linear) -> Tensor | None:
    """The outputs of linears side by side, [N, the sum of their sizes]; None where they are not to be joined."""
    weight = joined_weight(*linears)
    return None if weight is None else F.linear(x, weight)


def joined_weight(*linears: nn.Linear) -> Tensor | None:
    """The weights of linears one below the other, as a view of where they are; None if they are not to be joined."""
    # `get`, as the look-up by index or attribute makes DeepSpeed's stage 3 gather a weight
    weights = [linear._parameters.get("weight") for linear in linears]
    first = weights[0]
    assert first is not None
    if first.device.type not in JOINED_ON:
        return None
    place = start = first.data_ptr()
    adjacent = True
    for weight in weights:
        assert weight is not None
        if weight.requires_grad or hasattr(weight, "ds_id"):
            return None  # trained weights need gradients of their own, and DeepSpeed's stage 3 moves weights by itself
        adjacent = adjacent and weight.data_ptr() == place
        place += weight.numel() * weight.element_size()
    # remembered beside the parameters, not among them: a state dict has the single weights
    remembered: dict[int, Tensor] = linears[0].__dict__.setdefault("joined_weights", {})
    found = remembered.get(len(linears))
    if not adjacent or found is None or found.data_ptr() != start:
        found = remembered[len(linears)] = join(linears, adjacent)
    return found


@torch.inference_mode(False)
@torch.no_grad()
def join(linears: Sequence[nn.Linear], adjacent: bool) -> Tensor:
    """The weights of linears as one tensor, into which they are moved if they are not in one already.

    Args:
        linears: of one input.
        adjacent: whether their weights follow each other in memory.
    """
    first, rows = linears[0].weight, sum(linear.out_features for linear in linears)
    storage = first.untyped_storage()
    if adjacent and all(linear.weight.untyped_storage().data_ptr() == storage.data_ptr() for linear in linears):
        return first.detach().as_strided((rows, first.shape[1]), first.stride())
    joined = torch.cat([linear.weight for linear in linears])
    start = 0
    for linear in linears:
        linear.weight.data = joined[start : start + linear.out_features]
        start += linear.out_features
    return joined
