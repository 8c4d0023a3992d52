"""Several linears of one input as one matrix product, where their weights are frozen and lie on a GPU.

The product is one launch instead of two or three, forward and backward. Nothing is kept twice: the weights move into
one tensor, and each of them becomes a view of its rows, with the same name and the same bits. A CPU gains nothing by
it, and there the weights may be mapped from a file, which a copy would undo.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

JOINED_ON = {"cuda"}
"""Types of devices on which weights are joined."""


def together(x: Tensor, *linears: nn.Linear) -> tuple[Tensor, ...]:
    """The outputs of linears without biases that read the same x [N, in]; views of one tensor where they are joined."""
    weight = joined_weight(*linears)
    if weight is None:
        return tuple(F.linear(x, linear.weight) for linear in linears)
    return F.linear(x, weight).split([linear.out_features for linear in linears], dim=-1)


def joined_weight(*linears: nn.Linear) -> Tensor | None:
    """The weights of linears one below the other, as a view of where they are; None if they are not to be joined."""
    weights = [linear._parameters["weight"] for linear in linears]
    first = weights[0]
    assert first is not None
    if first.device.type not in JOINED_ON:
        return None
    joined: Tensor | None = linears[0].__dict__.get("joined_weight")
    place = 0 if joined is None else joined.data_ptr()
    for weight in weights:
        assert weight is not None
        if weight.requires_grad or hasattr(weight, "ds_id"):
            # trained weights need gradients of their own, and DeepSpeed's stage 3 moves weights by itself
            linears[0].__dict__.pop("joined_weight", None)
            return None
        if weight.data_ptr() != place:
            return join(*linears)
        place += weight.numel() * weight.element_size()
    return joined


@torch.inference_mode(False)
@torch.no_grad()
def join(*linears: nn.Linear) -> Tensor:
    """Move the weights of linears into one tensor, and return it."""
    joined = torch.cat([linear.weight for linear in linears])
    start = 0
    for linear in linears:
        linear.weight.data = joined[start : start + linear.out_features]
        start += linear.out_features
    # beside the parameters, not among them: a state dict has the single weights
    linears[0].__dict__["joined_weight"] = joined
    return joined
