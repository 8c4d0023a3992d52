"""Metrics against independent implementations, on random and adversarial predictions."""

from __future__ import annotations

import collections
import random
import re

import numpy as np
import pytest
from rouge_score import rouge_scorer
from scipy import stats
from sklearn import metrics as sk

from hdscale.data.task import Example, SplitRule, Task
from hdscale.data.tasks import get_task
from hdscale.errors import UserError
from hdscale.evaluation import averages as av
from hdscale.evaluation import metrics, text
from hdscale.evaluation.metrics import check_metrics, compute, compute_scores
from tests.helpers.plain_scores import plain_scores


def task(kind: str, names: tuple[str, ...], labels: tuple[str, ...] = (), name: str = "t") -> Task:
    return Task(name, kind, {"test": SplitRule(("test",))}, "{x}", "{y}", names, labels=labels)


def examples(targets: list[str], references: list[list[str]] | None = None) -> list[Example]:
    many = references or [None] * len(targets)
    return [
        Example("s", target, "t", str(row), gold) for row, (target, gold) in enumerate(zip(targets, many, strict=True))
    ]


def random_labels(seed: int, rows: int, labels: list[str], junk: list[str]) -> tuple[list[str], list[str]]:
    draw = random.Random(seed)
    gold = [draw.choice(labels) for _ in range(rows)]
    predicted = [draw.choice(labels * 4 + junk) if draw.random() < 0.4 else label for label in gold]
    return predicted, gold


JUNK = ["", "2", "entailment", "0 1", "one", "٠", "\x00", "0.0"]


@pytest.mark.parametrize("seed", range(4))
def test_label_metrics_equal_confusion_counts(seed):
    """Accuracy, F1 and Matthews from counts written anew; a prediction that is neither label is wrong in
    each.
    """
    predicted, gold = random_labels(seed, 200, ["0", "1"], JUNK)
    found = compute(task("label", ("accuracy", "f1"), ("0", "1")), predicted, examples(gold))
    right = sum(p == g for p, g in zip(predicted, gold, strict=True))
    true_positive = sum(p == g == "1" for p, g in zip(predicted, gold, strict=True))
    missed = gold.count("1") - true_positive
    false_positive = sum(g == "0" and p != "0" for p, g in zip(predicted, gold, strict=True))
    assert found["accuracy"] == pytest.approx(100 * right / 200)
    assert found["f1"] == pytest.approx(100 * 2 * true_positive / (2 * true_positive + missed + false_positive))


@pytest.mark.parametrize("seed", range(4))
def test_matthews_equals_the_published_formula(seed):
    """R_K of Gorodkin (2004), written out; on two classes alone it is the textbook's coefficient."""
    for junk in ([], JUNK):
        predicted, gold = random_labels(seed, 150, ["0", "1"], junk)
        found = compute(task("label", ("matthews",), ("0", "1")), predicted, examples(gold))["matthews"]
        classes = ["0", "1", "other"]
        decided = [p if p in ("0", "1") else "other" for p in predicted]
        confusion = np.array(
            [[sum((g, p) == (a, b) for g, p in zip(gold, decided, strict=True)) for b in classes] for a in classes]
        )
        total, trace = confusion.sum(), np.trace(confusion)
        row, column = confusion.sum(axis=1), confusion.sum(axis=0)
        covariance = trace * total - row @ column
        expected = covariance / np.sqrt((total**2 - column @ column) * (total**2 - row @ row))
        assert found == pytest.approx(100 * expected)


def test_three_labels_and_macro_f1():
    predicted, gold = random_labels(9, 300, ["0", "1", "2"], JUNK[2:])
    found = compute(task("label", ("accuracy", "macro_f1"), ("0", "1", "2")), predicted, examples(gold))
    per_label = [
        2
        * sum(p == g == label for p, g in zip(predicted, gold, strict=True))
        / (predicted.count(label) + gold.count(label))
        for label in "012"
    ]
    assert found["macro_f1"] == pytest.approx(100 * np.mean(per_label))


def test_all_predictions_unreadable_score_zero_and_are_counted():
    scores = compute_scores(task("label", ("accuracy", "f1"), ("0", "1")), ["x"] * 10, examples(["0", "1"] * 5))
    assert scores.metrics == {"accuracy": 0.0, "f1": 0.0}
    assert scores.notes["unreadable"] == 10
    assert compute(task("label", ("matthews",), ("0", "1")), ["x"] * 10, examples(["0", "1"] * 5)) == {"matthews": 0.0}


