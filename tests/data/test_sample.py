"""Samples of rows: seeded, without replacement, whole questions."""

from __future__ import annotations

from collections import Counter

from hdscale.data.sample import sample_examples, sample_rows
from hdscale.data.task import Example


def test_a_sample_is_the_same_every_time_and_has_no_row_twice() -> None:
    chosen = sample_rows(100, 30)
    assert chosen == sample_rows(100, 30) == sorted(set(chosen)) and len(chosen) == 30
    assert chosen != list(range(30))
    assert sample_rows(5, None) == sample_rows(5, 5) == sample_rows(5, 9) == [0, 1, 2, 3, 4]


def test_a_smaller_sample_is_a_part_of_a_larger_one() -> None:
    assert set(sample_rows(100, 10)) < set(sample_rows(100, 30))


def test_every_round_of_anli_counts_under_the_paper_s_limit() -> None:
    """1,600 of 3,200 validation rows: 1,000 of round 1, 1,000 of round 2, 1,200 of round 3; the release's counts."""
    rounds = Counter("r1" if row < 1000 else "r2" if row < 2000 else "r3" for row in sample_rows(3200, 1600))
    assert rounds == {"r1": 500, "r2": 496, "r3": 604}


def test_a_question_is_sampled_with_all_of_its_chunks() -> None:
    chunks = [Example("s", "t", "squad", f"q{q}#{c}", group=f"q{q}") for q in range(6) for c in range(1 + q % 3)]
    chosen, questions = sample_examples(chunks, 2, chunked=True)
    groups = [chunks[number].group for number in chosen]
    assert questions == 6 and len(set(groups)) == 2
    assert Counter(groups) == {group: sum(chunk.group == group for chunk in chunks) for group in groups}
    assert sample_examples(chunks, 2, chunked=False)[1] == len(chunks)
