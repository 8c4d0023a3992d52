"""From chunks to answers, and the official evaluator's definition on the same prediction files."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path

import pytest

from hdscale.data.settings import DataSettings
from hdscale.data.task import Example
from hdscale.data.tasks.mrqa.reader import questions as read_questions
from hdscale.data.tasks.mrqa.reader import split_paths
from hdscale.data.tasks.mrqa.tasks import tasks as mrqa_tasks
from hdscale.errors import UserError
from hdscale.evaluation import mrqa_protocol as protocol
from hdscale.evaluation.metrics import compute
from tests.helpers.places import DATA
from tests.helpers.plain_scores import plain_scores


def chunk(prediction: str, score: float, tokens: int = 2) -> dict:
    return {"prediction": prediction, "score": score, "tokens": tokens}


@pytest.mark.parametrize(
    ("chunks", "by_sum", "by_mean"),
    [
        (
            [chunk("", -0.1), chunk("cat", -5.0), chunk("dog", -3.0)],
            "dog",
            "dog",
        ),  # the likeliest of all is empty
        ([chunk("", -0.1), chunk(" ", -0.2)], "", ""),
        ([chunk("one", -4.0, 2), chunk("a long answer", -6.0, 6)], "one", "a long answer"),
        ([chunk("first", -2.0), chunk("second", -2.0)], "first", "first"),
        ([chunk("cat", float("-inf"))], "cat", "cat"),
        ([], "", ""),
    ],
)
def test_the_likeliest_answer_that_is_not_empty(chunks, by_sum, by_mean):
    assert protocol.best_answer(chunks) == by_sum
    assert protocol.best_answer(chunks, mean=True) == by_mean


def parts(groups: list[str]) -> list[Example]:
    return [Example("s", "", "squad", f"{group}#{number}", (group,), group) for number, group in enumerate(groups)]


def test_chunks_of_a_question_may_lie_apart():
    records = [chunk("x", -3), chunk("y", -1), chunk("z", -2)]
    answers, questions = protocol.answer_questions(records, parts(["a", "b", "a"]))
    assert answers == {"a": "z", "b": "y"}
    assert [question.references for question in questions.values()] == [("a",), ("b",)]


def test_official_files_go_there_and_back(tmp_path):
    answers = {"q0": "cat", "q0~2": "dog ß 😀", "q1": ""}
    protocol.write_official(answers, tmp_path / "p.json")
    assert json.loads((tmp_path / "p.json").read_text(encoding="utf-8")) == {"q0": "dog ß 😀", "q1": ""}
    assert protocol.read_official(tmp_path / "p.json", ["q1", "q0", "q9"]) == {
        "q1": "",
        "q0": "dog ß 😀",
        "q9": protocol.UNANSWERED,
    }


@pytest.mark.parametrize("content", ["[1]", '{"q": 1}', "{", None])
def test_files_that_are_no_official_predictions(tmp_path, content):
    path = tmp_path / "p.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match="p.json"):
        protocol.read_official(path, ["q"])


def official_evaluator(dataset: Path, predictions: dict[str, str]) -> dict[str, float]:
    """The shared task's evaluator, written anew from its definition: gold answers by qid, a qid without
    prediction scores 0.
    """
    gold: dict[str, list[str]] = {}
    with gzip.open(dataset, "rt", encoding="utf-8") as lines:
        for line in lines:
            for qa in json.loads(line).get("qas", []):
                gold[qa["qid"]] = qa["answers"]
    pairs = [
        plain_scores(predictions[qid], answers) if qid in predictions else (0.0, 0.0) for qid, answers in gold.items()
    ]
    return {
        "em": 100 * sum(em for em, _ in pairs) / len(pairs),
        "f1": 100 * sum(f1 for _, f1 in pairs) / len(pairs),
    }


@pytest.mark.skipif(not (DATA / "mrqa").is_dir(), reason="no MRQA files: set HDSCALE_TEST_DATA")
@pytest.mark.parametrize("name", ["squad", "naturalquestions", "relationextraction"])
def test_figures_equal_the_official_evaluators(name, tmp_path):
    """On adversarial predictions for real questions: right, cut, decorated, empty, missing, foreign."""
    settings = DataSettings(mrqa_root=str(DATA / "mrqa"), max_source_length=512)
    task = next(task for task in mrqa_tasks(settings) if task.name == name)
    questions = list(read_questions(task, "test", settings))
    draw = random.Random(7)
    variants = [
        lambda gold, _: gold,
        lambda gold, _: f"The {gold}!",
        lambda gold, _: gold.upper(),
        lambda gold, _: gold[: len(gold) // 2],
        lambda gold, _: "",
        lambda _, context: context[:80],
        lambda gold, _: f"{gold} {gold}",
        lambda *_: "a",
        lambda gold, _: f"“{gold}”",
    ]
    answers = {
        question.id: draw.choice(variants)(draw.choice(question.references), question.context)
        for question in questions
        if draw.random() < 0.9
    }
    path = tmp_path / "official.json"
    protocol.write_official(answers, path)
    ours = protocol.read_official(path, [question.id for question in questions])
    found = compute(task, [ours[question.id] for question in questions], questions)
    (dataset,) = split_paths(task, "test", settings)
    assert found == pytest.approx(official_evaluator(dataset, json.loads(path.read_text())))
    assert 10 < found["em"] < found["f1"] < 95
