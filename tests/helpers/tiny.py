"""Tiny base models."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.places import DATA

HUB = DATA / "hub"
T5_TOKENIZER = DATA / "t5_tokenizer"

needs_real_text = pytest.mark.skipif(
    not (HUB / "nyu-mll").is_dir(), reason=f"no real text at {DATA}; set HDSCALE_TEST_DATA to a folder of this layout"
)


def save_tiny_t5(folder: Path, vocabulary: int = 32128, tied: bool = False, seed: int = 0, **sizes: int) -> Path:
    """A T5 of a few thousand parameters beside its embeddings, saved as a checkpoint folder.

    Args:
        vocabulary: 32128 goes with T5's own tokenizer.
        tied: v1.0 (ReLU, head tied to the embeddings) instead of v1.1 (gated GELU, a separate head).
        sizes: of T5Config, over d_model 32, d_ff 48, d_kv 8, 4 heads, 2 layers.
    """
    import torch
    from transformers import T5Config, T5ForConditionalGeneration

    shape = {"d_model": 32, "d_ff": 48, "d_kv": 8, "num_heads": 4, "num_layers": 2, **sizes}
    config = T5Config(
        vocab_size=vocabulary,
        feed_forward_proj="relu" if tied else "gated-gelu",
        tie_word_embeddings=tied,
        decoder_start_token_id=0,
        **shape,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = T5ForConditionalGeneration(config)
        if not tied:
            head = torch.randn_like(model.lm_head.weight) * config.d_model**-0.5
            model.lm_head.weight = torch.nn.Parameter(head)
    model.save_pretrained(folder)
    return folder
