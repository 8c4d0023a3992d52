"""Learned ("manual") adapters: Eq. 1, in parallel with the feed-forward sub-layer as in Eq. 2."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hdscale.bases.interface import Adaptation

INIT_GAIN = 1e-4
"""Xavier gain of the release: the output of a new adapter is near zero, but not zero."""


class Adapter(nn.Module):
    """`Adapter(x) = up(ReLU(down(x)))` (Eq. 1); [.., D] -> [.., D]."""

    def __init__(self, d_model: int, dim: int) -> None:
        super().__init__()
        self.down = nn.Linear(d_model, dim)
        self.up = nn.Linear(dim, d_model)
        for linear in (self.down, self.up):
            nn.init.xavier_uniform_(linear.weight, gain=INIT_GAIN)
            nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(torch.relu(self.down(x)))


class ManualAdapters(nn.ModuleList):
    """One learned adapter per layer of a stack."""

    def __init__(self, d_model: int, layers: int, dim: int) -> None:
        super().__init__(Adapter(d_model, dim) for _ in range(layers))


class ManualAdaptation(Adaptation):
    """Learned adapters in parallel with the feed-forward sub-layers.

    Args:
        adapters: one for each layer.
        normed_input: the adapters read LayerNorm(x) instead of x ("post-layernorm input", Table 9).
    """

    def __init__(self, adapters: ManualAdapters, normed_input: bool = False) -> None:
        self.adapters = adapters
        self.normed_input = normed_input

    def parallel(self, layer: int, x: Tensor, normed: Tensor) -> Tensor:
        return self.adapters[layer](normed if self.normed_input else x)

    def select(self, rows: Tensor) -> ManualAdaptation:
        return self  # the same for every instance
