"""A seeded generator of small English-like text: events told in many ways, judgements, numbers.

An `Event` is a set of facts (who did what to which things, where and when). `tell` puts it into a sentence,
choosing the construction and the synonyms; `documents` yields the paragraphs that the tiny T5 is pre-
trained on: an event and the same event in other words, questions and answers, reports that are true or
false, reviews, sums, definitions. A hidden span of such a paragraph can be filled in only by comparing its
sentences, which is what the tasks need.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hdscale.data.tasks.quickstart import words

SLOTS = ("agent", "verb", "noun", "colour", "count", "place", "time")
SLOT_NAMES = {
    "agent": "person",
    "verb": "action",
    "noun": "thing",
    "colour": "colour",
    "count": "number",
    "place": "place",
    "time": "time",
}


@dataclass(frozen=True)
class Event:
    """Who did what to which things, where and when; None where that is left unsaid."""

    agent: str
    verb: words.Verb
    noun: words.Noun
    colour: str | None
    count: int
    place: str | None
    time: tuple[str, ...] | None

    def without(self, *slots: str) -> Event:
        """The event with these slots (colour, place, time) left unsaid."""
        unsaid: dict[str, Any] = dict.fromkeys(slots)
        return replace(self, **unsaid)

    def key(self) -> tuple:
        """What identifies the event, whatever its wording."""
        return (self.agent, self.verb, self.noun, self.colour, self.count, self.place, self.time)


CHOICES: dict[str, Sequence[Any]] = {
    "agent": words.PEOPLE,
    "verb": words.VERBS,
    "noun": words.NOUNS,
    "colour": words.COLOURS,
    "count": (1, 1, 2, 3, 4, 5, 6),
    "place": tuple(words.PLACES),
    "time": words.TIMES,
}


def random_event(rng: random.Random) -> Event:
    """An event with every slot filled."""
    return Event(**{slot: rng.choice(CHOICES[slot]) for slot in SLOTS})


def change(event: Event, slot: str, rng: random.Random) -> Event:
    """The event with another value in one slot."""
    now = getattr(event, slot)
    return replace(event, **{slot: rng.choice([value for value in CHOICES[slot] if value != now])})


def capital(text: str) -> str:
    """`text` with a capital first letter."""
    return text[:1].upper() + text[1:]


def pronoun(person: str) -> str:
    """she or he."""
    return "she" if person in words.WOMEN else "he"


def number_word(number: int, rng: random.Random) -> str:
    """A number in words, or sometimes in digits."""
    return words.NUMBERS[number] if number < len(words.NUMBERS) and rng.random() < 0.6 else str(number)


def article(phrase: str) -> str:
    """a or an before the phrase."""
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


def things(event: Event, rng: random.Random) -> str:
    """The event's things with number and colour: `three red hats`, `a pear`."""
    singular, plural = rng.choice(event.noun.names)
    colour = f"{event.colour} " if event.colour else ""
    if event.count == 1:
        return article(colour + singular)
    return f"{number_word(event.count, rng)} {colour}{plural}"


def _circumstances(event: Event, rng: random.Random) -> list[str]:
    """Place and time, in either order, without what is unsaid."""
    parts = [event.place, rng.choice(event.time) if event.time else None]
    if rng.random() < 0.3:
        parts.reverse()
    return [part for part in parts if part]


def _join(*parts: str) -> str:
    return " ".join(part for part in parts if part)


def clause(event: Event, rng: random.Random, agent: str | None = None) -> str:
    """The event as a clause without a full stop, in one of five constructions, with synonyms at random."""
    _, past, participle = rng.choice(event.verb.forms)
    who, what, where = agent or event.agent, things(event, rng), _circumstances(event, rng)
    form = rng.random()
    if form < 0.4:
        return _join(who, past, what, *where)
    if form < 0.6 and where:
        return _join(where[0] + ",", who, past, what, *where[1:])
    if form < 0.85 and agent is None:
        return _join(what, "was" if event.count == 1 else "were", participle, "by", who, *where)
    if agent is None:
        return _join("it was", who, "who", past, what, *where)
    return _join(who, past, what, *where)


def tell(event: Event, rng: random.Random, agent: str | None = None) -> str:
    """The event as a sentence; `agent` may be a pronoun that stands for the person."""
    return capital(clause(event, rng, agent)) + "."


def deny(event: Event, rng: random.Random) -> str:
    """A sentence that says that the event did not take place (its number is left out)."""
    base, past, participle = rng.choice(event.verb.forms)
    _, plural = rng.choice(event.noun.names)
    plural = _join(event.colour or "", plural)
    where = _circumstances(event, rng)
    form = rng.randrange(3)
    if form == 0:
        text = _join(event.agent, "did not", base, "any", plural, *where)
    elif form == 1:
        text = _join(event.agent, past, "no", plural, *where)
    else:
        text = _join("no", plural, "were", participle, "by", event.agent, *where)
    return capital(text) + "."


