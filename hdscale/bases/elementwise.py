"""Layer norm and GELU as one operation each.

Transformers writes GELU as eight operations that keep four tensors of size F for the backward pass, where its input
would be enough, and the norm as six operations that keep a float32 copy of their input. Both are limited by memory
bandwidth, so each operation less saves time as well.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.activations import NewGELUActivation


class OneStepNorm(nn.Module):
    """Before T5LayerNorm or MT5LayerNorm among a class's bases: division by the root mean square, no mean, no bias."""

    weight: Tensor
    variance_epsilon: float

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[..., D] -> [..., D], equal to transformers' result up to rounding."""
        # trained weights are float32 in a bf16 base; for float64, transformers computes the mean in float32
        if self.weight.dtype != hidden_states.dtype or hidden_states.dtype == torch.float64:
            return super().forward(hidden_states)
        return functional.rms_norm(hidden_states, hidden_states.shape[-1:], self.weight, self.variance_epsilon)


def one_step_activation(module: nn.Module) -> nn.Module:
    """The same activation as one operation, if torch has one."""
    return nn.GELU(approximate="tanh") if isinstance(module, NewGELUActivation) else module
