"""Eq. 1-9 by a direct float64 computation, on T5 v1.0 (tied), v1.1 (untied) and mT5; the release's format likewise."""

from __future__ import annotations

import pytest
import torch

from hdscale.bases.settings import ModelSettings
from hdscale.errors import UserError
from hdscale.modeling import build_model
from hdscale.modeling.convert import convert_state
from tests.helpers.adapted import (
    VOCABULARY,
    direct_logits,
    double_model,
    method_config,
    model_logits,
    random_batch,
    relative_error,
    shaken,
    tiny_base,
)
from tests.helpers.direct_hyperdecoder import Parallel, embedding, generated, learned
from tests.helpers.direct_t5 import Hooks
from tests.helpers.tiny import save_tiny_t5

CLOSE = 3e-6
"""T5's layer norm takes its variance in float32 whatever the model's type."""

SIZES = dict(encoder__dim=4, decoder__dim=3, hypernet__bottleneck=6, hypernet__layer_embedding=5)


@pytest.fixture(scope="module", params=["v1.0", "v1.1", "mt5"])
def base(request, tmp_path_factory):
    return tiny_base(tmp_path_factory.mktemp("base") / request.param, request.param)


@pytest.fixture(scope="module")
def base_v1_1(tmp_path_factory):
    return tiny_base(tmp_path_factory.mktemp("base") / "v1.1")


def method_weights(model):
    return {name: value.detach().double() for name, value in model.method.state_dict().items()}


def expected_logits(model, batch, config):
    """The direct computation of any cell of the grid without LoRA and prefixes."""
    weights, method = method_weights(model), config.method
    d_model, layers = model.base.config.d_model, model.base.config.num_layers

    def hooks(name, task, h):
        side = getattr(method, name)
        if side.adapter == "none":
            return Hooks()
        normed = side.input == "layernorm"
        if side.adapter == "manual":
            return Parallel(name, learned(weights, name, layers), normed)
        if side.adapter == "task":
            e = weights[f"{name}.task_embedding.weight"]
            e = e.mean(dim=0) if task < 0 else e[task]
        else:
            e = embedding(weights, name, h, method.hypernet.mlp)
        return Parallel(name, generated(weights, name, e, d_model, side.dim, layers), normed)

    twice = method.encoder.adapter == "generated"
    first = (lambda task: Parallel("encoder", learned(weights, "encoder", layers))) if twice else None
    return direct_logits(
        model,
        batch,
        lambda task: hooks("encoder", task, None),
        lambda task, h: hooks("decoder", task, h),
        first,
        (lambda task, h: hooks("encoder", task, h)) if twice else None,
    )


def test_hyperdecoder_of_every_family(base):
    config = method_config(base, **SIZES)
    model, batch = double_model(config), random_batch()
    assert relative_error(model_logits(model, batch), expected_logits(model, batch, config)) < CLOSE
    # and in float32, through whatever kernel runs here
    single = build_model(config)
    single.load_state_dict(model.state_dict())
    assert relative_error(model_logits(single.eval(), batch), expected_logits(model, batch, config)) < 1e-5


def test_eager_attention_is_the_same(base):
    config = method_config(base, **SIZES)
    config.model.attention = "eager"
    model, batch = double_model(config), random_batch()
    assert relative_error(model_logits(model, batch), expected_logits(model, batch, config)) < CLOSE


@pytest.mark.parametrize("encoder", ["none", "manual", "task", "generated"])
@pytest.mark.parametrize("decoder", ["none", "manual", "task", "generated"])
def test_grid(base_v1_1, encoder, decoder):
    options = {"encoder__adapter": encoder, "decoder__adapter": decoder}
    for side, kind in (("encoder", encoder), ("decoder", decoder)):
        if kind != "none":
            options[f"{side}__dim"] = SIZES[f"{side}__dim"]
    if {encoder, decoder} & {"task", "generated"}:
        options |= {key: SIZES[key] for key in ("hypernet__bottleneck", "hypernet__layer_embedding")}
    config = method_config(base_v1_1, **options)
    model, batch = double_model(config), random_batch()
    batch["task_ids"][1] = -1
    assert relative_error(model_logits(model, batch), expected_logits(model, batch, config)) < CLOSE


