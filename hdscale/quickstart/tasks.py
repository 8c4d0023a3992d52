"""Four GLUE-like tasks in the generated language: sentiment, entailment, paraphrase and similarity.

Rows are made from a seed when they are asked for (a second for all of them); nothing is stored. A task's
rows are one stream without repetitions: the first are its test set, the next its validation set, the rest
its training set.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache

from hdscale.data.settings import DataSettings
from hdscale.data.tasks.task import Example, SplitRule, Task, round_to_step
from hdscale.quickstart import words
from hdscale.quickstart.language import SLOTS, Event, change, deny, judge, random_event, tell

Row = dict[str, str]

MIXTURES = {"quickstart": ("quick_sentiment", "quick_entailment", "quick_paraphrase", "quick_similarity")}
SEED = 1
VERSION = 1
"""To be raised whenever the rows change: it is what tells a cache of tokenised rows that it is stale."""
SIZES = {"test": 300, "validation": 200, "train": 4000}
"""Rows of each split, in the order of the stream."""

OPTIONAL = ("colour", "place", "time")
"""Slots that a sentence may leave unsaid."""
SIMILARITY_WEIGHTS = dict(agent=1.0, verb=1.0, noun=1.0, place=0.8, time=0.6, colour=0.4, count=0.2)
"""What each shared slot adds to a similarity: 5 in all. A related action or thing counts half."""
SIMILARITY_STEP = 0.2


def sentiment(rng: random.Random, index: int) -> Row:
    """A judgement, favourable (1) or not (0)."""
    label = index % 2
    return {"sentence": judge(rng, bool(label), rng.choice(tuple(words.TOPICS))), "label": str(label)}


def entailment(rng: random.Random, index: int) -> Row:
    """A premise with a hypothesis that follows (0), may or may not hold (1), or contradicts it (2).

    A premise states two of colour, place and time. A hypothesis states one or two: those of the premise, or
    (1) the third. A fifth of the premises and of the hypotheses under each label are denials, so that
    neither alone tells.
    """
    label = index % 3
    event = random_event(rng)
    stated = rng.sample(OPTIONAL, 2)
    (third,) = set(OPTIONAL) - set(stated)
    mentioned = rng.sample(stated, rng.randint(1, 2))
    chance = rng.random()
    deny_premise, deny_hypothesis = [
        (chance < 0.2, chance < 0.2),
        (chance < 0.2, 0.1 <= chance < 0.3),
        (chance < 0.2, 0.2 <= chance < 0.4),
    ][label]
    if label == 1:
        mentioned = [third, *mentioned[1:]]
    elif deny_premise:  # no red hats on Monday: that leaves open hats on Monday
        mentioned = stated
    premise = event.without(third)
    hypothesis = event.without(*set(OPTIONAL) - set(mentioned))
    if label == 2 and not deny_premise and not deny_hypothesis:
        hypothesis = change(hypothesis, rng.choice((*mentioned, "count", "verb")), rng)
    first = (deny if deny_premise else tell)(premise, rng)
    second = (deny if deny_hypothesis else tell)(hypothesis, rng)
    while second == first:
        second = (deny if deny_hypothesis else tell)(hypothesis, rng)
    return {"premise": first, "hypothesis": second, "label": str(label)}


def paraphrase(rng: random.Random, index: int) -> Row:
    """Two sentences that say the same (1), or differ in one or two facts (0)."""
    label = index % 2
    event = random_event(rng).without(*rng.sample(OPTIONAL, rng.randint(0, 1)))
    other = event
    if not label:
        said = [slot for slot in SLOTS if getattr(event, slot) is not None]
        for slot in rng.sample(said, rng.randint(1, 2)):
            other = change(other, slot, rng)
    first, second = tell(event, rng), tell(other, rng)
    while second == first:
        second = tell(other, rng)
    return {"sentence1": first, "sentence2": second, "label": str(label)}


def similarity(rng: random.Random, index: int) -> Row:
    """Two sentences and how much they have in common, from 0 to 5."""
    first, other = random_event(rng), random_event(rng)
    alike = rng.random()
    shared = [slot for slot in SLOTS if rng.random() < alike]
    second = replace(other, **{slot: getattr(first, slot) for slot in shared})
    if "noun" not in shared and rng.random() < 0.4:
        second = replace(second, noun=rng.choice(words.KINDS[first.noun.kind]))
    if "verb" not in shared and rng.random() < 0.4:
        second = replace(second, verb=rng.choice(words.VERB_GROUPS[first.verb.group]))
    label = round_to_step(common(first, second), SIMILARITY_STEP)
    return {"sentence1": tell(first, rng), "sentence2": tell(second, rng), "label": label}


def common(first: Event, second: Event) -> float:
    """The similarity of two events: weights of the slots in which they agree."""
    score = 0.0
    for slot, weight in SIMILARITY_WEIGHTS.items():
        ours, theirs = getattr(first, slot), getattr(second, slot)
        if ours == theirs:
            score += weight
        elif slot == "noun" and ours.kind == theirs.kind or slot == "verb" and ours.group == theirs.group:
            score += weight / 2
    return score


MAKERS: dict[str, Callable[[random.Random, int], Row]] = {
    "quick_sentiment": sentiment,
    "quick_entailment": entailment,
    "quick_paraphrase": paraphrase,
    "quick_similarity": similarity,
}


def tasks(settings: DataSettings) -> list[Task]:
    """The declarations; their text formats are those of SST-2, MNLI, MRPC and STS-B."""
    pair = "sentence1: {sentence1} sentence2: {sentence2}"
    return [
        declare("quick_sentiment", "sentiment sentence: {sentence}", ("accuracy",), ("0", "1")),
        declare(
            "quick_entailment",
            "entailment premise: {premise} hypothesis: {hypothesis}",
            ("accuracy",),
            ("0", "1", "2"),
        ),
        declare("quick_paraphrase", f"paraphrase {pair}", ("accuracy", "f1"), ("0", "1")),
        declare("quick_similarity", f"similarity {pair}", ("pearson", "spearman")),
    ]


def declare(name: str, source: str, metrics: tuple[str, ...], labels: tuple[str, ...] = ()) -> Task:
    """A task whose rows this module makes; without labels, its target is a number."""
    return Task(
        name=name,
        kind="label" if labels else "number",
        splits={split: SplitRule((split,)) for split in ("train", "validation", "test")},
        source=source,
        target="{label}",
        metrics=metrics,
        labels=labels,
        step=None if labels else SIMILARITY_STEP,
        bounds=None if labels else (0.0, 5.0),
        reader="hdscale.quickstart.tasks",
        options={"seed": SEED, "version": VERSION},
    )


@lru_cache(maxsize=32)
def rows(task: str, split: str) -> tuple[Row, ...]:
    """A split's rows; no source text occurs twice in a task, whichever the split."""
    rng = random.Random(f"hdscale {task} {SEED}")
    make, seen, found = MAKERS[task], set(), []
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


def identity(task: Task, split: str, settings: DataSettings) -> list[str]:
    """What determines the rows besides the declaration."""
    return [f"generated {VERSION} {SEED} {SIZES}"]


def check(task: Task, split: str, settings: DataSettings) -> None:
    """Generated data are always there."""


def size(task: Task, split: str, settings: DataSettings) -> int:
    """Rows of a split."""
    return SIZES[split]


def examples(task: Task, split: str, settings: DataSettings, tokenizer: object = None) -> Iterator[Example]:
    """The split's examples in the order of the stream."""
    for number, row in enumerate(rows(task.name, split)):
        where = f"generated {split} row {number}"
        yield task.example(row, id=f"{split}-{number}", where=where)
