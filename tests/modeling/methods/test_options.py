"""Options that a method does not have, budgets, tasks that a model was not trained on."""

from __future__ import annotations

import pytest
import torch

from hdscale.errors import UserError
from hdscale.modeling import HyperdecoderConfig, build_model
from hdscale.modeling.methods import METHODS, check_method
from hdscale.modeling.methods.budget import nearest_size, parse_budget
from hdscale.modeling.parameters import count_for
from tests.helpers.adapted import TASKS, method_config, random_batch, shaken, tiny_base

LARGE = "t5-v1_1-large"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_base(tmp_path_factory.mktemp("base") / "v1.1")


@pytest.mark.parametrize(
    "name, options",
    [
        ("lora", dict(hypernet__bottleneck=7)),
        ("lora", dict(decoder__dim=7)),
        ("adapter", dict(hypernet__mlp=False)),
        ("adapter", dict(lora__rank=2)),
        ("task_hypernet", dict(hypernet__conditioning="attention")),
        ("task_hypernet", dict(hypernet__pools=2)),
        ("hyperdecoder", dict(lora__rank=2)),
        ("hyperdecoder", dict(prefix__length=2)),
        ("hyperdecoder", dict(modular__skills=2)),
        ("hyperdecoder", dict(encoder__form="lora")),
        ("hyperdecoder", dict(encoder__adapter="none", encoder__dim=3)),
        ("hyperformer++", dict(hyperformer__form="layer")),
        ("hyperprompt", dict(hyperprompt__variant="share", hyperprompt__embedding=3)),
        ("modular", dict(hyperformer__dim=3)),
        ("full_finetuning", dict(encoder__dim=3)),
    ],
)
def test_options_that_a_method_does_not_have_are_refused(base, name, options):
    key = list(options)[-1]
    known = "(its options are|it has no options)"
    pattern = rf"method.{key.replace('__', '.')}=.*'{name}' as configured has no such option; {known}"
    with pytest.raises(UserError, match=pattern.replace("+", r"\+")) as caught:
        build_model(method_config(base, name, **options))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name, kind, wrong", [("adapter", "manual", "task"), ("task_hypernet", "task", "none")])
def test_a_preset_decides_its_kinds(base, name, kind, wrong):
    model = build_model(method_config(base, name))
    assert model.config.method.encoder.adapter == model.config.method.decoder.adapter == kind
    with pytest.raises(UserError, match=f"'{name}' always has {kind} here"):
        build_model(method_config(base, name, encoder__adapter=wrong))


def test_building_leaves_the_callers_configuration_alone(base):
    config = method_config(base, "adapter", budget="20%")
    before = config.to_dict()
    model = build_model(config)
    assert config.to_dict() == before
    assert model.config.method.budget is None and model.config.method.decoder.dim != config.method.decoder.dim


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("lora", dict(lora__targets="qx"), "method.lora.targets=qx"),
        ("lora", dict(lora__targets="qq"), "method.lora.targets=qq"),
        ("lora", dict(lora__attention="none"), "method.lora.attention=none"),
        ("lora", dict(lora__rank=0), "method.lora.rank=0"),
        ("modular", dict(modular__skills=0), "method.modular.skills=0"),
        ("modular", dict(modular__temperature=0.0), "method.modular.temperature=0.0"),
        ("modular", dict(modular__learning_rate=-1.0), "method.modular.learning_rate"),
        ("hyperformer", dict(hyperformer__form="both"), "method.hyperformer.form=both"),
        ("hyperformer", dict(hyperformer__dim=0), "method.hyperformer.dim=0"),
        ("hyperprompt", dict(hyperprompt__variant="globl"), "did you mean 'global'"),
        ("hyperprompt", dict(hyperprompt__length=0), "method.hyperprompt.length=0"),
        ("hyperdecoder", dict(decoder__form="adapter+lorra"), "method.decoder.form"),
        ("hyperdecoder", dict(decoder__form="lora+lora"), "method.decoder.form"),
        ("hyperdecoder", dict(decoder__shared_layers="0-"), None),
        ("hyperdecoder", dict(decoder__shared_layers="x"), "write layers from 0"),
        ("hyperdecoder", dict(decoder__shared_layers="1-2"), "the stack has layers 0 to 1"),
        ("hyperdecoder", dict(decoder__scale=float("inf")), "method.decoder.scale"),
        ("hyperdecoder", dict(hypernet__pools=0), "method.hypernet.pools=0"),
        ("hyperdecoder", dict(hypernet__layer_embedding=-1), "method.hypernet.layer_embedding=-1"),
        (
            "hyperdecoder",
            dict(encoder__adapter="generated", encoder__form="lora", lora__attention="cross"),
            "the encoder has no cross-attention",
        ),
    ],
)
def test_bad_values(base, name, options, message):
    if message is None:  # "0-" is read as layer 0
        assert len(build_model(method_config(base, name, **options)).method.decoder.shared_adapters) == 1
        return
    with pytest.raises(UserError, match=message):
        check_method(method_config(base, name, **options))


