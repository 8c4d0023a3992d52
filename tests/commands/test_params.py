"""Counts against Appendix D's closed forms, the paper's percentages, and the methods' published sizes."""

from __future__ import annotations

import json
import time

import pytest

from hdscale.commands.cli import main
from hdscale.modeling.parameters import count_for
from tests.helpers.adapted import method_config

GLUE = ["cola", "sst2", "stsb", "mrpc", "qqp", "mnli", "qnli", "rte"]
# name: (layers of a stack, d_model)
SHAPES = {"t5-v1_1-base": (12, 768), "t5-v1_1-large": (24, 1024), "t5-v1_1-xxl": (24, 4096)}
LAYER_EMBEDDING = 10


def adapters(l, a, d):
    """D.1, for one stack of l layers."""
    return l * (2 * a * d + a + d)


def task_hypernet_side(t, l, b, a, d):
    """D.2 for one side (the paper doubles it), task embedding size d."""
    return t * d + l * LAYER_EMBEDDING + (d + LAYER_EMBEDDING) * b + b * (2 * a * d + a + d)


def encoder_conditioned(b, a, d):
    """D.3: the decoder's generator."""
    return 2 * d * d + (d + LAYER_EMBEDDING) * b + b * (2 * a * d + a + d)


def heads_biases(a, d):
    """The hypernetwork's output biases, which D leaves out."""
    return 2 * a * d + a + d


@pytest.mark.parametrize("model", SHAPES)
@pytest.mark.parametrize("a", [8, 64])
def test_adapters_closed_form(model, a):
    l, d = SHAPES[model]
    count = count_for(method_config(model, "adapter", encoder__dim=a, decoder__dim=2 * a))
    assert count.trainable == adapters(l, a, d) + adapters(l, 2 * a, d)


@pytest.mark.parametrize("model", SHAPES)
@pytest.mark.parametrize("a, b", [(64, 128), (36, 72), (2, 16)])
def test_hyperdecoder_closed_form(model, a, b):
    """D.3 plus the biases of hypernetwork and MLP and the layer embeddings."""
    l, d = SHAPES[model]
    count = count_for(method_config(model, encoder__dim=50, decoder__dim=a, hypernet__bottleneck=b))
    closed = adapters(l, 50, d) + encoder_conditioned(b, a, d)
    assert count.trainable == closed + heads_biases(a, d) + b + 2 * d + LAYER_EMBEDDING * l


@pytest.mark.parametrize("model", SHAPES)
@pytest.mark.parametrize("a, b", [(50, 100), (64, 128)])
def test_task_hypernet_closed_form(model, a, b):
    """D.2 on both sides plus the hypernetworks' biases."""
    l, d = SHAPES[model]
    config = method_config(model, "task_hypernet", GLUE, encoder__dim=a, decoder__dim=a, hypernet__bottleneck=b)
    assert count_for(config).trainable == 2 * (task_hypernet_side(len(GLUE), l, b, a, d) + heads_biases(a, d) + b)


@pytest.mark.parametrize(
    "model, options, trainable, paper",
    [
        ("t5-v1_1-large", dict(encoder__dim=64, decoder__dim=64, hypernet__bottleneck=128), 22_452_400, 2.9),
        ("t5-v1_1-base", dict(encoder__dim=64, decoder__dim=64, hypernet__bottleneck=128), 15_259_192, 6.2),
        ("t5-v1_1-base", dict(encoder__dim=512, decoder__dim=36, hypernet__bottleneck=72), 14_785_236, 5.9),
    ],
)
def test_percentages_of_the_paper(model, options, trainable, paper):
    count = count_for(method_config(model, **options))
    assert count.trainable == trainable
    assert abs(count.percent - paper) <= 0.1


@pytest.mark.parametrize(
    "model, base", [("t5-v1_1-base", 247_577_856), ("t5-v1_1-large", 783_150_080), ("t5-base", 222_903_552)]
)
def test_bases(model, base):
    count = count_for(method_config(model, "full_finetuning"))
    assert count.base == count.trainable == base == sum(count.base_parts.values())
    assert count.percent == 100.0


@pytest.mark.parametrize(
    "name, model, options, trainable",
    [
        ("modular", "t5-v1_1-large", {}, 37_757_952),
        ("hyperformer", "t5-v1_1-large", {}, 69_167_744),
        ("hyperformer++", "t5-v1_1-large", {}, 34_689_664),
        ("hyperformer", "t5-base", dict(hyperformer__form="layer", hyperformer__dim=24), 122_327_168),
        ("hyperformer++", "t5-base", dict(hyperformer__dim=24), 5_211_056),
        # q and v of 24 encoder and 48 decoder attentions, two matrices of rank 16
        ("lora", "t5-v1_1-large", {}, 72 * 2 * 2 * 16 * 1024),
    ],
)
def test_other_methods(name, model, options, trainable):
    count = count_for(method_config(model, name, GLUE, **options))
    assert count.trainable == trainable == sum(count.parts.values())


def test_hyperprompt_closed_form():
    l, d, tasks = 24, 1024, len(GLUE)
    size, hidden, length, b = 64, 128, 16, 32
    local = 2 * l * (d * b + b * d)
    expected = {
        "share": 2 * (tasks * length * d + local),
        "sep": 2 * (tasks * length * d + tasks * local),
        "global": 2
        * (
            tasks * length * d
            + (tasks + l) * size
            + (2 * size + 1) * hidden
            + (hidden + 1 + 2) * size
            + 2 * size * (d * b + b * d)
        ),
    }
    for variant, trainable in expected.items():
        config = method_config("t5-v1_1-large", "hyperprompt", GLUE, hyperprompt__variant=variant)
        assert count_for(config).trainable == trainable


def test_xxl_is_counted_in_seconds_without_its_memory():
    start = time.monotonic()
    count = count_for(method_config("t5-v1_1-xxl", encoder__dim=64, decoder__dim=64, hypernet__bottleneck=128))
    assert time.monotonic() - start < 20
    assert count.base > 11_000_000_000


def test_command(tmp_path, capsys):
    config = tmp_path / "run.yaml"
    config.write_text("model: {name: t5-v1_1-large}\nmethod: {decoder: {adapter: generated}}\ndata: {tasks: [glue]}\n")
    assert main(["params", "--config", str(config), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["trainable"] == 22_452_400 == sum(printed["parts"].values())
    assert main(["params", "--config", str(config), "method.name=adapter", "method.budget=2.9%"]) == 0
    assert "22,670,112" in capsys.readouterr().out
    assert main(["params", "--config", str(config), "method.name=lora", "method.hypernet.bottleneck=9"]) == 2
    error = capsys.readouterr().err
    assert "method 'lora' as configured has no such option" in error and error.count("\n") == 1
