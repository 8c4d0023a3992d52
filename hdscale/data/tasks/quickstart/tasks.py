"""Four GLUE-like tasks in the generated language: sentiment, acceptability, topic and rating.

They are easy on purpose: a base of two million parameters, pre-trained for minutes, is to learn them in minutes.

Rows are made from a seed when they are asked for (a second for all of them); nothing is stored. A task's
rows are one stream without repetitions: the first are its test set, the next its validation set, the rest
its training set.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import ClassVar

from hdscale.data.settings import DataSettings
from hdscale.data.task import Example, SplitRule, Task, round_to_step
from hdscale.data.tasks.quickstart import words
from hdscale.data.tasks.quickstart.language import random_event, tell

Row = dict[str, str]

MIXTURES = {"quickstart": ("quick_sentiment", "quick_acceptability", "quick_topic", "quick_rating")}
SEED = 1
VERSION = 2
"""To be raised whenever the rows change: it is what tells a cache of tokenised rows that it is stale."""
SIZES = {"test": 300, "validation": 200, "train": 4000}
"""Rows of each split, in the order of the stream."""

TOPIC_GROUPS = ("trade", "search", "care")
"""Groups of actions that `quick_topic` tells apart, in the order of its labels."""
RATED_PARTS = 3
RATING_STEP = 0.2


def sentiment(rng: random.Random, index: int) -> Row:
    """A judgement in plain words, favourable (1) or not (0)."""
    label = index % 2
    adjectives, verbs = (words.GOOD, words.LIKE) if label else (words.BAD, words.DISLIKE)
    topic = rng.choice(tuple(words.TOPICS))
    part = rng.choice(words.TOPICS[topic])
    degree = rng.choice((*words.DEGREES, "", ""))
    judged = " ".join(word for word in ("was", degree, rng.choice(adjectives)) if word)
    person = rng.choice(words.PEOPLE)
    sentence = rng.choice(
        (
            f"The {part} of the {topic} {judged}.",
            f"The {topic} {judged}, and so was its {part}.",
            f"{person} {rng.choice(verbs)[1]} the {topic} and its {part}.",
            f"{person} saw the {topic}: the {part} {judged}.",
        )
    )
    return {"sentence": sentence, "label": str(label)}


def acceptability(rng: random.Random, index: int) -> Row:
    """A sentence as the language tells it (1), or with its words in another order (0)."""
    label = index % 2
    sentence = tell(random_event(rng), rng)
    if not label:
        told = sentence.rstrip(".").split()
        while " ".join(told) + "." == sentence:
            rng.shuffle(told)
        sentence = " ".join(told) + "."
    return {"sentence": sentence, "label": str(label)}


def topic(rng: random.Random, index: int) -> Row:
    """What somebody did: traded (0), searched (1) or took care (2)."""
    label = index % len(TOPIC_GROUPS)
    event = replace(random_event(rng), verb=rng.choice(words.VERB_GROUPS[TOPIC_GROUPS[label]]))
    return {"sentence": tell(event, rng), "label": str(label)}


def rating(rng: random.Random, index: int) -> Row:
    """Judgements of several parts, and the share of favourable ones on a scale from 0 to 5."""
    favourable = index % (RATED_PARTS + 1)
    subject = rng.choice(tuple(words.TOPICS))
    opinions = [True] * favourable + [False] * (RATED_PARTS - favourable)
    rng.shuffle(opinions)
    parts = rng.sample(words.TOPICS[subject], RATED_PARTS)
    said = [
        f"the {part} was {rng.choice(words.GOOD if good else words.BAD)}"
        for part, good in zip(parts, opinions, strict=True)
    ]
    label = round_to_step(5.0 * favourable / RATED_PARTS, RATING_STEP)
    return {"sentence": f"Of the {subject}, {', '.join(said[:-1])} and {said[-1]}.", "label": label}


MAKERS: dict[str, Callable[[random.Random, int], Row]] = {
    "quick_sentiment": sentiment,
    "quick_acceptability": acceptability,
    "quick_topic": topic,
    "quick_rating": rating,
}


@dataclass(frozen=True)
class QuickstartReader:
    """Makes the rows of the quick start's tasks."""

    name: ClassVar[str] = "hdscale.quickstart.tasks"
    chunked: ClassVar[bool] = False

    def identity(self, task: Task, split: str, settings: DataSettings) -> list[str]:
        """What determines the rows besides the declaration."""
        return [f"generated {VERSION} {SEED} {SIZES}"]

    def check(self, task: Task, split: str, settings: DataSettings) -> None:
        """Generated data are always there."""

    def size(self, task: Task, split: str, settings: DataSettings) -> int:
        """Rows of a split."""
        return SIZES[split]

    def examples(self, task: Task, split: str, settings: DataSettings, tokenizer: object = None) -> Iterator[Example]:
        """The split's examples in the order of the stream."""
        for number, row in enumerate(rows(task.name, split)):
            where = f"generated {split} row {number}"
            yield task.example(row, id=f"{split}-{number}", where=where)


def tasks(settings: DataSettings) -> list[Task]:
    """The declarations, in the manner of SST-2, CoLA, a three-way classification and STS-B."""
    return [
        declare("quick_sentiment", "sentiment", ("accuracy",), ("0", "1")),
        declare("quick_acceptability", "acceptability", ("matthews",), ("0", "1")),
        declare("quick_topic", "topic", ("accuracy",), ("0", "1", "2")),
        declare("quick_rating", "rating", ("pearson", "spearman")),
    ]


def declare(name: str, prefix: str, metrics: tuple[str, ...], labels: tuple[str, ...] = ()) -> Task:
    """A task whose rows this module makes; without labels, its target is a number."""
    return Task(
        name=name,
        kind="label" if labels else "number",
        splits={split: SplitRule((split,)) for split in ("train", "validation", "test")},
        source=f"{prefix} sentence: {{sentence}}",
        target="{label}",
        metrics=metrics,
        labels=labels,
        step=None if labels else RATING_STEP,
        bounds=None if labels else (0.0, 5.0),
        reader=QuickstartReader(),
        options={"seed": SEED, "version": VERSION},
    )


@lru_cache(maxsize=32)
def rows(task: str, split: str) -> tuple[Row, ...]:
    """A split's rows; no source text occurs twice in a task, whichever the split."""
    rng = random.Random(f"hdscale {task} {SEED}")
    make = MAKERS[task]
    seen: set[tuple[str, ...]] = set()
    found: list[Row] = []
    for now, size in SIZES.items():
        found = []
        while len(found) < size:
            row = make(rng, len(found))
            text = tuple(value for column, value in row.items() if column != "label")
            if text not in seen:
                seen.add(text)
                found.append(row)
        if now == split:
            break
    return tuple(found)
