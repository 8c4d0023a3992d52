"""One additive mask for all layers of a stack: the same numbers as transformers' own stacks, and one copy kept."""

from __future__ import annotations

import pytest
import torch
from transformers import MT5Config, MT5ForConditionalGeneration, T5Config, T5ForConditionalGeneration
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

from hdscale.bases.blocks import adapt_blocks
from hdscale.bases.cross_attention import DECODING_GAIN, few_targets

HEADS, LENGTH, TARGET = 3, 11, 5
SHAPE = {
    "vocab_size": 50,
    "d_model": 16,
    "d_ff": 20,
    "d_kv": 4,
    "num_heads": HEADS,
    "num_layers": 3,
    "decoder_start_token_id": 0,
}
BASES = {
    "t5 v1.0": (T5ForConditionalGeneration, T5Config, {"feed_forward_proj": "relu"}),
    "t5 v1.1": (T5ForConditionalGeneration, T5Config, {"feed_forward_proj": "gated-gelu"}),
    "mt5": (MT5ForConditionalGeneration, MT5Config, {}),
}


def pair(name: str, attention: str = "sdpa", dropout: float = 0.0):
    """(transformers' model, the same one adapted)."""
    cls, config, more = BASES[name]
    torch.manual_seed(3)
    theirs = cls._from_config(config(**SHAPE, **more, dropout_rate=dropout), attn_implementation=attention).train()
    ours = cls._from_config(config(**SHAPE, **more, dropout_rate=dropout), attn_implementation=attention).train()
    ours.load_state_dict(theirs.state_dict())
    adapt_blocks(ours)
    return theirs, ours


def batch(rows: int = 4) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    lengths = torch.tensor([LENGTH, 1, 7, 4][:rows])
    return {
        "input_ids": torch.randint(2, 50, (rows, LENGTH), generator=generator),
        "attention_mask": (torch.arange(LENGTH) < lengths[:, None]).long(),
        "decoder_input_ids": torch.randint(2, 50, (rows, TARGET), generator=generator),
    }


def error_of(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Largest difference, as a share of the largest entry."""
    return float((found - wanted).detach().abs().max() / wanted.detach().abs().max())


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", BASES)
def test_outputs_and_gradients_are_those_of_transformers(name, attention):
    """The position bias trains here, as in full fine-tuning."""
    theirs, ours = pair(name, attention)
    kept = batch()["attention_mask"].bool()
    results = []
    for model in (theirs, ours):
        output = model(**batch(), use_cache=False)
        encoded = model.encoder(
            input_ids=batch()["input_ids"], attention_mask=batch()["attention_mask"]
        ).last_hidden_state
        (output.logits.square().mean() + encoded[kept].square().mean()).backward()
        results.append(
            (output.logits, encoded[kept], {name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        )
    (logits, encoded, gradients), (our_logits, our_encoded, our_gradients) = results
    assert error_of(our_logits, logits) < 1e-6 and error_of(our_encoded, encoded) < 1e-6
    assert our_gradients.keys() == gradients.keys() and any("relative_attention_bias" in key for key in gradients)
    for key, gradient in gradients.items():
        assert error_of(our_gradients[key], gradient) < 1e-5, key


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", BASES)
def test_token_by_token_as_all_at_once(name, attention):
    _, ours = pair(name, attention)
    ours.eval()
    inputs = batch()
    source = {"encoder_attention_mask": inputs["attention_mask"]}
    source["encoder_hidden_states"] = ours.encoder(
        input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]
    )[0]
    whole = ours.decoder(input_ids=inputs["decoder_input_ids"], use_cache=False, **source).last_hidden_state
    cache = EncoderDecoderCache(DynamicCache(config=ours.decoder.config), DynamicCache(config=ours.decoder.config))
    for place in range(TARGET):
        token = inputs["decoder_input_ids"][:, place : place + 1]
        one = ours.decoder(input_ids=token, past_key_values=cache, use_cache=True, **source).last_hidden_state
        assert torch.allclose(one[:, 0], whole[:, place], atol=1e-5)


@pytest.mark.parametrize("name", BASES)
def test_few_targets_look_at_a_source_that_is_not_projected(name, monkeypatch):
    """Outputs and gradients are transformers' own, all weights training; the keys' linear is not called."""
    monkeypatch.setitem(SHAPE, "d_kv", 40)
    theirs, ours = pair(name)
    calls = []
    ours.decoder.block[1].layer[1].EncDecAttention.k.register_forward_hook(lambda *_: calls.append("k"))
    inputs = batch()
    inputs["decoder_input_ids"] = inputs["decoder_input_ids"][:, :2]
    results = []
    for model in (theirs.double(), ours.double()):
        logits = model(**inputs, use_cache=False).logits
        logits.square().mean().backward()
        results.append((logits, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
    (logits, gradients), (our_logits, our_gradients) = results
    assert calls == []
    assert torch.allclose(logits, our_logits, rtol=1e-9, atol=1e-12)
    assert our_gradients.keys() == gradients.keys()
    for key, gradient in gradients.items():
        assert torch.allclose(gradient, our_gradients[key], rtol=1e-7, atol=1e-12), key
    # more tokens are cheaper with keys and values
    ours(**batch(), use_cache=False)
    assert calls == ["k"]


@pytest.mark.parametrize("d_kv, sources, most", [(64, 46, 6), (64, 512, 14), (16, 20, 2)])
def test_what_few_targets_are(d_kv, sources, most):
    assert few_targets(most, sources, d_kv) and not few_targets(most + 1, sources, d_kv)
    # decoding keeps nothing for a backward pass
    assert few_targets(2 * most, sources, d_kv, DECODING_GAIN)


def test_one_mask_is_kept_for_all_layers():
    """Of what the encoder keeps for its backward pass, one tensor has a number for each head and pair of tokens."""
    theirs, ours = pair("t5 v1.1")
    counts = []
    for model in (theirs, ours):
        model.requires_grad_(False)
        storages = set()

        def keep(tensor, storages=storages):
            if tensor.shape == (4, HEADS, LENGTH, LENGTH):
                storages.add(tensor.untyped_storage().data_ptr())
            return tensor

        x = model.encoder.embed_tokens(batch()["input_ids"])
        model.encoder.embed_tokens.register_forward_hook(lambda *_, x=x: x.clone().requires_grad_())
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            kept = model.encoder(input_ids=batch()["input_ids"], attention_mask=batch()["attention_mask"])
        counts.append(len(storages))
        del kept
    assert counts == [3, 1]
