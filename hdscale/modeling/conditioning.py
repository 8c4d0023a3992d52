"""What the hypernetwork is conditioned on: the pooled encoding and its MLP (Eq. 8)."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def masked_mean(hidden: Tensor, mask: Tensor) -> Tensor:
    """Mean over the tokens that are not padding: hidden [B, S, D], mask [B, S] -> [B, D], summed in float32."""
    weight = mask.unsqueeze(-1).to(torch.float32 if hidden.dtype in (torch.bfloat16, torch.float16) else hidden.dtype)
    total = (hidden.to(weight.dtype) * weight).sum(dim=1)
    return (total / weight.sum(dim=1).clamp(min=1.0)).to(hidden.dtype)


class EncodingEmbedding(nn.Module):
    """`e = MLP(mean(h))` (Eq. 8): Linear, ReLU, Linear, all of size D; without the MLP, `e = mean(h)` (Table 9)."""

    def __init__(self, d_model: int, mlp: bool = True) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(d_model, d_model), nn.ReLU(), nn.Linear(d_model, d_model)) if mlp else None

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """hidden [B, S, D] (after the encoder's final layer norm), mask [B, S] -> e [B, D]."""
        pooled = masked_mean(hidden, mask)
        return pooled if self.mlp is None else self.mlp(pooled)
