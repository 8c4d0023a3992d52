"""The packaged default: small, complete, rerunnable, and better than chance at its own language."""

import json
import math
import random
from itertools import islice
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from hdscale.bases.embedded import asset_folder
from hdscale.bases.interface import Base, Source
from hdscale.bases.loading import load_base
from hdscale.bases.settings import ModelSettings
from hdscale.data.tasks.quickstart.language import documents
from hdscale.data.tasks.quickstart.tasks import MAKERS, rows
from tools.quickstart import pretrain
from tools.quickstart.tokenizer import train_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(asset_folder())


class WithLoss(torch.nn.Module):
    """A base with the call by which pre-training asks a model of transformers for its loss."""

    def __init__(self, base: Base) -> None:
        super().__init__()
        self.base = base

    def forward(self, input_ids, attention_mask, labels) -> SimpleNamespace:
        encoding = self.base.encode(Source(input_ids, attention_mask))
        logits = self.base.head(self.base.decode(self.base.decoder_inputs(labels), encoding))
        return SimpleNamespace(loss=F.cross_entropy(logits.flatten(0, 1), labels.flatten()))


@pytest.fixture(scope="module")
def base():
    return WithLoss(load_base(ModelSettings(name="quickstart"), torch.float32).eval())


def test_the_package_stays_small():
    files = [path for path in asset_folder().rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 5_000_000
    expected = {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "README.md"}
    assert expected <= {path.name for path in files}


def test_the_tokenizer_has_t5s_layout(tokenizer):
    assert isinstance(tokenizer, PreTrainedTokenizerFast) and tokenizer.is_fast
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)
    assert tokenizer.convert_tokens_to_ids("<extra_id_0>") == len(tokenizer) - 1
    assert tokenizer("It rains.").input_ids[-1] == tokenizer.eos_token_id


@pytest.mark.parametrize("label", ["0", "1", "2", "9", "12", "3.8", "5.0"])
def test_labels_and_numbers_are_short(tokenizer, label):
    ids = tokenizer(label, add_special_tokens=False).input_ids
    assert len(ids) == len(label) and tokenizer.decode(ids) == label


def test_text_of_the_language_survives_the_tokenizer(tokenizer):
    texts = list(islice(documents("round trip"), 300))
    texts += [value for name in MAKERS for row in rows(name, "test")[:50] for value in row.values()]
    for text, ids in zip(texts, tokenizer(texts).input_ids, strict=True):
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


PRINTABLE = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=20)


@settings(max_examples=100, deadline=None)
@given(PRINTABLE.filter(lambda word: "<unk>" not in word))
def test_any_printable_character_is_covered(tokenizer, word):
    assert tokenizer.unk_token_id not in tokenizer(word).input_ids


def test_the_tokenizer_is_rerunnable():
    again = [train_tokenizer(0, paragraphs=500).backend_tokenizer.to_str() for _ in range(2)]
    assert again[0] == again[1]


@given(st.integers(2, 80), st.integers(0, 10**6))
@settings(max_examples=100, deadline=None)
def test_corruption_hides_and_tells_everything_once(length, seed):
    first_sentinel = 1000
    ids = [*range(10, 10 + length), 1]
    source, target = pretrain.corrupt(ids, first_sentinel, random.Random(seed))
    assert source[-1] == target[-1] == 1
    spans = {}
    for token in target[:-1]:
        if token > 900:
            spans[token] = hidden = []
        else:
            hidden.append(token)
    restored = [piece for token in source for piece in (spans[token] if token > 900 else [token])]
    assert restored == ids and all(spans.values())
    assert list(spans) == [first_sentinel - i for i in range(len(spans))]
    assert sum(map(len, spans.values())) == max(1, round(length * pretrain.NOISE_DENSITY))


def test_the_base_reads_its_language(base, tokenizer):
    """Far below the uniform loss, and what its record says, within the sample's noise."""
    loss = pretrain.corruption_loss(base, tokenizer, paragraphs=200)
    record = json.loads((asset_folder() / "pretraining.json").read_text())
    assert loss < 0.4 * math.log(len(tokenizer))
    assert loss == pytest.approx(record["held_out_loss"], abs=0.15)
    assert sum(p.numel() for p in base.parameters()) == record["parameters"]


def test_the_base_uses_the_source(base, tokenizer):
    """With the source of another paragraph, the same targets are much harder."""
    pairs = list(islice(pretrain.pairs(tokenizer, "held out"), 60))
    swapped = [(pairs[i - 1][0], target) for i, (_, target) in enumerate(pairs)]
    with torch.no_grad():
        right, wrong = (float(base(**pretrain.padded(batch)).loss) for batch in (pairs, swapped))
    assert wrong > right + 1.0


def test_pretraining_is_rerunnable(tokenizer):
    settings = dict(steps=3, batch_size=4, learning_rate=3e-3, seed=5)
    (first, losses), (second, again) = (pretrain.pretrain(tokenizer, **settings) for _ in range(2))
    assert losses == again and list(losses) == [1, 2, 3]
    for name, weight in first.state_dict().items():
        assert torch.equal(weight, second.state_dict()[name]), name


def test_pretraining_writes_a_folder_that_loads(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pretrain, "train_tokenizer", lambda seed: train_tokenizer(seed, paragraphs=500))
    monkeypatch.setattr(pretrain, "HELD_OUT", 50)
    pretrain.main(["--to", str(tmp_path), "--steps", "2", "--batch-size", "4", "--threads", "1"])
    record = json.loads((tmp_path / "pretraining.json").read_text())
    model = load_base(ModelSettings(name=str(tmp_path)), torch.float32)
    assert model.lm_head.weight.data_ptr() != model.shared.weight.data_ptr()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert len(tokenizer) == record["vocabulary"] == model.config.vocab_size
    assert pretrain.corruption_loss(WithLoss(model), tokenizer, 50) == pytest.approx(record["held_out_loss"], abs=1e-3)
    assert "held_out_loss" in capsys.readouterr().out
