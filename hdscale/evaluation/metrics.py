"""Metrics as `evaluate.Metric` subclasses inside the package, so that nothing is fetched from the hub at run time.

Every value is x100 (correlations too), as in the paper's tables. Predictions are generated strings: a string that is
not one of a task's labels, or not a number, is a wrong prediction and is counted in the notes that go with the metrics.
"""

from __future__ import annotations

import functools
import re
import tempfile
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import datasets
import evaluate
import numpy as np
from rouge_score.rouge_scorer import RougeScorer
from scipy import stats
from sklearn import metrics as sklearn_metrics

from hdscale.data.tasks import Example, Task
from hdscale.errors import UserError, nearest
from hdscale.evaluation.text import exact_match, parse_number, punkt_splitter, split_sentences, token_f1

UNREADABLE_NUMBER = -1.0
"""The value in a correlation of a prediction that is not a number (T5's convention: outside the scale, at its lower
end)."""
OTHER = "<neither>"
"""The class of all predictions that are not one of the task's labels."""

_STRINGS = datasets.Features({"predictions": datasets.Value("string"), "references": datasets.Value("string")})
_MANY_REFERENCES = datasets.Features(
    {"predictions": datasets.Value("string"), "references": datasets.Sequence(datasets.Value("string"))}
)


class TextMetric(evaluate.Metric):
    """A metric of generated strings against one gold string each, or against a list of them (`many_references`)."""

    description = ""
    many_references = False

    def __init__(self, **options: Any) -> None:
        # in memory, with its (empty) working folder among the temporary files: a home folder may be read-only or full
        with tempfile.TemporaryDirectory(prefix="hdscale-metric-") as folder:
            super().__init__(keep_in_memory=True, cache_dir=folder, seed=0, **options)

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=self.description,
            citation="",
            inputs_description="predictions: generated strings; references: gold strings, or lists of them",
            features=_MANY_REFERENCES if self.many_references else _STRINGS,
        )


class Accuracy(TextMetric):
    """Share of predictions that equal the gold label, x100."""

    description = "accuracy of generated labels"

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, float]:
        return {"accuracy": 100 * sklearn_metrics.accuracy_score(references, predictions)}


class BinaryF1(TextMetric):
    """F1 of the positive class, x100; a prediction that is neither label counts as the wrong label (a false positive or
    a false negative).
    """

    description = "binary F1 of generated labels"

    def _compute(
        self, predictions: list[str], references: list[str], labels: Sequence[str] = ("0", "1")
    ) -> dict[str, float]:
        negative, positive = labels
        opposite = {negative: positive, positive: negative}
        decided = [
            predicted if predicted in opposite else opposite[gold]
            for predicted, gold in zip(predictions, references, strict=True)
        ]
        value = sklearn_metrics.f1_score(references, decided, pos_label=positive, zero_division=0.0)
        return {"f1": 100 * float(value)}


class MacroF1(TextMetric):
    """Unweighted mean of the F1 of each of the task's labels, x100; other predictions are misses of the gold label."""

    description = "macro-averaged F1 of generated labels"

    def _compute(
        self, predictions: list[str], references: list[str], labels: Sequence[str] | None = None
    ) -> dict[str, float]:
        labels = list(labels) if labels else sorted(set(references))
        value = sklearn_metrics.f1_score(references, predictions, labels=labels, average="macro", zero_division=0.0)
        return {"macro_f1": 100 * float(value)}


class Matthews(TextMetric):
    """Matthews correlation, x100; predictions that are not a label form one more class, which is never right
    (multi-class coefficient).
    """

    description = "Matthews correlation of generated labels"

    def _compute(
        self, predictions: list[str], references: list[str], labels: Sequence[str] = ("0", "1")
    ) -> dict[str, float]:
        decided = [predicted if predicted in labels else OTHER for predicted in predictions]
        return {"matthews": 100 * float(sklearn_metrics.matthews_corrcoef(references, decided))}


class Correlations(TextMetric):
    """Pearson and Spearman correlation of generated numbers, x100.

    Any number counts as it is, anything else as `UNREADABLE_NUMBER`. An undefined correlation (all predictions equal)
    is 0.
    """

    description = "Pearson and Spearman correlation of generated numbers"

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, float]:
        numbers = [parse_number(text) for text in predictions]
        predicted = np.array([UNREADABLE_NUMBER if number is None else number for number in numbers])
        gold = np.array([float(text) for text in references])
        if len(gold) < 2:
            return {"pearson": 0.0, "spearman": 0.0}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # scipy warns about constant input; the value is set to 0 below
            values = {
                "pearson": stats.pearsonr(predicted, gold).statistic,
                "spearman": stats.spearmanr(predicted, gold).statistic,
            }
        return {name: 100 * float(np.nan_to_num(value)) for name, value in values.items()}


SINGLE = r"\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
"""Ideographs and kana, which are written without spaces between words."""


class UnicodeTokenizer:
    """Words of any script for ROUGE; each ideograph or kana counts as a word."""

    def tokenize(self, text: str) -> list[str]:
        """The words of a text, in lower case."""
        return re.findall(rf"[{SINGLE}]|[^\W{SINGLE}]+", text.lower())


