"""The plain-PyTorch definition of generated adapters: what every kernel is compared with, and what runs where
no compiler is.

Shape legend: B instances, R rows (instances times beams), T tokens, D model size, A adapter size, K
hypernetwork bottleneck.

The hypernetwork's four heads turn the code `h` of an instance and a layer into that instance's adapter
(paper, Eq. 3-7):

    down = W_down h + c_down  as [D, A]        up   = W_up h + c_up  as [A, D]
    b_d  = V_down h + v_down  [A]              b_u  = V_up h + v_up  [D]
    y    = ReLU(x down + b_d) up + b_u
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


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


def apply_adapter(x: Tensor, weights: AdapterWeights, rows: Tensor | None = None) -> Tensor:
    """Apply generated adapters, one per instance, to R rows of tokens.

    Args:
        x: hidden states [R, T, D].
        weights: the adapters of B instances.
        rows: the instance of each row, int64 [R]. Without it R must be a multiple of B, and row r belongs to
            instance r // (R / B): the layout of beam search, where an instance's beams lie side by side. That
            case gathers nothing: the beams of an instance are tokens of one matrix product.

    Returns:
        [R, T, D], without the residual.

    Raises:
        ValueError: R is no multiple of B and `rows` is not given.
    """
    size_r, size_t, size_d = x.shape
    size_b = weights.down.shape[0]
    if rows is not None:
        weights = AdapterWeights(*(tensor.index_select(0, rows) for tensor in weights))
    elif size_r != size_b:
        if size_b == 0 or size_r % size_b:
            raise ValueError(f"{size_r} rows cannot be shared out evenly to {size_b} instances; pass rows=")
        x = x.reshape(size_b, size_r // size_b * size_t, size_d)
    hidden = torch.relu(torch.baddbmm(weights.down_bias.unsqueeze(1), x, weights.down))
    y = torch.baddbmm(weights.up_bias.unsqueeze(1), hidden, weights.up)
    return y.view(size_r, size_t, size_d)


def generated_adapter_reference(x: Tensor, code: Tensor, heads: AdapterHeads) -> Tensor:
    """Generate one layer's adapters for B instances and apply them: x [B, T, D], code [B, K] -> y [B, T, D].

    Autograd keeps every generated weight until the backward pass (2*B*D*A numbers a layer); the compiled
    operator exists so that it need not.
    """
    return apply_adapter(x, generate_adapter_weights(code, heads))
