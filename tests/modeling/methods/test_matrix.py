"""Every method: overfits 64 real GLUE examples, leaves what is frozen alone, round-trips through an export, resumes.

A new method is one row of `MATRIX`.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from hdscale.data.batches import Row, collate
from hdscale.data.settings import DataSettings
from hdscale.data.sources import load_split
from hdscale.data.tasks import expand_tasks
from hdscale.data.tokenize import load_tokenizer
from hdscale.modeling import build_model, from_pretrained
from hdscale.modeling.methods import METHODS
from tests.helpers.adapted import method_config
from tests.helpers.places import HUB, T5_TOKENIZER, needs_real_text
from tests.helpers.tiny import save_tiny_t5

pytestmark = needs_real_text

TASKS = ["cola", "mrpc", "rte", "sst2"]
EXAMPLES_PER_TASK = 16
SIDES = dict(encoder__dim=32, decoder__dim=32)
GENERATED = dict(SIDES, hypernet__bottleneck=32)

RATE = 1e-2

# name: (method, options of method.*, steps that suffice to overfit, learning rate)
MATRIX: dict[str, tuple[str, dict[str, Any], int, float]] = {
    "hyperdecoder": ("hyperdecoder", GENERATED, 100, RATE),
    "hyperdecoder, generated encoder": ("hyperdecoder", dict(GENERATED, encoder__adapter="generated"), 150, RATE),
    "hyperdecoder, LoRA and prefix on top": (
        "hyperdecoder",
        dict(GENERATED, decoder__form="adapter+lora+prefix", lora__rank=4, prefix__length=4),
        100,
        RATE,
    ),
    "hyperdecoder, LoRA instead": (
        "hyperdecoder",
        dict(encoder__dim=32, hypernet__bottleneck=32, decoder__form="lora", lora__rank=8),
        100,
        RATE,
    ),
    "hyperdecoder, attention pooling, own hypernetworks": (
        "hyperdecoder",
        dict(GENERATED, hypernet__conditioning="attention", hypernet__pools=2, hypernet__per_layer=True),
        100,
        RATE,
    ),
    "hyperdecoder, a shared layer, learned scale": (
        "hyperdecoder",
        dict(GENERATED, decoder__shared_layers="0", decoder__learned_scale=True),
        100,
        RATE,
    ),
    "adapter": ("adapter", SIDES, 100, RATE),
    "task_hypernet": ("task_hypernet", GENERATED, 500, RATE),
    "modular": ("modular", dict(lora__rank=16, modular__learning_rate=0.02), 200, RATE),
    "lora": ("lora", dict(lora__rank=16), 100, RATE),
    "hyperformer": ("hyperformer", dict(hyperformer__dim=32), 200, RATE),
    "hyperformer, a hypernetwork per layer": (
        "hyperformer",
        dict(hyperformer__dim=32, hyperformer__form="layer"),
        200,
        RATE,
    ),
    "hyperformer++": ("hyperformer++", dict(hyperformer__dim=32), 200, RATE),
    "hyperprompt": ("hyperprompt", dict(hyperprompt__length=64, hyperprompt__bottleneck=64), 300, 3e-3),
    "hyperprompt and base": ("hyperprompt", dict(hyperprompt__length=8, hyperprompt__tune_base=True), 120, 3e-3),
    "full_finetuning": ("full_finetuning", {}, 60, RATE),
}
QUICK = ["hyperdecoder"]
"""What overfits in the fast tests; the others take longer and are marked so."""


def test_every_method_has_a_row():
    assert {method for method, *_ in MATRIX.values()} == set(METHODS)


@pytest.fixture(scope="module")
def rows() -> tuple[list[Row], int]:
    """64 training examples of four GLUE tasks, their token ids renumbered to those that occur; and how many occur."""
    tokenizer = load_tokenizer(str(T5_TOKENIZER))
    settings = DataSettings(root=str(HUB))
    renumbered = {tokenizer.pad_token_id: 0, tokenizer.eos_token_id: 1}
    found = []
    for number, task in enumerate(expand_tasks(TASKS, settings)):
        for example in itertools.islice(load_split(task, "train", settings), EXAMPLES_PER_TASK):
            texts = (example.source, example.target)
            source, target = (
                [
                    renumbered.setdefault(id, len(renumbered))
                    for id in tokenizer(text, truncation=True, max_length=32).input_ids
                ]
                for text in texts
            )
            found.append(Row(source, target, number, example.id, task.name))
    assert len(found) == 64
    return found, len(renumbered)


@pytest.fixture(scope="module")
def batch(rows):
    return collate(rows[0], 0)


@pytest.fixture(scope="module")
def base(rows, tmp_path_factory):
    """A tiny T5 with random weights; its head is large enough for a frozen one to be sure of a token."""
    from safetensors.torch import load_file, save_file

    folder = save_tiny_t5(tmp_path_factory.mktemp("base") / "t5", vocabulary=rows[1], d_model=64, d_ff=96, d_kv=16)
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] *= 8.0
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def train(model, batch, steps, rate):
    """The loss of each step of AdamW on the whole batch: the method's own rates, a short warm-up, linear decay."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    own = model.learning_rates(rate)
    groups = [{"params": [p], "lr": own.get(name, rate), "peak": own.get(name, rate)} for name, p in parameters.items()]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    losses = []
    model.train()
    for step in range(steps):
        torch.manual_seed(step)
        out = model(**batch)
        loss = out.loss_sum / out.tokens
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * min(1.0, (step + 1) / 10) * (1 - step / steps)
        optimizer.step()
        losses.append(float(loss.detach()))
    model.eval()
    return losses


