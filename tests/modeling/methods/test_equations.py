"""Independent float64 computations, from the published equations, of every method beside the paper's own grid."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import gelu

from hdscale.modeling import build_model
from tests.helpers.adapted import (
    direct_logits,
    double_model,
    method_config,
    model_logits,
    random_batch,
    relative_error,
    tiny_base,
)
from tests.helpers.direct_t5 import Hooks

CLOSE = 3e-6
"""T5's layer norm takes its variance in float32 whatever the model's type."""

LAYERS, D_MODEL, HEADS, D_KV = 2, 32, 4, 8


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_base(tmp_path_factory.mktemp("base") / "v1.1")


def check(model, batch, hooks):
    """The model against `hooks(weights, task)` in both stacks; with an unseen task among the rows as well."""
    weights = {name: value.detach().double() for name, value in model.method.state_dict().items()}
    expected = direct_logits(model, batch, lambda task: hooks(weights, task), lambda task, h: hooks(weights, task))
    assert relative_error(model_logits(model, batch), expected) < CLOSE


def with_unseen(batch):
    batch["task_ids"][1] = -1
    return batch


def of_task(weights, task):
    """The row of a task, or the mean over tasks for one that was not trained on."""
    return weights.mean(dim=0) if task < 0 else weights[task]


class LoraHooks(Hooks):
    """Hu et al. 2022: `h = W x + (alpha / r) B A x`."""

    def __init__(self, weights, scale):
        self.weights, self.scale = weights, scale

    def linear(self, side, layer, attention, name, x, y):
        stem = f"{side}.{layer}.{attention}_{name}"
        if f"{stem}.down" not in self.weights:
            return y
        return y + self.scale * (x @ self.weights[f"{stem}.down"] @ self.weights[f"{stem}.up"])


@pytest.mark.parametrize(
    "options, adapted, scale",
    [
        (dict(lora__rank=3), 2 * LAYERS * 3, 1.0),
        (dict(lora__rank=4, lora__alpha=2.0, lora__targets="kvo", lora__attention="cross"), 3 * LAYERS, 0.5),
        (dict(lora__rank=2, lora__targets="o", lora__attention="self"), 2 * LAYERS, 1.0),
    ],
)
def test_lora(base, options, adapted, scale):
    model = double_model(method_config(base, "lora", **options))
    assert len(list(model.method.named_parameters())) == 2 * adapted
    check(model, random_batch(), lambda weights, task: LoraHooks(weights, scale))


class SkillHooks(Hooks):
    """Ponti et al. 2022 in evaluation: sigmoid(Z) divided by its sum; A and B averaged apart; scale 1 / r."""

    KEYS = {
        "encoder": [f"self_{name}" for name in "qkvo"],
        "decoder": [f"{kind}_{name}" for kind in ("self", "cross") for name in "qkvo"],
    }

    def __init__(self, weights, task, rank):
        self.weights, self.task, self.rank = weights, task, rank

    def linear(self, side, layer, attention, name, x, y):
        keys = self.KEYS[side]
        key = f"{attention}_{name}"
        z = of_task(self.weights[f"{side}.allocation.logits"][layer * len(keys) + keys.index(key)], self.task)
        z = 1.0 / (1.0 + torch.exp(-z))
        z = z / z.sum()
        down = sum(
            share * skill for share, skill in zip(z, self.weights[f"{side}.layers.{layer}.{key}.down"], strict=True)
        )
        up = sum(share * skill for share, skill in zip(z, self.weights[f"{side}.layers.{layer}.{key}.up"], strict=True))
        return y + x @ down @ up / self.rank


def test_modular(base):
    model = double_model(method_config(base, "modular", lora__rank=3, modular__skills=5))
    check(model, with_unseen(random_batch()), lambda weights, task: SkillHooks(weights, task, rank=3))


def test_modular_samples_in_training_and_learns_z_at_its_own_rate(base):
    model = double_model(method_config(base, "modular", lora__rank=2)).train()
    allocation = model.method.encoder.allocation
    task_ids = torch.zeros(4000, dtype=torch.long)
    torch.manual_seed(0)
    weights = allocation(task_ids)  # [linears, B, skills]
    assert torch.allclose(weights.sum(-1), torch.ones_like(weights[..., 0]), atol=1e-5)
    assert weights[0].std(dim=0).min() > 0.05  # an instance draws for itself
    with torch.no_grad():
        allocation.logits.fill_(0.0)
        allocation.logits[..., 0] = 6.0
    # a relaxed Bernoulli is above 1/2 as often as its probability says
    sample = allocation(task_ids)
    assert sample[0, :, 0].mean() > sample[0, :, 1].mean() * 1.2
    rates = model.learning_rates(3e-4)
    assert rates == {f"method.{side}.allocation.logits": 1e-2 for side in ("encoder", "decoder")}
    assert set(rates) <= set(model.trainable_names())


class HyperformerHooks(Hooks):
    """Karimi Mahabadi et al. 2021, Section 2: adapters after attention and feed-forward, per task, layer and place."""

    def __init__(self, weights, task, form):
        self.weights, self.task, self.form = weights, task, form

    def code(self, side, layer, place):
        w = self.weights
        task = of_task(w["task_embedding.weight"], self.task)
        if self.form == "layer":
            return task
        parts = [task, w[f"{side}.codes.layer_embedding.weight"][layer]]
        if self.form == "shared":
            parts.append(w[f"{side}.codes.place_embedding.weight"][place])
        stem = f"{side}.codes.network"
        hidden = torch.relu(w[f"{stem}.0.weight"] @ torch.cat(parts) + w[f"{stem}.0.bias"])
        code = w[f"{stem}.2.weight"] @ hidden + w[f"{stem}.2.bias"]
        code = (code - code.mean()) / (code.var(unbiased=False) + 1e-6).sqrt()
        return code * w[f"{stem}.3.weight"] + w[f"{stem}.3.bias"]

    def adapter(self, side, layer, place, y):
        head = {"shared": 0, "stack": place, "layer": 2 * layer + place}[self.form]
        code = self.code(side, layer, place)

        def made(name):
            stem = f"{side}.heads.{head}.{name}"
            return self.weights[f"{stem}.weight"] @ code + self.weights[f"{stem}.bias"]

        dim = made("down_bias").shape[0]
        hidden = gelu(y @ made("down").view(D_MODEL, dim) + made("down_bias"), approximate="tanh")
        z = hidden @ made("up").view(dim, D_MODEL) + made("up_bias")
        z = (z - z.mean(-1, keepdim=True)) / (z.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        return y + z * made("norm_weight") + made("norm_bias")

    def after_attention(self, side, layer, y):
        return self.adapter(side, layer, 0, y)

    def after_feed_forward(self, side, layer, y):
        return self.adapter(side, layer, 1, y)


@pytest.mark.parametrize(
    "name, form", [("hyperformer++", "shared"), ("hyperformer", "stack"), ("hyperformer", "layer")]
)
def test_hyperformer(base, name, form):
    options = {} if form == "shared" else {"hyperformer__form": form}
    sizes = dict(hyperformer__dim=3, hyperformer__embedding=6, hyperformer__hidden=7)
    model = double_model(method_config(base, name, **sizes, **options))
    # the layer norms train: move them, so that the base of the direct computation is the trained one
    with torch.no_grad():
        for parameter in model.base.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.1)
    check(model, with_unseen(random_batch()), lambda weights, task: HyperformerHooks(weights, task, form))


class PromptHooks(Hooks):
    """He et al. 2022b: hyper-prompts `U ReLU(D P)` before keys and values of every self-attention."""

    def __init__(self, weights, task, variant):
        self.weights, self.task, self.variant = weights, task, variant

    def local(self, side, layer, part):
        w, stem = self.weights, f"{side}.{part}"
        if self.variant == "share":
            return w[f"{stem}.down"][layer, 0], w[f"{stem}.up"][layer, 0]
        if self.variant == "sep":
            return of_task(w[f"{stem}.down"][layer], self.task), of_task(w[f"{stem}.up"][layer], self.task)
        joined = torch.cat(
            [of_task(w[f"{side}.task_embedding.weight"], self.task), w[f"{side}.layer_embedding.weight"][layer]]
        )
        code = torch.relu(w[f"{side}.network.0.weight"] @ joined + w[f"{side}.network.0.bias"])
        code = w[f"{side}.network.2.weight"] @ code + w[f"{side}.network.2.bias"]
        code = (code - code.mean()) / (code.var(unbiased=False) + 1e-6).sqrt()
        code = code * w[f"{side}.network.3.weight"] + w[f"{side}.network.3.bias"]
        down = (w[f"{stem}.down"] @ code).view(D_MODEL, -1)
        return down, (w[f"{stem}.up"] @ code).view(down.shape[1], HEADS * D_KV)

    def prefix(self, side, layer):
        prompts = of_task(self.weights[f"{side}.prompts"], self.task)
        made = []
        for part in ("key", "value"):
            down, up = self.local(side, layer, part)
            made.append(torch.relu(prompts @ down) @ up)
        return tuple(made)


@pytest.mark.parametrize("variant", ["share", "sep", "global"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_hyperprompt(base, variant, attention):
    sizes = dict(hyperprompt__length=3, hyperprompt__bottleneck=5)
    if variant == "global":
        sizes |= dict(hyperprompt__embedding=6, hyperprompt__hidden=7)
    config = method_config(base, "hyperprompt", hyperprompt__variant=variant, **sizes)
    config.model.attention = attention
    model = double_model(config)
    check(model, with_unseen(random_batch()), lambda weights, task: PromptHooks(weights, task, variant))


def test_hyperprompt_with_the_base_trains_all_of_it(base):
    model = double_model(method_config(base, "hyperprompt", hyperprompt__tune_base=True, hyperprompt__length=2))
    assert len(model.trainable_names()) == len(list(model.named_parameters()))
    prompts_only = double_model(method_config(base, "hyperprompt", hyperprompt__length=2))
    assert all(name.startswith("method.") for name in prompts_only.trainable_names())


class GeneratedHooks(Hooks):
    """The hyperdecoder's options beyond the paper, in the decoder: what is generated from e, layer by layer."""

    def __init__(self, weights, e, forms, shared=(), per_layer=False, scale=None, rank=2, dim=3):
        self.weights, self.e, self.forms = weights, e, forms
        self.shared, self.per_layer, self.scale, self.rank, self.dim = shared, per_layer, scale, rank, dim
        self.generated = [layer for layer in range(LAYERS) if layer not in shared]

    def code_and_stem(self, layer):
        index = self.generated.index(layer)
        w = self.weights
        if self.per_layer:
            stem, joined = f"decoder.hypernetworks.{index}", self.e
        else:
            stem = "decoder.hypernetwork"
            joined = torch.cat([self.e, w[f"{stem}.layer_embedding.weight"][index]])
        return torch.relu(w[f"{stem}.linear.weight"] @ joined + w[f"{stem}.linear.bias"]), stem

    def parallel(self, side, layer, x, normed):
        if side == "encoder":
            return EncoderAdapters(self.weights).parallel(side, layer, x, normed)
        w = self.weights
        if layer in self.shared:
            stem = f"decoder.shared_adapters.{self.shared.index(layer)}"
            hidden = torch.relu(x @ w[f"{stem}.down.weight"].T + w[f"{stem}.down.bias"])
            y = hidden @ w[f"{stem}.up.weight"].T + w[f"{stem}.up.bias"]
        elif "adapter" in self.forms:
            code, stem = self.code_and_stem(layer)
            heads = f"{stem}.adapter_heads"
            down = (w[f"{heads}.down_weight"] @ code + w[f"{heads}.down_bias"]).view(D_MODEL, self.dim)
            up = (w[f"{heads}.up_weight"] @ code + w[f"{heads}.up_bias"]).view(self.dim, D_MODEL)
            b_d = w[f"{heads}.down_bias_weight"] @ code + w[f"{heads}.down_bias_bias"]
            b_u = w[f"{heads}.up_bias_weight"] @ code + w[f"{heads}.up_bias_bias"]
            y = torch.relu(x @ down + b_d) @ up + b_u
        else:
            return 0.0
        if self.scale is None:
            return y
        return y * (self.weights["decoder.scale"][layer] if self.scale == "learned" else self.scale)

    def linear(self, side, layer, attention, name, x, y):
        if side == "encoder" or "lora" not in self.forms or layer in self.shared:
            return y
        code, stem = self.code_and_stem(layer)
        head = f"{stem}.lora_heads.{attention}_{name}"
        if f"{head}.down.weight" not in self.weights:
            return y
        down = (self.weights[f"{head}.down.weight"] @ code + self.weights[f"{head}.down.bias"]).view(-1, self.rank)
        up = (self.weights[f"{head}.up.weight"] @ code + self.weights[f"{head}.up.bias"]).view(self.rank, -1)
        return y + x @ down @ up

    def prefix(self, side, layer):
        if side == "encoder" or "prefix" not in self.forms or layer in self.shared:
            return None
        code, stem = self.code_and_stem(layer)
        return tuple(
            (
                self.weights[f"{stem}.prefix_heads.{part}.weight"] @ code
                + self.weights[f"{stem}.prefix_heads.{part}.bias"]
            ).view(-1, HEADS * D_KV)
            for part in ("key", "value")
        )


