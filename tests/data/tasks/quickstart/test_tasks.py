"""The generated tasks: the same rows every time, disjoint splits, labels that only reading gives away."""

import subprocess
import sys
from collections import Counter

import pytest
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.naive_bayes import BernoulliNB

from hdscale.data.settings import DataSettings
from hdscale.data.sources import check_splits, load_examples, split_size
from hdscale.data.tasks import expand_tasks
from hdscale.data.tasks.quickstart import tasks as quickstart
from hdscale.data.tasks.quickstart import words

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
        assert len(sources) == len(set(sources)) == split_size(task, split, SETTINGS) == quickstart.SIZES[split]
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
    code = "from hdscale.data.tasks.quickstart.tasks import *; print([rows(n, 'test')[7] for n in MAKERS])"
    environment = {"PYTHONHASHSEED": "123", "PATH": ""}
    command = [sys.executable, "-c", code]
    printed = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert printed.strip() == str([quickstart.rows(name, "test")[7] for name in NAMES])


def test_topic_is_told_by_the_action_alone():
    rows = quickstart.rows("quick_topic", "test")
    groups = {form: verb.group for verb in words.VERBS for forms in verb.forms for form in forms}
    for row in rows:
        told = {groups[word] for word in row["sentence"].rstrip(".").split() if word in groups}
        assert quickstart.TOPIC_GROUPS[int(row["label"])] in told


def test_unacceptable_sentences_have_the_words_of_acceptable_ones():
    """Nothing but the order tells: a classifier that sees words without order stays near chance."""
    vectorizer = CountVectorizer(binary=True, token_pattern=r"\S+", lowercase=True)
    train, test = (quickstart.rows("quick_acceptability", split) for split in ("train", "test"))
    plain = lambda rows: [row["sentence"].rstrip(".") for row in rows]  # noqa: E731
    bayes = BernoulliNB().fit(vectorizer.fit_transform(plain(train)), [row["label"] for row in train])
    assert bayes.score(vectorizer.transform(plain(test)), [row["label"] for row in test]) < 0.6


def test_rating_is_the_share_of_favourable_judgements():
    for row in quickstart.rows("quick_rating", "test"):
        told = row["sentence"].rstrip(".").replace(",", "").split()
        good, bad = (sum(word in lexicon for word in told) for lexicon in (words.GOOD, words.BAD))
        assert good + bad == quickstart.RATED_PARTS
        assert abs(float(row["label"]) - 5 * good / quickstart.RATED_PARTS) <= quickstart.RATING_STEP / 2 + 1e-9