def frozen(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}


@pytest.mark.parametrize("name", MATRIX)
def test_trains_leaves_the_frozen_alone_and_round_trips(base, batch, name, tmp_path):
    method, options, _, rate = MATRIX[name]
    model = build_model(method_config(base, method, TASKS, **options))
    before, start = frozen(model), {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    losses = train(model, batch, 8, rate)
    assert losses[-1] < 0.95 * losses[0]
    parameters = dict(model.named_parameters())
    assert all(torch.equal(parameters[key], value) for key, value in before.items())
    moved = [key for key, value in start.items() if not torch.equal(parameters[key], value)]
    unmoved = start.keys() - set(moved)
    # a row of an embedding that no example uses may rest, a whole parameter not
    assert not unmoved, unmoved
    model.save_pretrained(tmp_path)
    again = from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(**batch).loss_sum, model(**batch).loss_sum)
    assert all(torch.equal(dict(again.named_parameters())[key], value) for key, value in parameters.items())


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in MATRIX]
)
def test_overfits_64_real_examples(base, batch, name):
    method, options, steps, rate = MATRIX[name]
    model = build_model(method_config(base, method, TASKS, **options))
    before = frozen(model)
    train(model, batch, steps, rate)
    parameters = dict(model.named_parameters())
    assert all(torch.equal(parameters[key], value) for key, value in before.items())
    # every one of the 64 answers, by decoding
    labels = batch["labels"].masked_fill(batch["labels"] == -100, 0)
    answers = model.generate(
        batch["input_ids"], batch["attention_mask"], batch["task_ids"], max_new_tokens=labels.shape[1]
    )[:, 1:]
    answers = torch.nn.functional.pad(answers, (0, labels.shape[1] - answers.shape[1]))
    assert torch.equal(answers, labels)


def test_every_method_resumes_bit_for_bit(rank_pool, base, rows, tmp_path):
    """Through the engine, with dropout, micro-batches and a schedule: the same losses, masters and moments."""
    configs = {}
    for name, (method, options, *_) in MATRIX.items():
        config = method_config(base, method, TASKS, **options)
        config.model.dropout = 0.1
        configs[name] = config.to_dict()
    batches = [collate(rows[0][start::16], 0) for start in range(4)]
    (found,) = rank_pool(1).run(
        "tests.helpers.methods_jobs:resume",
        {"configs": configs, "batches": batches, "folder": str(tmp_path)},
        timeout=400,
    )
    assert found.keys() == MATRIX.keys()
    for name, result in found.items():
        assert result["losses"][0] == result["losses"][1] and len(result["losses"][0]) == 2, name
        trains_all = name in ("full_finetuning", "hyperprompt and base")
        assert result["frozen_kept"] and (result["frozen"] == 0) == trains_all, name
        for kind in ("masters", "moments"):
            whole, resumed = result[kind]
            assert whole.keys() == resumed.keys() and whole, (name, kind)
            assert all(torch.equal(whole[key], resumed[key]) for key in whole), (name, kind)
        assert result["rates"] == ([0.01, 0.02] if MATRIX[name][0] == "modular" else [0.01]), name