def judge(rng: random.Random, good: bool, topic: str) -> str:
    """A judgement of the topic, with denials and concessions that no single word gives away."""
    mine, other = (words.GOOD, words.BAD) if good else (words.BAD, words.GOOD)
    like, dislike = (words.LIKE, words.DISLIKE) if good else (words.DISLIKE, words.LIKE)
    part = rng.choice(words.TOPICS[topic])
    degree = rng.choice((*words.DEGREES, "", "", ""))
    plain = _join("was", degree, rng.choice(mine))
    denied = f"was {rng.choice(words.DENIALS)} {rng.choice(other)}"
    claim = plain if rng.random() < 0.6 else denied
    against = (
        f"was {rng.choice(other)}" if rng.random() < 0.7 else f"was {rng.choice(words.DENIALS)} {rng.choice(mine)}"
    )
    form = rng.randrange(7)
    if form <= 1:
        return f"The {topic} {claim}."
    if form == 2:
        return f"The {part} of the {topic} {claim}."
    if form == 3:
        return f"{rng.choice(words.PEOPLE)} {rng.choice(like)[1]} the {topic} and its {part}."
    if form == 4:
        return f"{rng.choice(words.PEOPLE)} did not {rng.choice(dislike)[0]} the {part} of the {topic}."
    if form == 5:
        return f"The {part} {against}, but the {topic} as a whole {claim}."
    return f"{rng.choice(('Although', 'Even though'))} the {part} {against}, the {topic} {claim}."


def retelling(rng: random.Random) -> str:
    """Two events, and one of them in other words."""
    first = random_event(rng)
    second = replace(random_event(rng), agent=first.agent)
    if rng.random() < 0.5:
        first = first.without(rng.choice(("colour", "place", "time")))
    again = rng.choice(("In other words,", "That is,", "Put another way,", "To say it again,"))
    text = [tell(first, rng), f"{again} {clause(first, rng)}."]
    if rng.random() < 0.5:
        text.append("Later " + clause(second, rng, pronoun(first.agent)) + ".")
    return " ".join(text)


def questions(rng: random.Random) -> str:
    """An event and questions about it with their answers."""
    event = random_event(rng)
    unsaid = [slot for slot in ("colour", "place", "time") if rng.random() < 0.3]
    known = event.without(*unsaid)
    base, past, participle = rng.choice(event.verb.forms)
    singular, plural = rng.choice(event.noun.names)
    count = number_word(event.count, rng)
    pool = [
        f"Who {past} {'it' if event.count == 1 else 'them'}? {event.agent}.",
        f"How many {plural} were {participle}? {capital(count)}.",
        f"What did {event.agent} {base}? {capital(things(known, rng))}.",
        f"Where was {event.agent}? {capital(known.place) if known.place else 'Nobody said'}.",
        f"When was that? {capital(rng.choice(known.time)) if known.time else 'Nobody said'}.",
        f"Which colour? {capital(known.colour) if known.colour else 'Nobody said'}.",
        f"Is {article(singular)} {article(event.noun.kind)}? Yes.",
    ]
    asked = rng.choice(("colour", "place", "time", "verb", "noun"))
    truth = rng.random() < 0.5
    guess = event if truth else change(event, asked, rng)
    answer = "Nobody said" if asked in unsaid else "Yes" if truth else "No"
    if asked == "place":
        pool.append(f"Was {event.agent} {guess.place}? {answer}.")
    elif asked == "time":
        pool.append(f"Was that {rng.choice(guess.time or ())}? {answer}.")
    elif asked == "colour":
        pool.append(f"Was anything {guess.colour}? {answer}.")
    elif asked == "verb":
        pool.append(f"Did {event.agent} {rng.choice(guess.verb.forms)[0]} anything? {answer}.")
    else:
        pool.append(f"Did {event.agent} see {article(rng.choice(guess.noun.names)[0])}? {answer}.")
    last = pool.pop()
    return " ".join([tell(known, rng), *rng.sample(pool, 2), last])


def report(rng: random.Random) -> str:
    """An event, what somebody said of it, and whether that was so."""
    event = random_event(rng)
    unsaid = rng.choice(((), (), ("colour",), ("place",), ("time",)))
    known = event.without(*unsaid)
    speaker = rng.choice(words.PEOPLE)
    kind = rng.choice(("true", "wrong", "unclear"))
    if kind == "unclear":
        slot = rng.choice(("colour", "place", "time"))
        known, said = event.without(slot), event
    elif kind == "wrong":
        filled = [slot for slot in SLOTS if getattr(known, slot) is not None]
        said = change(known, rng.choice(filled), rng)
    else:
        said = known.without(*[slot for slot in ("colour", "place", "time") if rng.random() < 0.25])
    if rng.random() < 0.2 and kind != "unclear":
        verdict = "wrong" if kind == "true" else "unclear"
        return f"{tell(known, rng)} {speaker} said: {deny(said, rng)} That was {verdict}."
    answer = {"true": "Yes", "wrong": "No", "unclear": "Nobody said"}[kind]
    verdict = rng.choice((f"That was {kind}.", f"Was that true? {answer}."))
    return f"{tell(known, rng)} {speaker} said that {clause(said, rng)}. {verdict}"