class EncoderAdapters(Hooks):
    def __init__(self, weights):
        self.weights = weights

    def parallel(self, side, layer, x, normed):
        w, stem = self.weights, f"encoder.adapters.{layer}"
        hidden = torch.relu(x @ w[f"{stem}.down.weight"].T + w[f"{stem}.down.bias"])
        return hidden @ w[f"{stem}.up.weight"].T + w[f"{stem}.up.bias"]


def pooled(weights, h, conditioning="mean", pools=1):
    """e of one instance: h [S, D] -> Eq. 8 with the pooling in question."""
    if conditioning == "attention":
        vectors = [
            torch.softmax(h @ query / math.sqrt(D_MODEL), dim=0) @ h
            for query in weights["decoder.embedding.pooling.queries"]
        ]
    else:
        stretch = torch.arange(h.shape[0]) * pools // h.shape[0]
        vectors = [h[stretch == number].mean(dim=0) for number in range(pools)]
    stem = "decoder.embedding.mlp"
    e = torch.relu(weights[f"{stem}.0.weight"] @ torch.cat(vectors) + weights[f"{stem}.0.bias"])
    return weights[f"{stem}.2.weight"] @ e + weights[f"{stem}.2.bias"]


SMALL = dict(encoder__dim=4, decoder__dim=3, hypernet__bottleneck=6)
OPTIONS = {
    "lora": (dict(decoder__form="lora", lora__rank=2), dict(forms=["lora"]), {}),
    "lora everywhere": (
        dict(decoder__form="lora", lora__rank=2, lora__targets="qkvo", lora__attention="all"),
        dict(forms=["lora"]),
        {},
    ),
    "prefix": (dict(decoder__form="prefix", prefix__length=3), dict(forms=["prefix"]), {}),
    "adapter, lora and prefix": (
        dict(decoder__form="adapter+lora+prefix", lora__rank=2, prefix__length=3),
        dict(forms=["adapter", "lora", "prefix"]),
        {},
    ),
    "shared layers": (dict(decoder__shared_layers="1"), dict(forms=["adapter"], shared=[1]), {}),
    "hypernetwork per layer": (dict(hypernet__per_layer=True), dict(forms=["adapter"], per_layer=True), {}),
    "scaled": (dict(decoder__scale=4.0), dict(forms=["adapter"], scale=4.0), {}),
    "learned scale": (dict(decoder__learned_scale=True), dict(forms=["adapter"], scale="learned"), {}),
    "attention pooling": (
        dict(hypernet__conditioning="attention"),
        dict(forms=["adapter"]),
        dict(conditioning="attention"),
    ),
    "several queries": (
        dict(hypernet__conditioning="attention", hypernet__pools=3),
        dict(forms=["adapter"]),
        dict(conditioning="attention", pools=3),
    ),
    "several stretches": (dict(hypernet__pools=3), dict(forms=["adapter"]), dict(pools=3)),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options_of_the_hyperdecoder(base, name):
    options, hooks, pooling = OPTIONS[name]
    sizes = dict(SMALL)
    if "adapter" not in hooks["forms"]:
        del sizes["decoder__dim"]
    model, batch = double_model(method_config(base, **sizes, **options)), random_batch()
    weights = {name: value.detach().double() for name, value in model.method.state_dict().items()}
    expected = direct_logits(
        model,
        batch,
        lambda task: EncoderAdapters(weights),
        lambda task, h: GeneratedHooks(weights, pooled(weights, h, **pooling), **hooks),
    )
    assert relative_error(model_logits(model, batch), expected) < CLOSE


def test_attention_pooling_starts_as_the_mean(base):
    from hdscale.modeling import build_model

    mean = build_model(method_config(base, **SMALL), dtype=torch.float64, seed=4)
    attention = build_model(
        method_config(base, **SMALL, hypernet__conditioning="attention"), dtype=torch.float64, seed=4
    )
    attention.method.decoder.load_state_dict(mean.method.decoder.state_dict(), strict=False)
    attention.method.encoder.load_state_dict(mean.method.encoder.state_dict())
    batch = random_batch()
    assert relative_error(model_logits(attention.eval(), batch), model_logits(mean.eval(), batch)) < CLOSE


@pytest.mark.parametrize("name", ["hyperformer", "hyperformer++"])
def test_hyperformer_starts_as_its_authors_code_does(base, name):
    """Every Linear of the code network: N(0, 0.01²), bias 0. PyTorch's default has five times the spread."""
    model = build_model(method_config(base, name, hyperformer__dim=8, hyperformer__hidden=128))
    linears = [
        module
        for network in model.method.modules()
        if type(network).__name__ == "CodeNetwork"
        for module in network.network
        if isinstance(module, torch.nn.Linear)
    ]
    assert linears and all(not linear.bias.any() for linear in linears)
    spread = torch.cat([linear.weight.flatten() for linear in linears])
    assert abs(float(spread.std()) - 0.01) < 1e-3 and abs(float(spread.mean())) < 1e-3
