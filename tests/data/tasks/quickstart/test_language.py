"""The generated language: determined by its seed, grammatical at the joints, true to its facts."""

import random
import re
from dataclasses import replace
from itertools import islice

import pytest

from hdscale.data.tasks.quickstart import words
from hdscale.data.tasks.quickstart.language import (
    SLOTS,
    change,
    comparison,
    deny,
    documents,
    judge,
    random_event,
    tell,
    things,
)


def test_documents_are_a_function_of_the_seed():
    first, again, other = (list(islice(documents(seed), 50)) for seed in (3, 3, 4))
    assert first == again
    assert not set(first) & set(other)


def test_documents_are_sentences_with_articles_that_fit():
    for text in islice(documents(0), 2000):
        assert text[-1] in ".!?" and "  " not in text and " ." not in text
        assert not re.search(r"\b[Aa] [aeiou]|\b[Aa]n [^aeiou]|\b1 \w+s\b were", text), text


@pytest.mark.parametrize("seed", range(20))
def test_a_telling_states_every_slot(seed):
    rng = random.Random(seed)
    event = random_event(rng)
    text = tell(event, rng).lower()
    assert event.agent.lower() in text and event.colour in text and event.place in text
    assert any(phrase.lower() in text for phrase in event.time)
    assert any(name in text for names in event.noun.names for name in names)
    assert any(form in text for forms in event.verb.forms for form in forms[1:])


@pytest.mark.parametrize("slot", SLOTS)
def test_a_change_alters_one_slot(slot):
    rng = random.Random(0)
    event = random_event(rng)
    changed = change(event, slot, rng)
    assert [name for name in SLOTS if getattr(event, name) != getattr(changed, name)] == [slot]


def test_an_unsaid_slot_is_not_told():
    rng = random.Random(1)
    for _ in range(50):
        event = random_event(rng)
        text = tell(event.without("colour", "place", "time"), rng)
        assert event.colour not in text and event.place not in text.lower()


def test_a_denial_denies():
    rng = random.Random(2)
    for _ in range(50):
        assert re.search(r"\b([Nn]o|not)\b", deny(random_event(rng), rng))


def test_number_and_article_agree():
    rng = random.Random(0)
    apple = replace(random_event(rng), noun=words.NOUNS[0], colour=None)
    assert things(replace(apple, count=1), rng) == "an apple"
    assert things(replace(apple, count=1, colour="red"), rng) == "a red apple"
    assert things(replace(apple, count=3), rng) in ("three apples", "3 apples")


def test_a_judgement_and_its_opposite_share_their_words():
    """Favourable sentences hold unfavourable words and the reverse: a bag of words does not settle it."""
    rng = random.Random(0)
    mixed = 0
    for number in range(400):
        good = bool(number % 2)
        found = set(re.findall(r"\w+", judge(rng, good, "film")))
        mixed += bool(found & set(words.BAD if good else words.GOOD))
    assert mixed > 120


def test_a_comparison_counts_what_it_names():
    rng = random.Random(5)
    checked = 0
    for _ in range(200):
        text = comparison(rng)
        same, share = re.search(r"The same: (.*?)\.", text), re.search(r"They share (\w+) of", text)
        if same and share:
            named = [] if same[1] == "nothing" else same[1].split(", ")
            number = int(share[1]) if share[1].isdigit() else words.NUMBERS.index(share[1])
            assert number == len(named)
            checked += 1
    assert checked > 20