@pytest.mark.parametrize(
    "options", [dict(hypernet__mlp=False), dict(encoder__input="layernorm", decoder__input="layernorm")]
)
def test_ablations_of_table_9(base_v1_1, options):
    config = method_config(base_v1_1, **SIZES, **options)
    model, batch = double_model(config), random_batch()
    assert relative_error(model_logits(model, batch), expected_logits(model, batch, config)) < CLOSE


def test_without_adapters_it_is_the_base(base):
    from transformers import AutoModelForSeq2SeqLM

    model = build_model(method_config(base, encoder__adapter="none", decoder__adapter="none")).eval()
    batch = random_batch()
    plain = AutoModelForSeq2SeqLM.from_pretrained(base).eval()
    with torch.no_grad():
        out = model(**batch)
        loss = plain(**{name: value for name, value in batch.items() if name != "task_ids"}).loss
    assert out.loss_sum / out.tokens == pytest.approx(float(loss), rel=1e-6)


def released_state(base, seed=11, d_model=32, dim=5, bottleneck=7, layers=2):
    """Random weights by the release's names: learned encoder adapters, a generated decoder, its unused adapters."""
    from transformers import AutoModelForSeq2SeqLM

    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=generator) * 0.3

    state = dict(AutoModelForSeq2SeqLM.from_pretrained(base).state_dict())
    for side, sub in (("encoder", 1), ("decoder", 2)):
        for i in range(layers):
            stem = f"{side}.block.{i}.layer.{sub}.adapter_layer"
            state[f"{stem}.adapter_down_manual.weight"] = random(dim, d_model)
            state[f"{stem}.adapter_down_manual.bias"] = random(dim)
            state[f"{stem}.adapter_up_manual.weight"] = random(d_model, dim)
            state[f"{stem}.adapter_up_manual.bias"] = random(d_model)
    state["decoder.param_gen.layer_embed.weight"] = random(layers, 10)
    for name, rows, columns in (
        ("linear1", bottleneck, d_model + 10),
        ("weight_up", d_model * dim, bottleneck),
        ("weight_down", d_model * dim, bottleneck),
        ("bias_up", d_model, bottleneck),
        ("bias_down", dim, bottleneck),
    ):
        state[f"decoder.param_gen.decoder.{name}.weight"] = random(rows, columns)
        state[f"decoder.param_gen.decoder.{name}.bias"] = random(rows)
    for i in (0, 2):
        state[f"decoder.mlp.{i}.weight"] = random(d_model, d_model)
        state[f"decoder.mlp.{i}.bias"] = random(d_model)
    return state


def test_released_state_dict(base_v1_1, tmp_path):
    """Logits of a converted checkpoint against the computation written from the release's own names."""
    from hdscale.modeling import from_pretrained

    state = released_state(base_v1_1)
    config, trainables = convert_state(state, ModelSettings(str(base_v1_1)))
    build_model(config, device="meta").save_pretrained(tmp_path, trainables)
    model, batch = from_pretrained(tmp_path).eval(), random_batch()
    w = {name: value.double() for name, value in state.items()}

    def manual():
        stem = "encoder.block.{}.layer.1.adapter_layer.adapter_{}_manual.{}"
        return [
            [
                w[stem.format(i, *part)]
                for part in (("down", "weight"), ("down", "bias"), ("up", "weight"), ("up", "bias"))
            ]
            for i in range(2)
        ]

    def decoder(task, h):
        e = torch.relu(w["decoder.mlp.0.weight"] @ h.mean(dim=0) + w["decoder.mlp.0.bias"])
        e = w["decoder.mlp.2.weight"] @ e + w["decoder.mlp.2.bias"]
        adapters = []
        for i in range(2):
            x = torch.cat([e, w["decoder.param_gen.layer_embed.weight"][i]])
            made = {}
            hidden = torch.relu(
                w["decoder.param_gen.decoder.linear1.weight"] @ x + w["decoder.param_gen.decoder.linear1.bias"]
            )
            for name in ("weight_up", "weight_down", "bias_up", "bias_down"):
                stem = f"decoder.param_gen.decoder.{name}"
                made[name] = w[f"{stem}.weight"] @ hidden + w[f"{stem}.bias"]
            down, up = made["weight_down"].view(32, 5), made["weight_up"].view(5, 32)
            adapters.append((down.T, made["bias_down"], up.T, made["bias_up"]))
        return Parallel("decoder", adapters)

    expected = direct_logits(model, batch, lambda task: Parallel("encoder", manual()), decoder)
    assert relative_error(model_logits(model, batch), expected) < 1e-5