@pytest.mark.parametrize("name", ["task_hypernet", "modular", "hyperformer", "hyperformer++", "hyperprompt"])
def test_task_conditioned_methods_need_tasks(base, name):
    with pytest.raises(UserError, match="names of the tasks"):
        build_model(method_config(base, name, tasks=[]))
    model, batch = build_model(method_config(base, name)).eval(), random_batch()
    with pytest.raises(UserError, match="give task_ids"):
        model(batch["input_ids"], batch["attention_mask"], batch["labels"])
    batch["task_ids"][0] = len(TASKS)
    with pytest.raises(UserError, match="trained on 3 tasks, 0 to 2"):
        model(**batch)


def test_task_ids_by_name():
    config = HyperdecoderConfig(tasks=["cola", "rte"])
    assert config.task_id("rte") == 1
    with pytest.raises(UserError, match="was not trained on it; did you mean 'cola'"):
        config.task_id("colla")
    assert config.task_id("squad", unseen=True) == -1


def test_unseen_tasks_take_the_mean_embedding(base):
    """Table 5's note: with task id -1 a task-conditioned model behaves as if the mean embedding were a task's own."""
    model, batch = shaken(build_model(method_config(base, "task_hypernet"))), random_batch()
    unseen = {**batch, "task_ids": torch.full((3,), -1)}
    with torch.no_grad():
        expected = model(**unseen).loss_sum
        for side in (model.method.encoder, model.method.decoder):
            side.task_embedding.weight[1] = side.task_embedding.weight.mean(dim=0)
        as_task = model(**{**batch, "task_ids": torch.full((3,), 1)}).loss_sum
    assert torch.allclose(expected, as_task, rtol=1e-5)


def test_instance_conditioned_methods_need_no_tasks(base):
    model, batch = build_model(method_config(base, tasks=[])).eval(), random_batch()
    with torch.no_grad():
        loss = model(batch["input_ids"], batch["attention_mask"], batch["labels"]).loss_sum
        assert torch.equal(loss, model(**batch).loss_sum)


@pytest.mark.parametrize(
    "name, budget, options, size",
    [
        ("adapter", "2.9%", {}, {"encoder.dim": 230, "decoder.dim": 230}),
        ("hyperdecoder", "2.87%", {}, {"hypernet.bottleneck": 128}),
        ("hyperdecoder", "2.867%", dict(solve="decoder.dim"), {"decoder.dim": 64}),
        ("hyperformer++", "4.43%", {}, {"hyperformer.dim": 128}),
        ("modular", "4.82%", {}, {"lora.rank": 16}),
    ],
)
def test_budget_finds_the_sizes_of_the_paper(name, budget, options, size):
    model = build_model(method_config(LARGE, name, budget=budget, **options), device="meta")
    for key, value in size.items():
        side, option = key.split(".")
        assert getattr(getattr(model.config.method, side), option) == value


@pytest.mark.parametrize("name", [name for name in METHODS if name != "full_finetuning"])
def test_budget_is_met_by_every_method(name):
    options = {"hyperprompt__variant": "share"} if name == "hyperprompt" else {}
    count = count_for(method_config("t5-v1_1-base", name, budget="3%", **options))
    assert abs(count.percent - 3.0) <= 0.5


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("hyperdecoder", dict(budget="0.1%"), r"the nearest is 1 with 0\.707%"),
        ("hyperdecoder", dict(budget="2.9"), "in percent, such as 2.9%"),
        ("hyperdecoder", dict(budget="0%"), "in percent"),
        ("hyperdecoder", dict(budget="2.9%", solve="encoder.dims"), "did you mean 'encoder.dim'"),
        ("full_finetuning", dict(budget="2.9%"), "has no size to solve for"),
        ("hyperprompt", dict(budget="2.9%", hyperprompt__tune_base=True), "has no size to solve for"),
        ("adapter", dict(budget="2.90001%"), r"cannot be met.*the nearest is"),
        ("adapter", dict(solve="decoder.dim"), "needs a method.budget"),
    ],
)
def test_budgets_that_cannot_be_met(name, options, message):
    with pytest.raises(UserError, match=message):
        check_method(method_config(LARGE, name, **options))


def test_budget_arithmetic():
    assert parse_budget("2.9%") == (2.9, 0.05)
    assert parse_budget(" 3 % ") == (3.0, 0.5)
    assert nearest_size(lambda size: size * 0.3, 10.0) == 33
    assert nearest_size(lambda size: 5 + size, 2.0) == 1