class Rouge(TextMetric):
    """ROUGE-1, -2, -L and -Lsum F-measure with the Porter stemmer, mean over rows, x100, the best over references.

    For Lsum a text is split into sentences by NLTK's punkt if its data are on this machine, otherwise by
    `split_sentences`; `sentence_splitter()` says which.
    """

    description = "ROUGE of generated summaries"
    many_references = True

    def _compute(self, predictions: list[str], references: list[list[str]], unicode: bool = False) -> dict[str, float]:
        names = ["rouge1", "rouge2", "rougeL", "rougeLsum"]
        tokenizer = UnicodeTokenizer() if unicode else None
        whole, summary = (RougeScorer(own, use_stemmer=True, tokenizer=tokenizer) for own in (names[:3], names[3:]))
        split = sentence_splitter()[1]
        sums = dict.fromkeys(names, 0.0)
        for predicted, gold in zip(predictions, references, strict=True):
            scores = whole.score_multi(gold, predicted)
            scores |= summary.score_multi(["\n".join(split(text)) for text in gold], "\n".join(split(predicted)))
            for name in names:
                sums[name] += scores[name].fmeasure
        return {name: 100 * total / len(predictions) for name, total in sums.items()}


class ExtractiveQA(TextMetric):
    """Exact match and token F1 under SQuAD's normalisation, the best over gold answers, mean over questions, x100."""

    description = "exact match and token F1 of generated answers"
    many_references = True

    def _compute(self, predictions: list[str], references: list[list[str]]) -> dict[str, float]:
        pairs = list(zip(predictions, references, strict=True))
        matches = sum(exact_match(predicted, gold) for predicted, gold in pairs)
        overlap = sum(token_f1(predicted, gold) for predicted, gold in pairs)
        return {"em": 100 * matches / len(pairs), "f1": 100 * overlap / len(pairs)}


METRICS: dict[str, dict[str, type[TextMetric]]] = {
    "label": {"accuracy": Accuracy, "f1": BinaryF1, "macro_f1": MacroF1, "matthews": Matthews},
    "number": {"pearson": Correlations, "spearman": Correlations},
    "text": dict.fromkeys(["rouge1", "rouge2", "rougeL", "rougeLsum"], Rouge)
    | dict.fromkeys(["em", "f1"], ExtractiveQA),
    "qa": dict.fromkeys(["em", "f1"], ExtractiveQA),
}
"""The metrics that a task may name, by the task's kind."""


class Scores(NamedTuple):
    """Metrics (x100) of one task, and what a reader must know about them."""

    metrics: dict[str, float]
    notes: dict[str, Any]


@functools.cache
def sentence_splitter() -> tuple[str, Callable[[str], list[str]]]:
    """(name, function) of the sentence splitter that ROUGE-Lsum uses on this machine: `punkt` or `rules`."""
    punkt = punkt_splitter()
    return ("punkt", punkt) if punkt else ("rules", split_sentences)


def check_metrics(task: Task) -> None:
    """Raise UserError if a task names a metric that its kind does not have, or a binary one without two labels."""
    known = METRICS.get(task.kind)
    if known is None:
        raise UserError(f"task {task.name}: unknown kind '{task.kind}'{nearest(str(task.kind), METRICS)}")
    if not task.metrics:
        raise UserError(f"task {task.name}: names no metric; known for kind '{task.kind}': {', '.join(known)}")
    for name in task.metrics:
        if name not in known:
            raise UserError(f"task {task.name}: kind '{task.kind}' has no metric '{name}'{nearest(name, known)}")
        if known[name] is BinaryF1 and len(task.labels or ()) != 2:
            raise UserError(f"task {task.name}: metric f1 needs exactly two labels; use macro_f1 for more")


def compute(task: Task, predictions: Sequence[str], examples: Sequence[Example]) -> dict[str, float]:
    """The task's metrics, x100, of one generated string for each example.

    Args:
        task: its `kind`, `labels` and `metrics` are read.
        predictions: generated texts, in the order of `examples`.
        examples: with `target`, and `references` where several gold texts count.

    Raises:
        UserError: no rows, or a metric that the task's kind does not have.
        ValueError: the two sequences differ in length.
    """
    return compute_scores(task, predictions, examples).metrics


def compute_scores(task: Task, predictions: Sequence[str], examples: Sequence[Example]) -> Scores:
    """`compute`, with notes: rows, unreadable predictions (label and number tasks), the sentence splitter (ROUGE)."""
    check_metrics(task)
    if len(predictions) != len(examples):
        raise ValueError(f"{len(predictions)} predictions for {len(examples)} examples of {task.name}")
    if not len(examples):
        raise UserError(f"task {task.name}: no rows to score; is its split empty?")
    predictions = [text.strip() for text in predictions]
    notes: dict[str, Any] = {"rows": len(predictions)}
    unreadable = count_unreadable(task, predictions)
    if unreadable is not None:
        notes["unreadable"] = unreadable
    values: dict[str, float] = {}
    for metric in dict.fromkeys(METRICS[task.kind][name] for name in task.metrics):
        options: dict[str, Any] = (
            {"labels": list(task.labels)} if metric in (BinaryF1, MacroF1, Matthews) and task.labels else {}
        )
        references = [gold_texts(example) if metric.many_references else example.target.strip() for example in examples]
        if metric is Rouge:
            options = {"unicode": task.rouge_tokenizer == "unicode"}
        values |= metric().compute(predictions=predictions, references=references, **options)
        if metric is Rouge:
            notes["sentence_splitter"] = sentence_splitter()[0]
            notes["rouge_tokenizer"] = task.rouge_tokenizer
    return Scores({name: values[name] for name in task.metrics}, notes)


def gold_texts(example: Example) -> list[str]:
    """All gold texts of an example: its references, or its target where it has none."""
    return list(example.references) if example.references else [example.target]


def count_unreadable(task: Task, predictions: Sequence[str]) -> int | None:
    """How many predictions are not a label (label tasks) or not a number (number tasks); None for other kinds."""
    if task.kind == "label" and task.labels:
        return sum(text not in task.labels for text in predictions)
    if task.kind == "number":
        return sum(parse_number(text) is None for text in predictions)
    return None
