"""The one T5 against transformers' own models: T5 v1.0, v1.1, mT5 and UMT5, in every arrangement of tokens."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    MT5Config,
    MT5ForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
    UMT5Config,
    UMT5ForConditionalGeneration,
)
from transformers.cache_utils import DynamicCache, EncoderDecoderCache, StaticCache

from hdscale.bases import generation, linears
from hdscale.bases.cross_attention import DECODING_GAIN, Projected, few_targets
from hdscale.bases.interface import Encoding, Source
from hdscale.bases.t5 import T5
from hdscale.bases.weights import adopt

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
    "t5 v1.1": (
        T5ForConditionalGeneration,
        T5Config,
        {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    ),
    "mt5": (MT5ForConditionalGeneration, MT5Config, {}),
    "umt5": (UMT5ForConditionalGeneration, UMT5Config, {"tie_word_embeddings": False}),
}


def pair(name: str, attention: str = "sdpa", dtype: torch.dtype = torch.float32, **sizes):
    """(transformers' model, ours with copies of its weights), both without dropout; heads of their own but for v1.0."""
    cls, config, more = BASES[name]
    torch.manual_seed(3)
    theirs = cls._from_config(config(**{**SHAPE, **sizes}, **more, dropout_rate=0.0), attn_implementation=attention)
    own_head = name != "t5 v1.0"
    if own_head:
        theirs.lm_head.weight = torch.nn.Parameter(torch.randn_like(theirs.shared.weight))
        theirs.config.tie_word_embeddings = False  # transformers ties UMT5 whatever its file says, and scales by it
    theirs.to(dtype)
    with torch.device("meta"):
        ours = T5(theirs.config, own_head).to(dtype)
    adopt(ours, {name: parameter.detach().clone() for name, parameter in theirs.named_parameters()}, "transformers")
    return theirs.train(), ours.train().requires_grad_()


def batch(rows: int = 4) -> dict[str, torch.Tensor]:
    """Unlike lengths, a row of one token among them."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.tensor([LENGTH, 1, 7, 4][:rows])
    return {
        "input_ids": torch.randint(2, 50, (rows, LENGTH), generator=generator),
        "attention_mask": (torch.arange(LENGTH) < lengths[:, None]).long(),
        "decoder_input_ids": torch.randint(2, 50, (rows, TARGET), generator=generator),
    }


def encoded(ours: T5, inputs: dict[str, torch.Tensor], packed: bool = False) -> Encoding:
    return ours.encode(ours.prepare(Source(inputs["input_ids"], inputs["attention_mask"])), packed=packed)


def logits_of(ours: T5, inputs: dict[str, torch.Tensor], packed: bool = False) -> torch.Tensor:
    return ours.head(ours.decode(inputs["decoder_input_ids"], encoded(ours, inputs, packed)))


def error_of(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Largest difference, as a share of the largest entry."""
    return float((found - wanted).detach().abs().max() / wanted.detach().abs().max())


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", BASES)
def test_outputs_and_gradients_are_those_of_transformers(name, attention, packed):
    """Every weight trains here, as in full fine-tuning, the position biases among them."""
    theirs, ours = pair(name, attention)
    kept = batch()["attention_mask"].bool()
    output = theirs(**batch(), use_cache=False)
    states = theirs.encoder(input_ids=batch()["input_ids"], attention_mask=batch()["attention_mask"])
    (output.logits.square().mean() + states.last_hidden_state[kept].square().mean()).backward()
    logits, hidden = logits_of(ours, batch(), packed), encoded(ours, batch(), packed).hidden
    (logits.square().mean() + hidden[kept].square().mean()).backward()
    assert error_of(logits, output.logits) < 1e-5 and error_of(hidden[kept], states.last_hidden_state[kept]) < 1e-5
    gradients = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    found = {name: p.grad for name, p in ours.named_parameters() if p.grad is not None}
    assert found.keys() == gradients.keys() and any("relative_attention_bias" in key for key in gradients)
    for key, gradient in gradients.items():
        assert error_of(found[key], gradient) < 1e-5, key


@pytest.mark.parametrize("joined", [False, True], ids=["apart", "joined"])
@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_a_frozen_base_gives_the_logits_of_transformers(monkeypatch, name, joined, dtype, tolerance):
    """With and without gradients; `joined` is how a GPU computes the linears of one input."""
    if joined:
        monkeypatch.setattr(linears, "JOINED_ON", {"cpu"})
    theirs, ours = pair(name, dtype=dtype)
    wanted = theirs.eval()(**batch(), use_cache=False).logits
    ours.eval().requires_grad_(False)
    before = {key: tensor.clone() for key, tensor in ours.state_dict().items()}
    for learning in (True, False):
        with torch.set_grad_enabled(learning):
            assert error_of(logits_of(ours, batch()), wanted) < tolerance
            assert error_of(logits_of(ours, batch(), packed=True), wanted) < tolerance
    after = ours.state_dict()
    assert list(after) == list(theirs.state_dict())
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("arguments", [dict(num_beams=3), dict(), dict(num_beams=2, cache_implementation="static")])
def test_searches_find_what_transformers_finds(name, arguments):
    theirs, ours = pair(name)
    inputs = {key: value for key, value in batch().items() if key != "decoder_input_ids"}
    wanted = theirs.eval().generate(**inputs, do_sample=False, max_new_tokens=6, **arguments)
    with torch.no_grad():
        encoding = encoded(ours.eval(), batch())
        found = generation.generate(ours, encoding, None, do_sample=False, max_new_tokens=6, **arguments)
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("joined", [False, True], ids=["apart", "joined"])
@pytest.mark.parametrize("name", BASES)
def test_token_by_token_as_all_at_once(monkeypatch, name, joined):
    """With transformers' caches, growing and fixed, and with our own, whether or not the source is projected."""
    if joined:
        monkeypatch.setattr(linears, "JOINED_ON", {"cpu"})
    _, ours = pair(name)
    ours.eval().requires_grad_(False)
    tokens = batch()["decoder_input_ids"]
    with torch.no_grad():
        encoding = encoded(ours, batch())
        whole = ours.decode(tokens, encoding)
        for make in (DynamicCache, lambda config: StaticCache(config=config, max_cache_len=TARGET + 2)):
            cache = EncoderDecoderCache(make(config=ours.config), DynamicCache(config=ours.config))
            for place in range(TARGET):
                one = ours.decode_with_cache(tokens[:, place : place + 1], encoding, None, cache)
                assert torch.allclose(one[:, 0], whole[:, place], atol=1e-5)
        for project in (True, False):
            step = ours.token_decoder(encoding, None, TARGET, project)
            for place in range(TARGET):
                assert torch.allclose(step(tokens[:, place]), whole[:, place], atol=1e-5)


@pytest.mark.parametrize("name", BASES)
def test_few_targets_look_at_a_source_that_is_not_projected(name, monkeypatch):
    """Outputs and gradients are transformers' own, all weights training; the source's keys are not computed."""
    theirs, ours = pair(name, dtype=torch.float64, d_kv=40)
    calls = []
    project = Projected.__call__
    monkeypatch.setattr(Projected, "__call__", lambda *given: calls.append("keys") or project(*given))
    inputs = batch()
    inputs["decoder_input_ids"] = inputs["decoder_input_ids"][:, :2]
    results = []
    for model, logits in ((theirs, theirs(**inputs, use_cache=False).logits), (ours, logits_of(ours, inputs))):
        logits.square().mean().backward()
        results.append((logits, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
    (logits, gradients), (our_logits, our_gradients) = results
    assert calls == []
    # transformers' norm works in float32
    assert error_of(our_logits, logits) < 1e-6
    assert our_gradients.keys() == gradients.keys()
    for key, gradient in gradients.items():
        assert error_of(our_gradients[key], gradient) < 1e-5, key
    # more tokens are cheaper with keys and values
    logits_of(ours, batch())
    assert calls == ["keys"] * 3


@pytest.mark.parametrize("d_kv, sources, most", [(64, 46, 6), (64, 512, 14), (16, 20, 2)])
def test_what_few_targets_are(d_kv, sources, most):
    assert few_targets(most, sources, d_kv) and not few_targets(most + 1, sources, d_kv)
    # decoding keeps nothing for a backward pass
    assert few_targets(2 * most, sources, d_kv, DECODING_GAIN)


@pytest.mark.parametrize("name, inputs", [("t5 v1.0", 1), ("t5 v1.1", 2)])
def test_weights_that_a_token_is_multiplied_with(name, inputs):
    """Linears alone: neither norms nor biases of positions nor the embeddings."""
    _, ours = pair(name)
    attention, feed_forward = 4 * 16 * HEADS * 4, (inputs + 1) * 16 * 20
    wanted = {"encoder": 3 * (attention + feed_forward), "decoder": 3 * (2 * attention + feed_forward), "head": 50 * 16}
    assert {part: ours.weights_per_token(part) for part in wanted} == wanted


def test_one_mask_is_kept_for_all_layers():
    """Of what the encoder keeps for its backward pass, one tensor has a number for each head and pair of tokens."""
    _, ours = pair("t5 v1.1")
    ours.requires_grad_(False)
    ours.shared.weight.requires_grad_()
    storages = set()

    def keep(tensor):
        if tensor.shape == (4, HEADS, LENGTH, LENGTH):
            storages.add(tensor.untyped_storage().data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        kept = encoded(ours, batch())
    assert len(storages) == 1
    del kept


@pytest.mark.parametrize("where", ["encoder", "decoder", "all"])
def test_recomputed_layers_keep_their_inputs_alone(where):
    """Loss and gradients are the same to the bit, dropout included; between layers only x [N, D] is kept."""
    _, ours = pair("umt5")
    for stack in (ours.encoder, ours.decoder):
        stack.dropout_rate = 0.3
    results = []
    for choice in ("none", where):
        ours.checkpoint_activations(choice)
        ours.zero_grad()
        torch.manual_seed(0)
        kept = 0

        def count(tensor):
            nonlocal kept
            kept += 1
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            loss = logits_of(ours, batch()).square().mean()
        loss.backward()
        results.append((kept, loss.detach(), {name: p.grad for name, p in ours.named_parameters()}))
    (plain, loss, gradients), (fewer, again, recomputed) = results
    assert fewer < plain and torch.equal(loss, again)
    assert all(torch.equal(gradients[name], recomputed[name]) for name in gradients)
