"""Text rules that metrics share: SQuAD's normalisation, sentence splitting, reading a number."""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Callable, Iterable

import nltk

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLE = re.compile(r"\b(?:a|an|the)\b")
_SENTENCE_END = re.compile(r"""(?<=[.!?])(?:["'”’)\]]*)\s+(?=["'“‘(\[]*[^\W_a-z])""")
_ABBREVIATION = re.compile(
    r"(?:^|[\s(\[])(?:mr|mrs|ms|dr|prof|st|sr|jr|gen|col|lt|sgt|rep|sen|gov|rev|hon|vs|inc|ltd|co|corp|fig|etc|"
    r"e\.g|i\.e|u\.s|u\.k|u\.n|jan|feb|mar|apr|jun|jul|aug|sept?|oct|nov|dec|[a-z])\.$",
    re.IGNORECASE,
)
LARGEST_NUMBER = 1e6
"""A generated number larger than this counts as unreadable: alone it would determine a correlation."""


def normalize_answer(text: str) -> str:
    """SQuAD's normal form of an answer: lower case, no ASCII punctuation, no articles, single spaces."""
    return " ".join(_ARTICLE.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(prediction: str, answers: Iterable[str]) -> float:
    """1.0 if the prediction equals some gold answer after `normalize_answer`, else 0.0."""
    normal = normalize_answer(prediction)
    return float(any(normal == normalize_answer(answer) for answer in answers))


def token_f1(prediction: str, answers: Iterable[str]) -> float:
    """The best F1, over the gold answers, of the bags of normalised tokens; 0.0 where no token is shared.

    As in the official SQuAD v1.1 and MRQA definition, an empty prediction scores 0 even against an empty gold answer.
    """
    predicted = Counter(normalize_answer(prediction).split())
    best = 0.0
    for answer in answers:
        gold = Counter(normalize_answer(answer).split())
        shared = (predicted & gold).total()
        if shared:
            # 2PR/(P+R) with P = shared/|predicted|, R = shared/|gold|
            precision, recall = shared / predicted.total(), shared / gold.total()
            best = max(best, 2 * precision * recall / (precision + recall))
    return best


def parse_number(text: str) -> float | None:
    """The number that a generated text states, or None where it states none, an infinite or a far too large one."""
    if "_" in text:  # float() would read Python's own "1_000"
        return None
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) and abs(value) <= LARGEST_NUMBER else None


def punkt_splitter() -> Callable[[str], list[str]] | None:
    """NLTK's punkt for English as `text -> list of sentences` if its data are on this machine, otherwise None.

    Nothing is downloaded here; `python -m nltk.downloader punkt_tab` fetches the data (`NLTK_DATA` names their folder).
    """
    try:
        nltk.data.find("tokenizers/punkt_tab/english")
        nltk.sent_tokenize("One. Two.")
    except (LookupError, OSError):
        return None
    return nltk.sent_tokenize


def split_sentences(text: str) -> list[str]:
    """Sentences of an English text by rules alone, for machines without punkt's data.

    A sentence ends at `.`, `!` or `?` (with closing quotes) before white space and a capital, a digit or an opening
    quote, unless the full stop belongs to a common abbreviation or an initial. A line break always ends a sentence.
    """
    sentences: list[str] = []
    for line in text.splitlines():
        start = 0
        for match in _SENTENCE_END.finditer(line):
            if _ABBREVIATION.search(line[start : match.start()]):
                continue
            sentences.append(line[start : match.end()].strip())
            start = match.end()
        sentences.append(line[start:].strip())
    return [sentence for sentence in sentences if sentence]
