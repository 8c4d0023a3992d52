"""Greedy decoding in one small loop: what label tasks need, without the machinery of transformers' `generate`."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

from hdscale.modeling.adaptation import Adaptation
from hdscale.modeling.base import scales_output


def greedy_decode(
    base: nn.Module,
    hidden: Tensor,
    attention_mask: Tensor,
    adaptation: Adaptation | None,
    max_new_tokens: int,
    min_new_tokens: int = 0,
) -> Tensor:
    """The likeliest token at each position, until every row has ended; the same tokens as transformers' greedy search.

    Args:
        base: the T5-family model.
        hidden: [B, S, D], the encoding.
        attention_mask: [B, S].
        adaptation: of the decoder, its adapters generated already (`for_generation`).
        max_new_tokens: most tokens of a row, </s> included.
        min_new_tokens: tokens before </s> is allowed.

    Returns:
        token ids [B, 1 + T'], the decoder's start token first, padded behind </s>.
    """
    config = base.config
    rows = hidden.shape[0]
    ids = torch.full((rows, 1), config.decoder_start_token_id, dtype=torch.long, device=hidden.device)
    cache = EncoderDecoderCache(DynamicCache(config=base.decoder.config), DynamicCache(config=base.decoder.config))
    ended = torch.zeros(rows, dtype=torch.bool, device=hidden.device)
    scale = config.d_model**-0.5 if scales_output(config) else 1.0
    for step in range(max_new_tokens):
        output = base.decoder(
            input_ids=ids[:, -1:],
            encoder_hidden_states=hidden,
            encoder_attention_mask=attention_mask,
            past_key_values=cache,
            use_cache=True,
            adaptation=adaptation,
        ).last_hidden_state[:, -1]
        logits = base.lm_head(output * scale)
        if step < min_new_tokens:
            logits[:, config.eos_token_id] = -torch.inf
        token = logits.argmax(dim=-1).masked_fill(ended, config.pad_token_id)
        ids = torch.cat([ids, token.unsqueeze(1)], dim=1)
        ended |= token == config.eos_token_id
        if step + 1 < max_new_tokens and bool(ended.all()):
            break
    return ids