def test_released_state_dict_that_lacks_a_tensor(base_v1_1):
    from hdscale.errors import UserError

    state = released_state(base_v1_1)
    del state["decoder.param_gen.decoder.bias_up.bias"]
    with pytest.raises(UserError, match="lacks 'decoder.param_gen.decoder.bias_up.bias'"):
        convert_state(state, ModelSettings(str(base_v1_1)))
    with pytest.raises(UserError, match="no adapters of the released implementation"):
        convert_state({"shared.weight": torch.zeros(2, 2)}, ModelSettings(str(base_v1_1)))


def test_log_likelihood_and_embedding(base_v1_1):
    config = method_config(base_v1_1, **SIZES)
    model, batch = double_model(config), random_batch()
    token = torch.log_softmax(expected_logits(model, batch, config), dim=-1)
    labels = batch["labels"][batch["labels"] != -100]
    token = token[torch.arange(len(labels)), labels]
    counts = (batch["labels"] != -100).sum(dim=1).tolist()
    expected = torch.stack([part.sum() for part in token.split(counts)])
    found = model.log_likelihood(**batch)
    assert found.dtype == torch.float32
    assert torch.allclose(found.double(), expected, rtol=1e-5)
    with torch.no_grad():
        out = model(**batch)
    assert int(out.tokens) == len(labels)
    assert float(out.loss_sum) == pytest.approx(-float(expected.sum()), rel=1e-6)

    from tests.helpers.direct_t5 import DirectT5

    weights = method_weights(model)
    e = model.embed(batch["input_ids"], batch["attention_mask"])
    for row in range(3):
        ids = batch["input_ids"][row][batch["attention_mask"][row] == 1]
        h = DirectT5(model.base).encode(ids, Parallel("encoder", learned(weights, "encoder", 2)))
        assert relative_error(e[row], embedding(weights, "decoder", h)) < CLOSE


def test_label_smoothing_is_that_of_the_release(base_v1_1):
    """(1 - eps) * NLL + eps * mean over the vocabulary of -log p, summed over tokens."""
    model, batch = shaken(build_model(method_config(base_v1_1, **SIZES), dtype=torch.float64)), random_batch()
    logits = torch.log_softmax(model_logits(model, batch), dim=-1)
    labels = batch["labels"][batch["labels"] != -100]
    nll = -logits[torch.arange(len(labels)), labels]
    model.label_smoothing = 0.1
    expected = (0.9 * nll + 0.1 * -logits.mean(dim=-1)).sum()
    assert float(model(**batch).loss_sum.detach()) == pytest.approx(float(expected), rel=1e-9)


def test_a_released_checkpoint_of_another_base_is_refused(base_v1_1, tmp_path):
    """Of the same shapes, so that nothing but the values tells them apart: it would be decoded on the wrong weights."""
    from hdscale.modeling.convert import convert_checkpoint

    other = save_tiny_t5(tmp_path / "other", vocabulary=VOCABULARY, seed=99)
    torch.save(released_state(base_v1_1), tmp_path / "released.bin")
    arguments = (tmp_path / "released.bin", tmp_path / "export")
    convert_checkpoint(*arguments, ModelSettings(str(base_v1_1)), None, False)
    with pytest.raises(UserError, match="differs from that of base '.*other', so it was trained on another base"):
        convert_checkpoint(*arguments, ModelSettings(str(other)), None, False)


def test_released_task_embeddings(base_v1_1):
    """The release's names of tasks become the package's, and its last row, which is never trained, is left out."""
    state = released_state(base_v1_1)
    for name in [name for name in state if ".mlp." in name]:
        del state[name]
    state["decoder.adapter_task_embedding.weight"] = torch.randn(4, 32)
    state["decoder.param_gen.decoder.linear1.weight"] = torch.randn(7, 42)
    config, trainables = convert_state(state, ModelSettings(str(base_v1_1)), ["SQuAD", "HotpotQA", "wiki_lingua"])
    assert config.tasks == ["squad", "hotpotqa", "wiki_lingua"]
    kept = trainables["method.decoder.task_embedding.weight"]
    assert torch.equal(kept, state["decoder.adapter_task_embedding.weight"][:3])
    with pytest.raises(UserError, match="--tasks names 2 tasks, the state dict has embeddings of 4"):
        convert_state(state, ModelSettings(str(base_v1_1)), ["SQuAD", "HotpotQA"])
