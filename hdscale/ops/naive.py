"""The plain-PyTorch definition of generated adapters: kernels are compared with it, and it runs where there are none.

Shape legend: B instances, R rows (instances times beams), T tokens, D model size, A adapter size, K hypernetwork
bottleneck, N layers.

The hypernetwork's four heads turn the code `h` of an instance and a layer into that instance's adapter (Eq. 3-7 of the
paper):

    down = W_down h + c_down  as [D, A]        up   = W_up h + c_up  as [A, D]
    b_d  = V_down h + v_down  [A]              b_u  = V_up h + v_up  [D]
    y    = ReLU(x down + b_d) up + b_u
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Shape(NamedTuple):
    """Sizes of a call: instances, tokens, model, adapter, bottleneck, layers."""

    B: int
    T: int
    D: int
    A: int
    K: int
    N: int = 1


class AdapterHeads(NamedTuple):
    """Weights of the hypernetwork's four output heads, in `torch.nn.Linear`'s layout [out, in]."""

    down_weight: Tensor  # [D*A, K]; a generated down projection is viewed as [D, A]
    down_bias: Tensor  # [D*A]
    up_weight: Tensor  # [A*D, K]; a generated up projection is viewed as [A, D]
    up_bias: Tensor  # [A*D]
    down_bias_weight: Tensor  # [A, K]
    down_bias_bias: Tensor  # [A]
    up_bias_weight: Tensor  # [D, K]
    up_bias_bias: Tensor  # [D]


class AdapterWeights(NamedTuple):
    """One layer's adapters, generated for B instances."""

    down: Tensor  # [B, D, A]
    down_bias: Tensor  # [B, A]
    up: Tensor  # [B, A, D]
    up_bias: Tensor  # [B, D]


def generate_adapter_weights(code: Tensor, heads: AdapterHeads) -> AdapterWeights:
    """Generate the adapters of B instances (Eq. 5-7), to be applied many times by `apply_adapter`.

    Args:
        code: the hypernetwork's hidden vector for one layer [B, K].
        heads: the hypernetwork's output heads.
    """
    size_a, size_d = heads.down_bias_bias.shape[0], heads.up_bias_bias.shape[0]
    return AdapterWeights(
        down=F.linear(code, heads.down_weight, heads.down_bias).view(-1, size_d, size_a),
        down_bias=F.linear(code, heads.down_bias_weight, heads.down_bias_bias),
        up=F.linear(code, heads.up_weight, heads.up_bias).view(-1, size_a, size_d),
        up_bias=F.linear(code, heads.up_bias_weight, heads.up_bias_bias),
    )


def group_by_instance(x: Tensor, instances: int) -> Tensor:
    """The tokens of each instance as one matrix: x [N, C] or [R, L, C] -> [B, N / B, C], without a copy.

    The tokens of an instance are adjacent. So are its beams: row r belongs to instance r // (R / B).

    Raises:
        ValueError: if the rows cannot be divided evenly among B instances.
    """
    rows = x.shape[0]
    if x.dim() == 3 and rows == instances:
        return x
    if (instances == 0 and rows) or (instances and rows % instances):
        raise ValueError(f"{rows} rows cannot be divided evenly among {instances} instances")
    return x.reshape(instances, x.numel() // max(instances * x.shape[-1], 1), x.shape[-1])


def apply_adapter(x: Tensor, weights: AdapterWeights) -> Tensor:
    """Apply generated adapters, one per instance, to R rows of tokens.

    Args:
        x: hidden states [N, D] or [R, T, D] (see `group_by_instance`).
        weights: the adapters of B instances.

    Returns:
        the same shape as x, without the residual.

    Raises:
        ValueError: if R is not a multiple of B.
    """
    grouped = group_by_instance(x, weights.down.shape[0])
    hidden = torch.relu(torch.baddbmm(weights.down_bias.unsqueeze(1), grouped, weights.down))
    return torch.baddbmm(weights.up_bias.unsqueeze(1), hidden, weights.up).view(x.shape)


def generated_adapter_reference(x: Tensor, code: Tensor, heads: AdapterHeads) -> Tensor:
    """Generate one layer's adapters for B instances and apply them: x [B, T, D], code [B, K] -> y [B, T, D].

    Autograd keeps every generated weight until the backward pass: 2*B*D*A numbers per layer. The compiled operator
    avoids that.
    """
    return apply_adapter(x, generate_adapter_weights(code, heads))
