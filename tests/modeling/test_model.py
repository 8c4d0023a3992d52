"""Decoding with what is generated once, activation checkpointing, export and import, and what users get wrong."""

from __future__ import annotations

import json

import pytest
import torch

from hdscale.bases import generation
from hdscale.errors import UserError
from hdscale.modeling import HyperdecoderConfig, build_model, from_pretrained
from tests.helpers.adapted import METHODS, SIZES, method_config, random_batch, shaken, tiny_base


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_base(tmp_path_factory.mktemp("base") / "v1.1")


def without_cache(model, batch, tokens):
    """Greedy decoding by a whole teacher-forced pass at each step: everything is generated again for every token."""
    encoded = model.encode(batch["input_ids"], batch["attention_mask"], batch["task_ids"])
    ids = torch.zeros(batch["input_ids"].shape[0], 1, dtype=torch.long)
    done = torch.zeros(ids.shape[0], dtype=torch.bool)
    for _ in range(tokens):
        labels = torch.cat([ids[:, 1:], torch.ones(ids.shape[0], 1, dtype=torch.long)], dim=1)
        logits, _ = model.decode(encoded, labels)
        following = logits.view(ids.shape[0], ids.shape[1], -1)[:, -1].argmax(-1).masked_fill(done, 0)
        ids = torch.cat([ids, following[:, None]], dim=1)
        done |= following == 1
        if done.all():
            break
    return ids


@pytest.mark.parametrize("name", METHODS)
def test_greedy_decoding_is_that_of_regenerating_at_each_step(base, name):
    method, options = METHODS[name]
    model, batch = shaken(build_model(method_config(base, method, **options))), random_batch()
    with torch.no_grad():
        found = model.generate(batch["input_ids"], batch["attention_mask"], batch["task_ids"], max_new_tokens=7)
        expected = without_cache(model, batch, 7)
    assert torch.equal(found, expected)
    assert len(set(found[:, 1:].flatten().tolist())) > 2  # not one token over and over


@pytest.mark.parametrize("name", METHODS)
def test_beams_are_those_of_rows_of_their_own(base, name):
    """Beam search with one adaptation per instance, against the same with one for every beam of every instance."""
    method, options = METHODS[name]
    model, batch, beams = shaken(build_model(method_config(base, method, **options))), random_batch(), 3
    wide = {key: value.repeat_interleave(beams, dim=0) for key, value in batch.items()}
    with torch.no_grad():
        found = model.generate(
            batch["input_ids"], batch["attention_mask"], batch["task_ids"], max_new_tokens=6, num_beams=beams
        )
        narrow = model.encode(batch["input_ids"], batch["attention_mask"], batch["task_ids"])
        # not made for generation: everything is generated again at every step
        adaptation = model.encode(wide["input_ids"], wide["attention_mask"], wide["task_ids"]).adaptation
        expected = generation.generate(model.base, narrow.encoding, adaptation, max_new_tokens=6, num_beams=beams)
    assert torch.equal(found, expected)


def test_one_instance_does_not_see_another(base):
    """Each row decodes as it does alone: instances have adapters of their own and padding changes nothing."""
    model, batch = shaken(build_model(method_config(base, **SIZES))), random_batch()
    together = model.generate(batch["input_ids"], batch["attention_mask"], max_new_tokens=6)
    for row in range(3):
        ids = batch["input_ids"][row][batch["attention_mask"][row] == 1][None]
        alone = model.generate(ids, torch.ones_like(ids), max_new_tokens=6)
        assert torch.equal(together[row, : alone.shape[1]], alone[0])


@pytest.mark.parametrize(
    "name, where", [*((name, "all") for name in METHODS), ("hyperdecoder", "encoder"), ("hyperdecoder", "decoder")]
)
def test_activation_checkpointing_gives_the_same_gradients(base, name, where):
    method, options = METHODS[name]
    config = method_config(base, method, **options)
    config.model.dropout = 0.1
    plain = shaken(build_model(config, dtype=torch.float64)).train()
    config.model.activation_checkpointing = where
    recomputing = build_model(config, dtype=torch.float64).train()
    recomputing.load_state_dict(plain.state_dict())
    batch, gradients = random_batch(), []
    for model in (plain, recomputing):
        torch.manual_seed(0)
        model(**batch).loss_sum.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad and p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and gradients[0]
    for key, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][key], rtol=1e-12, atol=1e-13 * float(gradient.abs().max())), key
    stacks = {side: getattr(recomputing.base, side).recompute for side in ("encoder", "decoder")}
    assert stacks == {side: where in (side, "all") for side in stacks}