def test_white_space_around_a_label_does_not_count():
    assert compute(task("label", ("accuracy",), ("0", "1")), [" 1", "0\n"], examples(["1", "0"])) == {"accuracy": 100.0}


@pytest.mark.parametrize("seed", range(3))
def test_correlations_equal_formulas(seed):
    """Pearson by its definition, Spearman as Pearson of mean ranks, unreadable texts at -1."""
    draw = random.Random(seed)
    gold = [f"{draw.uniform(0, 5):.1f}" for _ in range(120)]
    noisy = [f"{float(number) + draw.gauss(0, 1):.2f}" for number in gold]
    odd = ["nan", "inf", "3,5", "", "1_0", "1e400", "five", "1e12"]
    predicted = [draw.choice(odd) if draw.random() < 0.2 else number for number in noisy]
    scores = compute_scores(task("number", ("pearson", "spearman")), predicted, examples(gold))
    numbers = np.array([-1.0 if one in odd else float(one) for one in predicted])
    truth = np.array([float(one) for one in gold])

    def pearson(a: np.ndarray, b: np.ndarray) -> float:
        a, b = a - a.mean(), b - b.mean()
        return float(a @ b / np.sqrt((a @ a) * (b @ b)))

    assert scores.metrics["pearson"] == pytest.approx(100 * pearson(numbers, truth))
    assert scores.metrics["spearman"] == pytest.approx(100 * pearson(stats.rankdata(numbers), stats.rankdata(truth)))
    assert scores.notes["unreadable"] == sum(one in odd for one in predicted)


def test_any_number_decodes_and_constant_predictions_score_zero():
    gold = ["0.0", "2.4", "5.0"]
    assert compute(task("number", ("pearson",)), ["-3", " 1.25 ", "1e1"], examples(gold))["pearson"] > 90
    assert compute(task("number", ("pearson", "spearman")), ["3"] * 3, examples(gold)) == {
        "pearson": 0.0,
        "spearman": 0.0,
    }


# -- SQuAD's definition, written a second time in tests/helpers/plain_scores.py
# ------------------------------------------------


ADVERSARIAL = [
    "",
    " ",
    "the",
    "The.",
    "a an the",
    "U.S.",
    "us",
    "The U.S. the",
    "café",
    "CAFÉ",
    "5,000",
    "5000",
    "it's",
    "its",
    "an-the",
    "the-a b",
    "a\u00a0b",
    "x" * 500,
    "–dash–",
    "“quoted”",
    "İstanbul",
    "ΣΑΣ",
    "a_the",
    "the_",
    "1/2",
    "½",
    "b b b",
    "b b",
    "\t\n",
    "a b c d",
    "theory",
]


def test_answers_equal_the_official_definition_on_adversarial_pairs():
    for prediction in ADVERSARIAL:
        for answer in ADVERSARIAL:
            match, overlap = plain_scores(prediction, [answer])
            assert text.exact_match(prediction, [answer]) == match, (prediction, answer)
            assert text.token_f1(prediction, [answer]) == pytest.approx(overlap), (prediction, answer)


@pytest.mark.parametrize("seed", range(3))
def test_qa_metrics_equal_the_official_definition(seed):
    draw = random.Random(seed)
    words = ["the", "a", "cat", "Cat,", "dog", "1990", "U.S.", "é", "of", "-"]
    phrase = lambda: " ".join(draw.choice(words) for _ in range(draw.randint(0, 5)))  # noqa: E731
    gold = [[phrase() for _ in range(draw.randint(1, 4))] for _ in range(150)]
    predicted = [draw.choice([draw.choice(answers), phrase(), ""]) for answers in gold]
    found = compute(task("qa", ("em", "f1")), predicted, examples(["x"] * 150, gold))
    pairs = [plain_scores(prediction, answers) for prediction, answers in zip(predicted, gold, strict=True)]
    assert found["em"] == pytest.approx(100 * np.mean([match for match, _ in pairs]))
    assert found["f1"] == pytest.approx(100 * np.mean([overlap for _, overlap in pairs]))


def test_empty_prediction_against_an_empty_answer_matches_but_has_no_f1():
    """As in the official evaluators of SQuAD v1.1 and MRQA."""
    assert compute(task("qa", ("em", "f1")), [""], examples([""], [[""]])) == {"em": 100.0, "f1": 0.0}


# -- ROUGE
# ----------------------------------------------------------------------------------------------------------


SUMMARIES = [
    "Police are searching for a man. He was last seen on Friday.",
    "",
    "The U.S. Senate voted. Mr. Smith abstained!",
    "running runs ran",
    "Nothing in common at all",
    "one two three four five six seven eight nine ten. " * 4,
]


