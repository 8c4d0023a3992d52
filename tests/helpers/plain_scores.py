"""SQuAD's exact match and F1, written a second time by other means than the package's."""

from __future__ import annotations

import re
import string


def plain_normal(answer: str) -> list[str]:
    """The words of an answer that are compared, articles as two spaces."""
    kept = "".join(
        " " if character.isspace() else character for character in answer.lower() if character not in string.punctuation
    )
    words = re.split(r"(\W+)", kept)  # articles are whole words of \w
    return "".join("  " if word in ("a", "an", "the") else word for word in words).split()


def plain_scores(prediction: str, answers: list[str]) -> tuple[float, float]:
    """Exact match and F1 of a prediction against the best of its answers, each 0 to 1."""
    matches, overlaps = [], []
    for answer in answers:
        one, other = plain_normal(prediction), plain_normal(answer)
        matches.append(float(" ".join(one) == " ".join(other)))
        left = list(other)
        common = 0
        for word in one:
            if word in left:
                left.remove(word)
                common += 1
        overlaps.append(0.0 if not common else 2 * common / (len(one) + len(other)))
    return max(matches), max(overlaps)
