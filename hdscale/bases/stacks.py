"""Transformers' T5 and MT5 stacks, with the attention's additive mask computed once for all layers.

The attention mask and T5's relative position bias are the same in every layer of a stack. Transformers adds the two in
each layer, and autograd keeps each layer's sum, [B, H, S, S], for the backward pass: at 512 tokens more than all other
activations. Here the sum is computed before the first block and passed as the position bias, so that only one copy is
kept. The host does not need to read the mask's values either, which would make it wait for a GPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from hdscale.bases.cross_attention import few_targets
from hdscale.bases.interface import Adaptation


class AdaptedStack:
    """Mixin for T5Stack and MT5Stack. Inputs that it does not support are passed to transformers' own forward."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        adaptation: Adaptation | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPastAndCrossAttentions:
        if input_ids is None or any(kwargs.values()) or not self._is_plain(
            input_ids, attention_mask, encoder_hidden_states, encoder_attention_mask, past_key_values, use_cache
        ):  # fmt: skip
            return super().forward(
                input_ids=input_ids,
                attention_mask=attention_mask,
                encoder_hidden_states=encoder_hidden_states,
                encoder_attention_mask=encoder_attention_mask,
                inputs_embeds=inputs_embeds,
                past_key_values=past_key_values,
                use_cache=use_cache,
                adaptation=adaptation,
                **kwargs,
            )
        x = self.embed_tokens(input_ids)
        seen = past_key_values.get_seq_length() if past_key_values is not None else 0
        length = input_ids.shape[1]
        bias = (
            self.block[0]
            .layer[0]
            .SelfAttention.compute_bias(length, seen + length, device=x.device, past_seen_tokens=seen)
        )
        cross_bias = None
        if self.is_decoder:
            position = torch.arange(seen + length, device=x.device)
            own = masked(bias, position <= position[seen:, None])
            cross_bias = source_mask(encoder_attention_mask, x.dtype)
        else:
            own = bias.contiguous() if attention_mask is None else masked(bias, attention_mask[:, None, None, :].bool())
        x = self.dropout(x)
        # the bias includes the causal mask already
        rest = {"past_key_values": past_key_values, "adaptation": adaptation, "is_causal": False}
        if (
            self.is_decoder
            and past_key_values is None
            and self._source_unprojected(length, encoder_hidden_states, adaptation)
        ):
            rest["source_unprojected"] = True
        for block in self.block:
            x, _, _ = block(x, None, own, encoder_hidden_states, None, cross_bias, **rest)
        x = self.dropout(self.final_layer_norm(x))
        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=x, past_key_values=past_key_values)

    def _source_unprojected(self, targets: int, source: Tensor, adaptation: Adaptation | None) -> bool:
        """Whether cross-attention does not project the source to keys and values: see `unprojected_attention`."""
        if self.config._attn_implementation == "eager" or (adaptation is not None and adaptation.adapts_attention):
            return False
        return few_targets(targets, source.shape[1], self.config.d_kv)

    def _is_plain(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        encoder_hidden_states: Tensor | None,
        encoder_attention_mask: Tensor | None,
        past_key_values: Any,
        use_cache: bool | None,
    ) -> bool:
        """Whether this is a pass over whole sequences without a cache, or over one more token with a cache."""
        if not self.is_decoder:
            return attention_mask is None or attention_mask.dim() == 2
        if attention_mask is not None or encoder_hidden_states is None or encoder_attention_mask is None:
            return False
        if encoder_attention_mask.dim() != 2:
            return False
        if past_key_values is None:
            return not use_cache
        return (
            input_ids.shape[1] == 1
            and isinstance(past_key_values, EncoderDecoderCache)
            and isinstance(past_key_values.get_seq_length(), int)
        )


def masked(bias: Tensor, visible: Tensor) -> Tensor:
    """What is added to the scores: the position bias where a query may see a key, elsewhere the smallest number.

    Args:
        bias: [1, H, L, keys]. visible: boolean, broadcastable to it or to [B, H, L, keys].
    """
    return torch.where(visible, bias, torch.finfo(bias.dtype).min).contiguous()


def source_mask(attention_mask: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, S] -> [B, 1, 1, S]: 0 at tokens, the smallest number at padding. Cross-attention has no position bias."""
    zero = torch.zeros((), dtype=dtype, device=attention_mask.device)
    return torch.where(attention_mask[:, None, None, :].bool(), zero, torch.finfo(dtype).min)
