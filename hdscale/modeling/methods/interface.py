"""What every method implements."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from hdscale.bases.interface import Adaptation, Base
from hdscale.modeling.conditioning import masked_mean
from hdscale.modeling.config import HyperdecoderConfig
from hdscale.modeling.settings import MethodSettings

RunEncoder = Callable[[Adaptation | None], Tensor]
"""Runs the base's encoder on the current batch with an adaptation: -> hidden states [B, S, D]."""


class Method(nn.Module):
    """An adaptation method: its trainable parameters, and how they adapt the two stacks for a batch.

    Args:
        config: base, method and tasks.
        base: the base model (already frozen); only its sizes may be read.
    """

    needs_tasks = False
    """Whether the method is conditioned on task ids, so that every batch needs them."""
    trains_base = False
    """Whether some of the base's own parameters may be trained (see `base_trainables`)."""

    fixed: dict[str, Any] = {}
    """Options of `method.*` whose values follow from the method's name."""

    def __init__(self, config: HyperdecoderConfig, base: Base) -> None:
        super().__init__()

    @classmethod
    def options(cls, settings: MethodSettings) -> list[str]:
        """The options of `method.*` that the method has: keys, or beginnings of keys such as `decoder`."""
        return []

    @classmethod
    def sizes(cls, settings: MethodSettings) -> list[list[str]]:
        """Sizes that a budget can solve for, each a list of keys that get the same value; the default first."""
        return []

    @classmethod
    def encoder_knows_instances(cls, settings: MethodSettings) -> bool:
        """Whether the encoder's adaptation differs between the instances of a batch; then it cannot be packed."""
        return True

    @classmethod
    def check_values(cls, config: HyperdecoderConfig) -> None:
        """Raise UserError for values of options that do not fit each other, the base, or the tasks."""

    def encode(self, run_encoder: RunEncoder, mask: Tensor, task_ids: Tensor | None) -> Tensor:
        """Hidden states [B, S, D] of the adapted encoder.

        Args:
            run_encoder: runs the base's encoder with an adaptation.
            mask: [B, S], 1 for tokens and 0 for padding.
            task_ids: [B], or None.
        """
        return run_encoder(None)

    def decoder_adaptation(self, hidden: Tensor, mask: Tensor, task_ids: Tensor | None) -> Adaptation | None:
        """The decoder's adaptation, given the encoding [B, S, D]."""
        return None

    def embed(self, hidden: Tensor, mask: Tensor, task_ids: Tensor | None) -> Tensor:
        """The vector [B, D] that conditions the decoder; the masked mean for methods without conditioning."""
        return masked_mean(hidden, mask)

    def learning_rates(self, default: float) -> dict[str, float]:
        """Peak learning rates {parameter of the method: rate} that differ from `train.learning_rate`."""
        return {}

    def parts(self) -> dict[str, int]:
        """Number of trainable parameters by part of the method, for `hdscale params`."""
        return {name: sum(p.numel() for p in module.parameters()) for name, module in self.named_children()}

    def base_trainables(self, base: Base) -> list[str]:
        """Names of the base's own parameters that the method trains (for most methods none)."""
        return []


def required(task_ids: Tensor | None) -> Tensor:
    """The task ids of a method that needs them; `AdaptedModel.encode` has checked that they are given."""
    assert task_ids is not None
    return task_ids