@pytest.mark.parametrize("name", METHODS)
def test_every_trainable_gets_a_gradient(base, name):
    method, options = METHODS[name]
    model, batch = shaken(build_model(method_config(base, method, **options))).train(), random_batch()
    model(**batch).loss_sum.backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.requires_grad == (parameter.grad is not None), parameter_name
        if parameter.requires_grad:
            assert parameter.grad.abs().sum() > 0, parameter_name


def test_frozen_base_and_names(base):
    model = build_model(method_config(base, **SIZES))
    assert all(name.startswith("method.") for name in model.trainable_names())
    assert not any(parameter.requires_grad for parameter in model.base.parameters())
    assert model.base.config._attn_implementation == "sdpa"


def test_seed_decides_the_method_and_leaves_the_callers_randomness(base):
    torch.manual_seed(99)
    expected = torch.rand(3)
    torch.manual_seed(99)
    first = build_model(method_config(base, **SIZES), seed=1)
    assert torch.equal(torch.rand(3), expected)
    again, other = build_model(method_config(base, **SIZES), seed=1), build_model(method_config(base, **SIZES), seed=2)
    for name, value in first.method.state_dict().items():
        assert torch.equal(value, again.method.state_dict()[name])
    assert any(not torch.equal(v, other.method.state_dict()[n]) for n, v in first.method.state_dict().items())


def test_initialisation_of_the_release(base):
    """Learned adapters: Xavier with gain 1e-4; heads: uniform within 1e-3 * sqrt(3 / (b * fan)), biases 0."""
    model = build_model(method_config(base, encoder__dim=16, decoder__dim=8, hypernet__bottleneck=64))
    adapter = model.method.encoder.adapters[0]
    bound = 1e-4 * (6 / (32 + 16)) ** 0.5
    assert 0.9 * bound < adapter.down.weight.abs().max() <= bound
    assert adapter.down.bias.abs().max() == adapter.up.bias.abs().max() == 0
    heads = model.method.decoder.hypernetwork.adapter_heads
    for tensor, fan in (
        (heads.up_weight, 8),
        (heads.down_weight, 32),
        (heads.up_bias_weight, 1),
        (heads.down_bias_weight, 1),
    ):
        bound = 1e-3 * (3 / (64 * fan)) ** 0.5
        assert 0.97 * bound < tensor.abs().max() <= bound
    for tensor in (heads.up_bias, heads.down_bias, heads.up_bias_bias, heads.down_bias_bias):
        assert tensor.abs().max() == 0
    assert 0.5 < model.method.decoder.hypernetwork.layer_embedding.weight.std() < 1.6


@pytest.mark.parametrize("name", METHODS)
def test_export_and_import(base, name, tmp_path):
    method, options = METHODS[name]
    model, batch = shaken(build_model(method_config(base, method, **options))), random_batch()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.requires_grad and key.startswith("base."):
                parameter.mul_(1.01)
    model.save_pretrained(tmp_path)
    again = from_pretrained(tmp_path).eval()
    assert again.trainable_names() == model.trainable_names()
    with torch.no_grad():
        assert torch.equal(again(**batch).loss_sum, model(**batch).loss_sum)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hdscale_adapter.safetensors", "hdscale_config.json"]


def test_export_names_the_base_and_moves_with_it(base, tmp_path):
    model = build_model(method_config(base, **SIZES))
    model.save_pretrained(tmp_path / "export")
    written = json.loads((tmp_path / "export" / "hdscale_config.json").read_text())
    assert written["model"]["name"] == str(base) and len(written["base_fingerprint"]) == 64
    moved = tmp_path / "moved"
    moved.mkdir()
    for path in base.iterdir():
        (moved / path.name).write_bytes(path.read_bytes())
    from_pretrained(tmp_path / "export", base=str(moved))
    other = tiny_base(tmp_path / "other", "v1.0")
    with pytest.raises(UserError, match="was trained with other base weights"):
        from_pretrained(tmp_path / "export", base=str(other))