def test_rouge_equals_the_scorer_directly():
    draw = random.Random(3)
    gold = [draw.choice([one for one in SUMMARIES if one]) for _ in range(40)]
    predicted = [draw.choice(SUMMARIES) for _ in range(40)]
    names = ("rouge1", "rouge2", "rougeL", "rougeLsum")
    scores = compute_scores(task("text", names), predicted, examples(gold))
    scorer = rouge_scorer.RougeScorer(list(names), use_stemmer=True)
    split = metrics.sentence_splitter()[1]
    for name in names:
        by_lines = name == "rougeLsum"
        values = [
            scorer.score("\n".join(split(g)), "\n".join(split(p)))[name].fmeasure
            if by_lines
            else scorer.score(g, p.strip())[name].fmeasure
            for g, p in zip(gold, predicted, strict=True)
        ]
        assert scores.metrics[name] == pytest.approx(100 * np.mean(values))
    assert scores.notes["sentence_splitter"] in ("punkt", "rules")


def test_rouge_two_equals_a_bigram_count():
    """ROUGE-2 counted by hand on text that stemming leaves alone."""
    gold, predicted = "cat sat mat cat sat hat", "cat sat hat mat cat sat"
    bigrams = lambda words: collections.Counter(zip(words.split(), words.split()[1:], strict=False))  # noqa: E731
    common = (bigrams(gold) & bigrams(predicted)).total()
    assert compute(task("text", ("rouge2",)), [predicted], examples([gold]))["rouge2"] == pytest.approx(
        100 * common / 5
    )


def test_rouge_takes_the_best_of_several_references():
    names = ("rouge1", "rougeLsum")
    found = compute(task("text", names), ["the cat"], examples(["x"], [["a dog barked", "the cat"]]))
    assert found == {"rouge1": pytest.approx(100.0), "rougeLsum": pytest.approx(100.0)}


@pytest.mark.parametrize(
    ("passage", "sentences"),
    [
        ("One. Two! Three?", ["One.", "Two!", "Three?"]),
        ("Mr. Smith met Dr. No. They spoke.", ["Mr. Smith met Dr. No.", "They spoke."]),
        ('He said "Go." Then he left.', ['He said "Go."', "Then he left."]),
        ("It rose 3.5 percent. 2019 was better.", ["It rose 3.5 percent.", "2019 was better."]),
        ("J. K. Rowling wrote it.", ["J. K. Rowling wrote it."]),
        ("first line\n second line ", ["first line", "second line"]),
        ("e.g. this one", ["e.g. this one"]),
        ("", []),
    ],
)
def test_sentences_without_punkt(passage, sentences):
    assert text.split_sentences(passage) == sentences


def test_sentence_splitting_loses_no_word():
    draw = random.Random(0)
    pieces = ["Mr.", "A.", "cat", "Dog", "5", "end.", "“Quote.”", "what?!", "U.S.", "\n", "(see.)", "é."]
    for _ in range(200):
        passage = " ".join(draw.choice(pieces) for _ in range(30))
        assert " ".join(text.split_sentences(passage)).split() == passage.split()


# -- checks and averages
# ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (task("label", ("accurcy",), ("0", "1")), "did you mean 'accuracy'"),
        (task("label", ("f1",), ("0", "1", "2")), "exactly two labels"),
        (task("text", ("accuracy",)), "no metric 'accuracy'"),
        (task("label", (), ("0", "1")), "names no metric"),
        (task("sound", ("accuracy",)), "unknown kind 'sound'"),
    ],
)
def test_metrics_that_a_task_cannot_have(bad, words):
    with pytest.raises(UserError, match=re.escape(words)):
        check_metrics(bad)


def test_no_rows_and_unequal_lengths():
    with pytest.raises(UserError, match="no rows"):
        compute(task("label", ("accuracy",), ("0", "1")), [], [])
    with pytest.raises(ValueError, match="1 predictions for 2 examples"):
        compute(task("label", ("accuracy",), ("0", "1")), ["0"], examples(["0", "1"]))


def test_every_task_of_the_package_has_metrics_of_its_kind():
    from hdscale.data.tasks import registry

    for declared in registry()[0].values():
        check_metrics(declared)


