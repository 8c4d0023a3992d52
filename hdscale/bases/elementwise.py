"""Layer norm and GELU as one operation each.

Transformers spells both out: GELU is eight operations that keep four tensors of size F for the backward pass where its input would
do, the norm is six that keep a float32 copy of what they read. Both are bound by memory's speed, so each operation less is time
as well.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.activations import NewGELUActivation


class OneStepNorm:
    """Mixin over T5LayerNorm and MT5LayerNorm: by the root mean square, without mean and bias."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[..., D] -> [..., D], up to rounding what transformers gives."""
        # weights that train beside a base in bf16 are float32; of float64 transformers takes the mean in float32
        if self.weight.dtype != hidden_states.dtype or hidden_states.dtype == torch.float64:
            return super().forward(hidden_states)
        return functional.rms_norm(hidden_states, hidden_states.shape[-1:], self.weight, self.variance_epsilon)


def one_step_activation(module: nn.Module) -> nn.Module:
    """The same activation as one operation, where there is one."""
    return nn.GELU(approximate="tanh") if isinstance(module, NewGELUActivation) else module