def test_warm_start(base, tmp_path):
    model = shaken(build_model(method_config(base, **SIZES)))
    model.save_pretrained(tmp_path)
    config = method_config(base, **SIZES)
    config.model.init_adapter = str(tmp_path)
    warm = build_model(config)
    for name, value in model.method.state_dict().items():
        assert torch.equal(value, warm.method.state_dict()[name])
    config.method.decoder.dim = 5
    with pytest.raises(UserError, match="has shape"):
        build_model(config)
    with pytest.raises(UserError, match="tensors of another model"):
        other = method_config(base, "lora")
        other.model.init_adapter = str(tmp_path)
        build_model(other)


def test_warm_start_of_a_task_conditioned_model_needs_its_tasks(base, tmp_path):
    build_model(method_config(base, "modular")).save_pretrained(tmp_path)
    config = method_config(base, "modular", tasks=["rte", "cola", "sst2"])
    config.model.init_adapter = str(tmp_path)
    with pytest.raises(UserError, match="was trained on the tasks cola, rte, sst2, this model has rte, cola, sst2"):
        build_model(config)


def test_torn_export(base, tmp_path):
    build_model(method_config(base, **SIZES)).save_pretrained(tmp_path)
    weights = tmp_path / "hdscale_adapter.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match="not a complete safetensors file"):
        from_pretrained(tmp_path)
    weights.unlink()
    with pytest.raises(UserError, match="no hdscale_adapter.safetensors"):
        from_pretrained(tmp_path)
    with pytest.raises(UserError, match="no hdscale_config.json"):
        from_pretrained(tmp_path / "nowhere")
    (tmp_path / "hdscale_config.json").write_text("{")
    with pytest.raises(UserError, match="not a readable hdscale_config.json"):
        from_pretrained(tmp_path)


def test_bf16_base_keeps_float32_trainables(base):
    model = build_model(method_config(base, **SIZES), dtype=torch.bfloat16, trainable_dtype=torch.float32)
    assert {p.dtype for p in model.base.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in model.method.parameters()} == {torch.float32}


@pytest.mark.parametrize("name", METHODS)
def test_bf16_forward_is_close_to_float32(base, name):
    method, options = METHODS[name]
    config, batch = method_config(base, method, **options), random_batch()
    single = shaken(build_model(config), size=0.05)
    half = build_model(config, dtype=torch.bfloat16).eval()
    half.load_state_dict(single.state_dict())
    with torch.no_grad():
        a, b = single(**batch), half(**batch)
    assert b.loss_sum.dtype == torch.float32
    assert float(b.loss_sum) == pytest.approx(float(a.loss_sum), rel=0.03)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda c: setattr(c.model, "name", "t5-v1_1-larg"), "did you mean 't5-v1_1-large'"),
        (lambda c: setattr(c.model, "attention", "flash"), "model.attention=flash"),
        (lambda c: setattr(c.model, "activation_checkpointing", "some"), "model.activation_checkpointing=some"),
        (lambda c: setattr(c.model, "dropout", 1.5), "model.dropout=1.5"),
        (lambda c: setattr(c.method, "name", "hyperdecodr"), "did you mean 'hyperdecoder'"),
        (lambda c: setattr(c.method.encoder, "adapter", "manul"), "did you mean 'manual'"),
        (lambda c: setattr(c.method.encoder, "input", "norm"), "method.encoder.input=norm"),
        (lambda c: setattr(c.method.decoder, "dim", 0), "method.decoder.dim=0: must be at least 1"),
        (lambda c: setattr(c.method.hypernet, "bottleneck", -1), "method.hypernet.bottleneck=-1"),
        (lambda c: setattr(c.method.hypernet, "conditioning", "max"), "method.hypernet.conditioning=max"),
    ],
)
def test_bad_configuration(base, change, message):
    config = method_config(base, **SIZES)
    change(config)
    with pytest.raises(UserError, match=message) as caught:
        build_model(config)
    assert "\n" not in str(caught.value)


def test_other_model_families_are_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bart"}))
    with pytest.raises(UserError, match="is a bart model; hdscale adapts these: mt5, t5, umt5"):
        build_model(method_config(tmp_path, **SIZES))
    (tmp_path / "config.json").unlink()
    with pytest.raises(UserError, match="config.json is missing"):
        build_model(method_config(tmp_path, **SIZES))


def test_unknown_keys_of_an_export_are_refused():
    with pytest.raises(UserError, match="model configuration"):
        HyperdecoderConfig.from_dict({"method": {"no_such_key": 1}})