def test_table_one_average():
    """The average of Table 1 counts a task with two metrics as their mean: the paper's row gives its own
    average.
    """
    row = {
        "cola": {"matthews": 58.5},
        "sst2": {"accuracy": 96.6},
        "stsb": {"pearson": 91.8, "spearman": 91.7},
        "mrpc": {"accuracy": 89.7, "f1": 92.5},
        "qqp": {"accuracy": 91.3, "f1": 89.5},
        "mnli": {"accuracy": 89.8},
        "qnli": {"accuracy": 94.5},
        "rte": {"accuracy": 82.6},
    }
    tasks = [get_task(name) for name in row]
    assert round(av.averages(tasks, row)["average"], 1) == 86.9
    values = [value for found in row.values() for value in found.values()]
    assert len(values) == 11
    assert av.metrics_average(tasks, row) == pytest.approx(np.mean(values))


def test_table_six_averages():
    """Table 16's row of full fine-tuning gives Table 6's three numbers; ROUGE-1 and -L count nowhere."""
    row = {
        "xsum": {"rouge1": 99.0, "rouge2": 17.4, "rougeL": 99.0, "rougeLsum": 99.0},
        "cnn_dailymail": {"rouge1": 99.0, "rouge2": 19.3, "rougeL": 99.0, "rougeLsum": 99.0},
        "wiki_lingua": {"rouge1": 99.0, "rouge2": 18.4, "rougeL": 99.0, "rougeLsum": 99.0},
        "mnli": {"accuracy": 85.6},
        "art": {"accuracy": 64.3},
        "anli": {"accuracy": 44.3},
    }
    tasks = [get_task(name) for name in row]
    found = av.averages(tasks, row)
    assert round(found["summarisation"], 1) == 18.4
    assert found["nli"] == pytest.approx(64.733, abs=1e-3)  # the table prints 64.8, from unrounded scores
    assert (
        found["overall"]
        == pytest.approx((found["summarisation"] + found["nli"]) / 2)
        == pytest.approx(found["average"])
    )
    notes = {"cnn_dailymail": {"generated_tokens": 50.0}, "xsum": {"generated_tokens": 20.0}}
    counted = [17.4, 99, 19.3, 99, 99, 50, 99, 18.4, 99, 99, 85.6, 64.3, 44.3]
    assert av.metrics_average(tasks, row, notes) == pytest.approx(np.mean(counted))


def test_mrqa_averages_by_domain():
    row = {
        "squad": {"em": 80.0, "f1": 90.0},
        "newsqa": {"em": 50.0, "f1": 60.0},
        "drop": {"em": 30.0, "f1": 40.0},
    }
    found = av.averages([get_task(name) for name in row], row)
    assert found == {
        "average": pytest.approx(190 / 3),
        "in_domain_f1": 75.0,
        "in_domain_em": 65.0,
        "out_of_domain_f1": 40.0,
        "out_of_domain_em": 30.0,
    }


def test_selection():
    row = {"mrpc": {"accuracy": 80.0, "f1": 90.0}, "rte": {"accuracy": 60.0}}
    tasks = [get_task(name) for name in row]
    choose = lambda select: av.selection_score(select, tasks, row)  # noqa: E731
    assert choose("average") == choose("per_task") == 72.5
    assert choose("metrics") == pytest.approx(230 / 3)
    assert choose("accuracy") == 70.0
    assert choose("mrpc.f1") == choose("f1") == 90.0
    with pytest.raises(UserError, match="eval.select=rouge2 is not a score of these tasks.*accuracy"):
        choose("rouge2")


def test_majority_baseline():
    rte = get_task("rte")
    found = av.majority_baseline(rte, ["1", "0", "1"], examples(["0", "1", "0", "0"]))
    assert found == {"accuracy": 25.0}
    assert av.majority_predictions(["b", "a"], 2) == ["a", "a"]
    with pytest.raises(UserError, match="no training rows"):
        av.majority_predictions([], 1)


def test_metrics_write_nothing_into_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("evaluate.config.HF_METRICS_CACHE", str(tmp_path / "cache"))
    compute(task("label", ("accuracy",), ("0", "1")), ["0"], examples(["0"]))
    assert not list(tmp_path.iterdir())


def test_sklearn_agrees_on_clean_labels():
    predicted, gold = random_labels(1, 100, ["0", "1"], [])
    found = compute(task("label", ("accuracy", "f1", "matthews"), ("0", "1")), predicted, examples(gold))
    assert found["f1"] == pytest.approx(100 * sk.f1_score([int(g) for g in gold], [int(p) for p in predicted]))
    assert found["matthews"] == pytest.approx(
        100 * sk.matthews_corrcoef([int(g) for g in gold], [int(p) for p in predicted])
    )


def test_gold_texts_are_the_references_or_the_target():
    assert metrics.gold_texts(Example("s", "x", "t", "0", references=("yes", "no"))) == ["yes", "no"]
    assert metrics.gold_texts(Example("s", "x", "t", "0")) == ["x"]
