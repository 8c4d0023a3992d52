"""The generated tasks: the same rows every time, disjoint splits, labels that only reading gives away."""

import math
import random
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import pytest
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.naive_bayes import BernoulliNB

from hdscale.data.settings import DataSettings
from hdscale.data.sources import check_splits, load_examples, split_size
from hdscale.data.tasks import expand_tasks
from hdscale.quickstart import tasks as quickstart
from hdscale.quickstart.language import random_event

SETTINGS = DataSettings(tasks=["quickstart"])
NAMES = list(quickstart.MAKERS)


def declared():
    return {task.name: task for task in expand_tasks(["quickstart"], SETTINGS)}


def test_the_mixture_is_in_the_registry():
    assert list(declared()) == NAMES
    check_splits(declared().values(), SETTINGS)


@pytest.mark.parametrize("name", NAMES)
def test_splits_are_disjoint_and_of_the_stated_size(name):
    task = declared()[name]
    texts = {split: [e.source for e in load_examples(task, split, SETTINGS)] for split in task.splits}
    for split, sources in texts.items():
        assert (
            len(sources) == len(set(sources)) == split_size(task, split, SETTINGS) == quickstart.SIZES[split]
        )
    assert not set(texts["train"]) & set(texts["test"])
    assert not set(texts["train"]) & set(texts["validation"])
    assert not set(texts["validation"]) & set(texts["test"])


@pytest.mark.parametrize("name", NAMES)
def test_no_majority_to_live_on(name):
    task = declared()[name]
    for split in task.splits:
        counts = Counter(e.target for e in load_examples(task, split, SETTINGS))
        most = max(counts.values()) / counts.total()
        assert most <= (1 / len(task.labels) + 0.01 if task.labels else 0.25)
        assert not task.labels or set(counts) == set(task.labels)


def test_rows_are_the_same_in_another_process():
    code = "from hdscale.quickstart.tasks import *; print([rows(n, 'test')[7] for n in MAKERS])"
    environment = {"PYTHONHASHSEED": "123", "PATH": ""}
    command = [sys.executable, "-c", code]
    printed = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert printed.strip() == str([quickstart.rows(name, "test")[7] for name in NAMES])


@pytest.mark.parametrize("column", ["premise", "hypothesis"])
def test_one_sentence_does_not_give_entailment_away(column):
    """A naive Bayes over one of the two sentences stays near chance."""
    vectorizer = CountVectorizer(ngram_range=(1, 2), binary=True)
    bayes = BernoulliNB()
    train, test = quickstart.rows("quick_entailment", "train"), quickstart.rows("quick_entailment", "test")
    bayes.fit(vectorizer.fit_transform([row[column] for row in train]), [row["label"] for row in train])
    correct = bayes.score(vectorizer.transform([row[column] for row in test]), [row["label"] for row in test])
    assert correct < 0.5


def test_similarity_is_symmetric_and_spans_its_range():
    rng = random.Random(0)
    for _ in range(100):
        first, second = random_event(rng), random_event(rng)
        assert quickstart.common(first, second) == quickstart.common(second, first)
        assert math.isclose(quickstart.common(first, first), 5.0)
        assert quickstart.common(first, replace(first, colour="other")) < 5.0
    scores = {float(row["label"]) for row in quickstart.rows("quick_similarity", "train")}
    assert min(scores) == 0.0 and max(scores) == 5.0 and len(scores) > 20
