"""AdamW on the trainables, and the learning rate as a function of the step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import nn

from hdscale.engine.settings import TrainSettings
from hdscale.errors import UserError

EPSILON = 1e-8
"""AdamW's epsilon, torch's default."""


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """{name: parameter} of whatever is trained, in the model's own order; a tied parameter stands once."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def learning_rate_factor(step: int, warmup_steps: int, max_steps: int) -> float:
    """Share of the peak learning rate at the update number `step` (counted from 0): linear up, then linear to 0.

    The convention is transformers' `get_linear_schedule_with_warmup`, which the paper's release trained with: the
    first update of a warm-up has rate 0. Being a function of the step alone, it needs no state in a checkpoint.
    """
    if step < warmup_steps:
        return step / max(1, warmup_steps)
    return max(0.0, (max_steps - step) / max(1, max_steps - warmup_steps))


def uncorrected_epsilon(step: int, beta2: float) -> float:
    """The epsilon with which torch's AdamW makes the update number `step` (from 0) of transformers' old AdamW.

    That one adds epsilon to sqrt(v), torch's to sqrt(v / (1 - beta2^t)), t = step + 1: the same number over
    sqrt(1 - beta2^t) gives the same update.
    """
    return EPSILON / math.sqrt(1.0 - beta2 ** (step + 1))


def build_optimizer(model: nn.Module, train: TrainSettings, fused: bool) -> torch.optim.AdamW:
    """torch's AdamW on the trainables.

    A model may give some of its trainables a peak learning rate of their own by a method
    `learning_rates(default) -> {name: rate}`; each rate becomes one parameter group, which keeps its peak in `peak_lr`.

    Raises:
        UserError: if nothing is trainable.
        KeyError: if the model names a parameter that is not trainable.
    """
    parameters = trainable_parameters(model)
    if not parameters:
        raise UserError("the method has no trainable parameters; choose another method.name or larger sizes")
    learning_rates: Callable[[float], Mapping[str, float]] | None = getattr(model, "learning_rates", None)
    own_rates = learning_rates(train.learning_rate) if learning_rates else {}
    unknown = [name for name in own_rates if name not in parameters]
    if unknown:
        raise KeyError(f"learning_rates() names parameters that are not trained: {unknown[:5]}")
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        groups.setdefault(float(own_rates.get(name, train.learning_rate)), []).append(parameter)
    return torch.optim.AdamW(
        [{"params": members, "lr": rate, "peak_lr": rate} for rate, members in groups.items()],
        eps=EPSILON,
        weight_decay=train.weight_decay,
        fused=fused,
    )
