"""Transformers' `generate` over a base: beams, sampling, and whatever else it searches with."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.cache_utils import EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput

from hdscale.bases.interface import Adaptation, Base, Encoding


def generate(base: Base, encoding: Encoding, adaptation: Adaptation | None, **arguments: Any) -> Tensor:
    """Token ids [R, T'] that transformers' `generate` finds, the decoder's start token first.

    Args:
        base: whose decoder and head are used.
        encoding: of B instances.
        adaptation: of the decoder, made by `for_generation`; the beams of an instance share its part.
        **arguments: of transformers' `generate`.
    """
    searched: Any = Searched(base)
    ids = searched.generate(
        encoder_outputs=BaseModelOutput(last_hidden_state=encoding.hidden),
        attention_mask=encoding.mask,
        adaptation=adaptation,
        **arguments,
    )
    return cast(Tensor, ids)


class Searched(PreTrainedModel, GenerationMixin):
    """A base as transformers' `generate` sees it: a decoder with a cache."""

    main_input_name = "input_ids"
    _supports_sdpa = True

    def __init__(self, base: Base) -> None:
        super().__init__(base.config)
        self.searched = [base]  # in a list, as the base's modules are not this one's
        self.generation_config = base.generation_config or GenerationConfig.from_model_config(base.config)
        self.eval()

    @property
    def base(self) -> Base:
        """The base that is searched."""
        return self.searched[0]

    @property
    def device(self) -> torch.device:
        return next(self.base.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.base.parameters()).dtype

    def get_encoder(self, modality: str | None = None) -> Any:
        """`generate` asks for it, and does not call it where the encoding is given."""
        return self.base

    def forward(
        self,
        decoder_input_ids: Tensor,
        encoder_outputs: Any = None,
        attention_mask: Tensor | None = None,
        past_key_values: EncoderDecoderCache | None = None,
        cache: EncoderDecoderCache | None = None,
        adaptation: Adaptation | None = None,
        **ignored: Any,
    ) -> Seq2SeqLMOutput:
        """Logits [R, T, V] of the next tokens. The cache has one name up to transformers 5.23, and another after it."""
        known = cache if past_key_values is None else past_key_values
        assert attention_mask is not None
        encoding = Encoding(encoder_outputs[0], attention_mask)
        if known is None:
            hidden = self.base.decode(decoder_input_ids, encoding, adaptation)
        else:
            hidden = self.base.decode_with_cache(decoder_input_ids, encoding, adaptation, known)
        return Seq2SeqLMOutput(logits=self.base.head(hidden), past_key_values=known)