def comparison(rng: random.Random) -> str:
    """Two events side by side, and which of their facts are the same."""
    first = random_event(rng)
    other = random_event(rng)
    shared = [slot for slot in SLOTS if rng.random() < 0.6]
    second = replace(other, **{slot: getattr(first, slot) for slot in shared})
    same = [SLOT_NAMES[slot] for slot in SLOTS if getattr(first, slot) == getattr(second, slot)]
    differ = [SLOT_NAMES[slot] for slot in SLOTS if getattr(first, slot) != getattr(second, slot)]
    rng.shuffle(same)
    rng.shuffle(differ)
    heads = rng.choice((("sentence1:", "sentence2:"), ("first:", "second:"), ("", "")))
    verdicts = [f"The same: {', '.join(same) or 'nothing'}.", f"Different: {', '.join(differ) or 'nothing'}."]
    rng.shuffle(verdicts)
    verdicts.append(f"They share {number_word(len(same), rng)} of {number_word(len(SLOTS), rng)}.")
    return _join(heads[0], tell(first, rng), heads[1], tell(second, rng), *verdicts[: rng.randint(1, 3)])


def review(rng: random.Random) -> str:
    """Judgements of one topic that agree, and how somebody felt about it."""
    good = rng.random() < 0.5
    topic = rng.choice(tuple(words.TOPICS))
    person = rng.choice(words.PEOPLE)
    feeling = rng.choice(words.GLAD if good else words.SORRY)
    would = rng.choice(
        ("would come again", "told every friend to go", "smiled for days")
        if good
        else ("would never come again", "told every friend to stay away", "wanted the money back")
    )
    opinions = [judge(rng, good, topic) for _ in range(rng.randint(1, 3))]
    closing = f"{person} was {feeling} and {would}."
    if rng.random() < 0.3:
        closing = f"The verdict: {'good' if good else 'bad'}."
    return " ".join([*opinions, closing])


def numbers(rng: random.Random) -> str:
    """Small sums, prices with one decimal and their comparison."""
    person, noun = rng.choice(words.PEOPLE), rng.choice(words.NOUNS)
    plural = rng.choice(noun.names)[1]
    had, more = rng.randint(1, 6), rng.randint(1, 6)
    if rng.random() < 0.5:
        a, b, total = (number_word(n, rng) for n in (had, more, had + more))
        return f"{person} had {a} {plural} and got {b} more. Now {pronoun(person)} has {total} {plural}."
    low, high = sorted(rng.sample(range(0, 60), 2))
    left, right = rng.choice(noun.names)[1], rng.choice(rng.choice(words.NOUNS).names)[1]
    return (
        f"The {left} cost {low / 10} coins and the {right} cost {high / 10} coins. "
        f"{high / 10} is more than {low / 10}. The score was {rng.randrange(0, 51) / 10} out of 5."
    )


def definitions(rng: random.Random) -> str:
    """Kinds of things and words that mean the same."""
    noun, verb = rng.choice(words.NOUNS), rng.choice(words.VERBS)
    name, kind, place = rng.choice(noun.names), noun.kind, rng.choice(tuple(words.PLACES))
    other = rng.choice([n for n in words.NOUNS if n.kind != kind])
    text = [
        f"{capital(article(name[0]))} is {article(kind)}.",
        f"{capital(name[1])} are {words.KIND_PLURALS[kind]}, not {words.KIND_PLURALS[other.kind]}.",
        f"{capital(article(rng.choice(other.names)[0]))} is not {article(kind)}.",
        f"{rng.choice(words.PEOPLE)} was {place}, so {words.PLACES[place]}.",
    ]
    if len(noun.names) > 1:
        text.append(f"{capital(article(noun.names[0][0]))} and {article(noun.names[1][0])} are the same.")
    if len(verb.forms) > 1:
        text.append(f"To {verb.forms[0][0]} is to {verb.forms[1][0]}.")
    return " ".join(rng.sample(text, 3))


DOCUMENTS = (
    (retelling, 2),
    (questions, 3),
    (report, 4),
    (comparison, 4),
    (review, 4),
    (numbers, 1),
    (definitions, 1),
)
"""Kinds of paragraph and how often each is drawn."""


def documents(seed: int | str) -> Iterator[str]:
    """Endless paragraphs, a function of the seed alone."""
    rng = random.Random(f"hdscale language {seed}")
    kinds = [kind for kind, weight in DOCUMENTS for _ in range(weight)]
    while True:
        yield rng.choice(kinds)(rng)
