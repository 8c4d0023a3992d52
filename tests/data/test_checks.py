"""Labels and texts as the tokenizer gives them back: what is refused before anything is trained."""

from __future__ import annotations

import pytest

from hdscale.data.checks import check_labels, check_rouge, losses_of
from hdscale.data.settings import DataSettings
from hdscale.data.task import SplitRule, Task
from hdscale.data.tasks.custom import task_from_mapping
from hdscale.data.tokenize import load_tokenizer, tokenized_split
from hdscale.errors import UserError
from hdscale.files import json_line
from tests.helpers.places import T5_TOKENIZER, needs_real_text

pytestmark = needs_real_text


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(str(T5_TOKENIZER))


def labelled(*labels: str) -> Task:
    return Task("mine", "label", {"train": SplitRule(("train",))}, "{a}", "{b}", ("accuracy",), labels)


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (("yes", "nope {a}"), "gives label 'nope {a}' back as"),
        (("not  entailed", "entailed"), "gives label 'not  entailed' back as 'not entailed'"),
        (("日", "本"), "labels|gives label '日' back as ''"),
        (("one two three four five six seven a", "one two three four five six seven b"), "back as|the same"),
    ],
)
def test_a_label_that_the_tokenizer_changes_is_refused(tokenizer, labels, words) -> None:
    with pytest.raises(UserError, match=words):
        check_labels(labelled(*labels), tokenizer, length=6)


def test_two_labels_of_the_same_tokens_are_refused(tokenizer) -> None:
    with pytest.raises(UserError, match="labels '0' and '0 ' are the same"):
        check_labels(labelled("0", "0 "), tokenizer, length=6)


def test_the_package_s_own_labels_survive(tokenizer) -> None:
    check_labels(labelled("0", "1", "2"), tokenizer, length=6)
    check_labels(labelled("yes", "no"), tokenizer, length=6)


def summaries(**more: object) -> Task:
    declaration = {"name": "mine", "kind": "text", "source": "{a}", "target": "{b}", "files": {"train": "x.jsonl"}}
    return task_from_mapping({**declaration, **more})


def test_rouge_of_a_text_that_its_tokenizer_empties_is_refused() -> None:
    russian = ["Привет, мир", "Всё хорошо"]
    with pytest.raises(UserError, match="finds none in 2 of 2 targets; add 'rouge_tokenizer: unicode'"):
        check_rouge(summaries(), russian)
    check_rouge(summaries(rouge_tokenizer="unicode"), russian)
    check_rouge(summaries(metrics=["em"]), russian)
    check_rouge(summaries(), ["plain words", "Привет"])
    with pytest.raises(UserError, match="must be latin or unicode, not 'all'"):
        summaries(rouge_tokenizer="all")


def test_what_texts_lose_is_counted(tokenizer, tmp_path) -> None:
    """Of four rows one source has more than 8 tokens, two targets more than 4, and T5 does not know a brace."""
    rows = [
        {"a": "the cat saw the dog", "b": "a dog"},
        {"a": "the cat " * 9, "b": "a dog and a cat"},
        {"a": "the cat", "b": "a dog and a cat and a dog"},
        {"a": "the {cat}", "b": "a dog"},
    ]
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json_line(row) for row in rows))
    task = summaries(files={"train": str(path)})
    settings = DataSettings(cache=str(tmp_path / "cache"), max_source_length=8, max_target_length=4)
    split = tokenized_split(task, "train", tokenizer, settings)
    longer = [[len(tokenizer(row[name]).input_ids) > most for row in rows] for name, most in (("a", 8), ("b", 4))]
    assert (split.counts["source_cut"], split.counts["target_cut"]) == (sum(longer[0]), sum(longer[1]))
    assert split.counts["unknown"] == 1
    line = losses_of(task, split)
    assert line is not None and line.startswith("mine train: ") and "targets cut at 4 tokens" in line
    assert "25.0% rows with characters that the tokenizer does not know" in line
