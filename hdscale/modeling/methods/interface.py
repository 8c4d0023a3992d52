"""What every method implements."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from hdscale.modeling.adaptation import Adaptation
from hdscale.modeling.config import HyperdecoderConfig

Encode = Callable[[Adaptation | None], Tensor]
"""Runs the base's encoder on the batch at hand with an adaptation: -> hidden states [B, S, D]."""


class Method(nn.Module):
    """An adaptation method: its trainables, and how they adapt the two stacks for a batch.

    Args:
        config: base, method and tasks.
        base: the base model (already frozen); only its configuration and modules may be read.
    """

    needs_tasks = False
    """Whether task ids condition the method (then a batch must bring them)."""
    trains_base = False
    """Whether some of the base's own parameters train (`base_trainables`)."""

    def __init__(self, config: HyperdecoderConfig, base: nn.Module) -> None:
        super().__init__()

    @classmethod
    def check(cls, config: HyperdecoderConfig) -> None:
        """Raise UserError for options that the method does not have; called before anything is loaded."""

    def encode(self, encode: Encode, mask: Tensor, task_ids: Tensor | None) -> Tensor:
        """Hidden states [B, S, D] of the adapted encoder.

        Args:
            encode: runs the base's encoder with an adaptation.
            mask: [B, S], 1 for tokens and 0 for padding.
            task_ids: [B], or None.
        """
        return encode(None)

    def decoder_adaptation(self, hidden: Tensor, mask: Tensor, task_ids: Tensor | None) -> Adaptation | None:
        """What adapts the decoder, given the encoding [B, S, D]."""
        return None

    def embed(self, hidden: Tensor, mask: Tensor, task_ids: Tensor | None) -> Tensor:
        """The vector [B, D] that conditions the decoder; the masked mean where nothing does."""
        raise NotImplementedError

    def parts(self) -> dict[str, int]:
        """Trainable parameters of the method by part, for `hdscale params`."""
        return {name: sum(p.numel() for p in module.parameters()) for name, module in self.named_children()}

    def base_trainables(self, base: nn.Module) -> list[str]:
        """Names of the base's own parameters that the method trains (none, for most)."""
        return []
