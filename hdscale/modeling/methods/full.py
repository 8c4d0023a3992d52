"""Full fine-tuning: every parameter of the base trains (tied ones once)."""

from __future__ import annotations

from torch import nn

from hdscale.modeling.methods.interface import Method


class FullFinetuning(Method):
    """The base itself, all of it trained."""

    trains_base = True

    def base_trainables(self, base: nn.Module) -> list[str]:
        return [name for name, _ in base.named_parameters()]
