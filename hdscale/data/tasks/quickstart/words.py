"""The lexicon of the generated language: people, places, things, actions, times and judgements.

Every word belongs to a concept; words of one concept mean the same (`novel`, `book`), which is what the
paraphrases, the questions and the tasks are made of.
"""

from __future__ import annotations

from typing import NamedTuple


class Noun(NamedTuple):
    """A thing: its interchangeable names as (singular, plural), and the kind it belongs to."""

    names: tuple[tuple[str, str], ...]
    kind: str


class Verb(NamedTuple):
    """An action: its interchangeable (base, past, participle) forms, and the group of related actions."""

    forms: tuple[tuple[str, str, str], ...]
    group: str


def _noun(kind: str, *names: str) -> Noun:
    """`apple` makes `apples`; irregular plurals are written `loaf/loaves`."""
    pairs = [name.split("/") if "/" in name else [name, name + "s"] for name in names]
    return Noun(tuple((singular, plural) for singular, plural in pairs), kind)


def _verb(group: str, *forms: str) -> Verb:
    split = [form.split() for form in forms]
    return Verb(tuple((base, past, participle) for base, past, participle in split), group)


WOMEN = (
    "Mara Lena Nina Ines Greta Yuki Clara Edith Lucia Amina Petra Sofia Ruth Hana Vera Zara Ilse Noor Tessa Wanda"
).split()
MEN = (
    "Tom Omar Felix Ravi Paulo Anton Samir Boris Hugo Jonas Malik Ivan Diego Oscar Leon Emil Kofi Piet Rolf Yann"
).split()
PEOPLE = WOMEN + MEN

NOUNS = (
    _noun("fruit", "apple"),
    _noun("fruit", "pear"),
    _noun("fruit", "plum"),
    _noun("fruit", "melon"),
    _noun("tool", "hammer"),
    _noun("tool", "spade", "shovel"),
    _noun("tool", "ladder"),
    _noun("tool", "lamp", "lantern"),
    _noun("instrument", "drum"),
    _noun("instrument", "flute"),
    _noun("instrument", "violin", "fiddle"),
    _noun("instrument", "guitar"),
    _noun("garment", "hat"),
    _noun("garment", "coat", "jacket"),
    _noun("garment", "scarf/scarves", "shawl"),
    _noun("garment", "shirt"),
    _noun("vehicle", "boat"),
    _noun("vehicle", "cart", "wagon"),
    _noun("vehicle", "bicycle", "bike"),
    _noun("vehicle", "van"),
    _noun("dish", "cup", "mug"),
    _noun("dish", "plate"),
    _noun("dish", "bowl"),
    _noun("dish", "jug"),
    _noun("document", "letter"),
    _noun("document", "map", "chart"),
    _noun("document", "novel", "book"),
    _noun("document", "ticket"),
)
KINDS = {kind: [noun for noun in NOUNS if noun.kind == kind] for kind in dict.fromkeys(noun.kind for noun in NOUNS)}
KIND_PLURALS = {kind: {"dish": "dishes"}.get(kind, kind + "s") for kind in KINDS}

VERBS = (
    _verb("trade", "sell sold sold"),
    _verb("trade", "buy bought bought", "purchase purchased purchased"),
    _verb("trade", "borrow borrowed borrowed"),
    _verb("search", "find found found", "discover discovered discovered"),
    _verb("search", "lose lost lost", "misplace misplaced misplaced"),
    _verb("search", "hide hid hidden", "conceal concealed concealed"),
    _verb("care", "fix fixed fixed", "repair repaired repaired"),
    _verb("care", "clean cleaned cleaned", "wash washed washed"),
    _verb("care", "break broke broken", "damage damaged damaged"),
    _verb("art", "paint painted painted"),
    _verb("art", "draw drew drawn", "sketch sketched sketched"),
    _verb("art", "describe described described"),
    _verb("move", "carry carried carried"),
    _verb("move", "drop dropped dropped"),
    _verb("move", "lift lifted lifted", "raise raised raised"),
)
VERB_GROUPS = {
    group: [verb for verb in VERBS if verb.group == group] for group in dict.fromkeys(verb.group for verb in VERBS)
}

COLOURS = "red blue green yellow black white brown grey".split()
NUMBERS = "zero one two three four five six seven eight nine ten eleven twelve".split()

PLACES = {  # phrase: where that is
    "in the kitchen": "indoors",
    "in the library": "indoors",
    "at the school": "indoors",
    "at the station": "indoors",
    "in the museum": "indoors",
    "in the bakery": "indoors",
    "in the theatre": "indoors",
    "in the cellar": "indoors",
    "in the garden": "outdoors",
    "at the harbour": "outdoors",
    "in the forest": "outdoors",
    "on the beach": "outdoors",
    "in the park": "outdoors",
    "on the bridge": "outdoors",
    "by the river": "outdoors",
    "on the hill": "outdoors",
}

TIMES = (  # interchangeable phrases
    ("on Monday",),
    ("on Tuesday",),
    ("on Wednesday",),
    ("on Thursday",),
    ("on Friday",),
    ("on Saturday",),
    ("on Sunday",),
    ("at noon", "at midday"),
    ("at night", "after dark"),
    ("in the morning", "before noon"),
    ("in the evening", "at dusk"),
    ("in spring",),
    ("in summer",),
    ("in autumn",),
    ("in winter",),
)

TOPICS = {  # what is judged, with parts of it
    "film": ("plot", "cast", "ending", "music", "hero"),
    "play": ("plot", "cast", "ending", "stage", "hero"),
    "novel": ("plot", "style", "ending", "hero", "cover"),
    "concert": ("music", "singer", "sound", "crowd", "hall"),
    "song": ("tune", "voice", "rhythm", "text", "sound"),
    "hotel": ("bed", "view", "price", "staff", "breakfast"),
    "meal": ("soup", "bread", "sauce", "waiter", "price"),
    "journey": ("train", "view", "weather", "guide", "food"),
    "lesson": ("teacher", "pace", "room", "text", "topic"),
    "game": ("story", "sound", "pace", "ending", "price"),
}
GOOD = (
    "good great lovely superb charming brilliant delightful excellent splendid pleasant wonderful clever"
    " fresh graceful warm fine perfect touching bright marvellous"
).split()
BAD = (
    "bad awful dreadful dull boring clumsy tedious horrible poor terrible weak stale ugly lifeless cold"
    " shallow painful annoying bland miserable"
).split()
LIKE = (
    ("love", "loved"),
    ("enjoy", "enjoyed"),
    ("admire", "admired"),
    ("like", "liked"),
    ("adore", "adored"),
)
DISLIKE = (("hate", "hated"), ("dislike", "disliked"), ("regret", "regretted"), ("loathe", "loathed"))
GLAD = "happy glad pleased delighted cheerful content".split()
SORRY = "unhappy sad angry upset gloomy bitter".split()
DEGREES = ("very", "really", "quite", "truly", "so", "rather")
DENIALS = ("not", "never", "hardly", "far from", "anything but", "not at all")
