"""Greedy decoding of ours against transformers' own search and against teacher-forced log-likelihoods."""

from __future__ import annotations

import pytest
import torch

from hdscale.bases import generation, greedy
from hdscale.bases.interface import Encoding
from hdscale.bases.t5 import NextTokens
from hdscale.modeling import build_model
from tests.helpers.adapted import METHODS, SIZES, method_config, random_batch, relative_error, shaken, tiny_base

FAMILIES = ("v1.0", "v1.1", "mt5", "umt5")


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    return {family: str(tiny_base(folder / family, family)) for family in FAMILIES}


def ending_sooner(model, size=2.0):
    """Of a model whose rows would never end, one that ends them after unlike numbers of tokens."""
    with torch.no_grad():
        model.base.lm_head.weight[1] *= size
    return model


def by_transformers(model, batch, **arguments):
    with torch.no_grad():
        encoded = model.encode(batch["input_ids"], batch["attention_mask"], batch["task_ids"])
        # the adapters are generated again at each token
        return generation.generate(model.base, encoded.encoding, encoded.adaptation, do_sample=False, **arguments)


@pytest.mark.parametrize("project", [True, False])
@pytest.mark.parametrize("name", METHODS)
def test_tokens_are_those_of_transformers_generate(bases, name, project):
    method, options = METHODS[name]
    batch = random_batch()
    for family in FAMILIES if name == "hyperdecoder" else ("v1.1",):
        model = shaken(build_model(method_config(bases[family], method, **options)))
        for least in (0, 3):
            expected = by_transformers(model, batch, max_new_tokens=6, min_new_tokens=least)
            with torch.no_grad():
                encoded = model.encode(batch["input_ids"], batch["attention_mask"], batch["task_ids"])
                adaptation = encoded.adaptation.for_generation() if encoded.adaptation is not None else None
                found = greedy.greedy_decode(model.base, encoded.encoding, adaptation, 6, least, project_source=project)
            assert torch.equal(found.ids, expected)


@pytest.mark.parametrize("name", ["hyperdecoder", "hyperdecoder, all forms", "lora"])
def test_an_evaluation_pass_is_the_training_pass(bases, name):
    method, options = METHODS[name]
    batch = random_batch()
    for family in FAMILIES:
        model = shaken(build_model(method_config(bases[family], method, **options)))
        expected = model.encode(batch["input_ids"], batch["attention_mask"], batch["task_ids"]).hidden.detach()
        with torch.no_grad():
            found = model.encode(batch["input_ids"], batch["attention_mask"], batch["task_ids"]).hidden
        seen = batch["attention_mask"].bool()
        assert relative_error(found[seen], expected[seen]) < 1e-5


@pytest.mark.parametrize("late", [0, 1])
def test_the_end_may_be_read_a_token_late(bases, monkeypatch, late):
    monkeypatch.setattr(greedy, "lateness", lambda device: late)
    lengths = set()
    for seed in range(8):
        batch = random_batch(seed)
        model = ending_sooner(shaken(build_model(method_config(bases["v1.1"], **SIZES)), seed=seed), 6.0)
        for most in (1, 2, 5, 9):
            found = model.generate(batch["input_ids"], batch["attention_mask"], max_new_tokens=most)
            expected = by_transformers(model, batch, max_new_tokens=most)
            assert torch.equal(found, expected)
            lengths.add((most, expected.shape[1] - 1))
    assert any(length < most for most, length in lengths) and any(length == most == 9 for most, length in lengths)


@pytest.mark.parametrize("late", [0, 1])
@pytest.mark.parametrize("name", METHODS)
def test_rows_that_have_ended_are_dropped(bases, monkeypatch, name, late):
    monkeypatch.setattr(greedy, "lateness", lambda device: late)
    method, options = METHODS[name]
    dropped = 0

    def keep(self, rows, keep=NextTokens.keep):
        nonlocal dropped
        kept = keep(self, rows)
        dropped += kept
        return kept

    monkeypatch.setattr(NextTokens, "keep", keep)
    for seed in range(4):
        one, two, three = random_batch(seed), random_batch(seed + 50), random_batch(seed + 90)
        batch = {key: torch.cat([one[key], two[key], three[key]]) for key in one}
        model = ending_sooner(shaken(build_model(method_config(bases["v1.1"], method, **options)), seed=seed), 5.0)
        source = batch["input_ids"], batch["attention_mask"], batch["task_ids"]
        ids, scores = model.generate_with_scores(*source, max_new_tokens=14)
        assert torch.equal(ids, by_transformers(model, batch, max_new_tokens=14))
        generated = ids[:, 1:]
        ended = (generated == 1).cumsum(dim=1) - (generated == 1).long() > 0
        labels = generated.masked_fill(ended | (generated == 0), -100)
        assert torch.allclose(scores, model.log_likelihood(*source[:2], labels, source[2]), rtol=1e-4, atol=1e-4)
    assert dropped > 0 or name != "hyperdecoder"


@pytest.mark.parametrize("name", METHODS)
def test_some_instances_of_an_adaptation(bases, name):
    method, options = METHODS[name]
    model, batch = shaken(build_model(method_config(bases["v1.1"], method, **options))), random_batch()
    rows = torch.tensor([2, 0])
    with torch.no_grad():
        encoded = model.encode(batch["input_ids"], batch["attention_mask"], batch["task_ids"])
        adaptation = encoded.adaptation.for_generation() if encoded.adaptation is not None else None
        whole = greedy.greedy_decode(model.base, encoded.encoding, adaptation, 6)
        some = adaptation.select(rows) if adaptation is not None else None
        assert adaptation is None or some is not None
        part = Encoding(encoded.hidden[rows], encoded.mask[rows])
        found = greedy.greedy_decode(model.base, part, some, 6)
    assert torch.equal(found.ids, whole.ids[rows][:, : found.ids.shape[1]])


@pytest.mark.parametrize("least", [0, 2])
def test_scores_are_those_of_a_pass_of_their_own(bases, least):
    batch = random_batch()
    source = batch["input_ids"], batch["attention_mask"], batch["task_ids"]
    model = ending_sooner(shaken(build_model(method_config(bases["v1.1"], **SIZES))), 6.0)
    arguments = {"max_new_tokens": 7, "min_new_tokens": least} if least else {"max_new_tokens": 7}
    ids, scores = model.generate_with_scores(*source, **arguments)
    assert torch.equal(ids, model.generate(*source, **arguments))
    generated = ids[:, 1:]
    ended = (generated == 1).cumsum(dim=1) - (generated == 1).long() > 0
    labels = generated.masked_fill(ended | (generated == 0), -100)
    assert torch.allclose(scores, model.log_likelihood(*source[:2], labels, source[2]), rtol=1e-4, atol=1e-4)
    # beams go through transformers, and are scored by a pass of their own
    ids, scores = model.generate_with_scores(*source, num_beams=2, max_new_tokens=4)
    assert ids.shape[0] == scores.shape[0] == 3 and bool((scores < 0).all())
