"""A global batch distributed to ranks and cut into micro-batches, and the thread that makes batches ready."""

from __future__ import annotations

import random
import threading
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hdscale.data.batches import Row, collate
from hdscale.data.feed import Feed
from hdscale.data.micro_batches import deal, padded_tokens


def row(source: int, target: int, name: object = "") -> Row:
    return Row([5] * source, [6] * target, 0, str(name), "task")


def some_rows(count: int, seed: int = 0) -> list[Row]:
    """Lengths spread like GLUE's: a few long rows among many short ones."""
    lengths = random.Random(seed)
    return [
        row(min(128, int(lengths.lognormvariate(3.6, 0.6)) + 3), lengths.randint(2, 4), name) for name in range(count)
    ]


@given(
    lengths=st.lists(st.tuples(st.integers(1, 60), st.integers(1, 6)), min_size=1, max_size=40),
    world_size=st.integers(1, 4),
    most_rows=st.none() | st.integers(1, 9),
    budget=st.none() | st.integers(1, 400),
    ordered=st.booleans(),
)
def test_every_row_once_and_as_many_micro_batches_on_each_rank(lengths, world_size, most_rows, budget, ordered):
    rows = [row(*size, number) for number, size in enumerate(lengths * world_size)]
    ranks = deal(rows, world_size, most_rows, ordered, budget)
    assert len(ranks) == world_size
    assert len({len(parts) for parts in ranks}) == 1
    parts = [part for parts in ranks for part in parts]
    assert sorted(int(one.id) for part in parts for one in part) == list(range(len(rows)))
    for part in parts:
        assert part
        assert most_rows is None or len(part) <= most_rows
        assert budget is None or len(part) == 1 or padded_tokens(part) <= budget


def test_ranks_have_about_as_much_work():
    """Rows of like length go to different ranks: no rank has all of the long ones."""
    work = [sum(padded_tokens(part) for part in parts) for parts in deal(some_rows(128), 4, 4)]
    assert max(work) < 1.25 * min(work)


def test_a_budget_gives_each_pass_about_as_much_work():
    rows = some_rows(128)
    real = sum(len(one.input_ids) + len(one.labels) for one in rows)
    by_budget = [padded_tokens(part) for parts in deal(rows, 2, tokens_per_micro_batch=1500) for part in parts]
    by_count = [padded_tokens(part) for parts in deal(rows, 2, 128 // len(by_budget)) for part in parts]
    assert max(by_budget) <= 1500 and max(by_budget) < 1.3 * min(by_budget)
    # rows of as many micro-batches, but equally many in each: the first takes several times as long as the last
    assert max(by_count) > 2 * min(by_count)
    unsorted = sum(padded_tokens(part) for parts in deal(rows, 2, sort_by_length=False) for part in parts)
    assert sum(by_budget) < 1.2 * real < unsorted / 1.7


def test_no_more_micro_batches_than_needed():
    rows = [row(10, 2) for _ in range(12)]
    assert [len(part) for part in deal(rows, 1, tokens_per_micro_batch=48)[0]] == [4, 4, 4]
    assert [len(part) for part in deal(rows, 1, tokens_per_micro_batch=47)[0]] == [3, 3, 3, 3]
    assert [len(part) for part in deal(rows, 1, tokens_per_micro_batch=10**9)[0]] == [12]
    # four are needed, and each of three ranks gets as many as the others
    assert [[len(part) for part in parts] for parts in deal(rows, 3, tokens_per_micro_batch=36)] == [[2, 2]] * 3


def test_target_positions_are_where_labels_count():
    batch = collate([row(3, 2), row(5, 4), row(2, 1)], pad_id=0)
    assert batch["target_positions"].tolist() == [0, 1, 4, 5, 6, 7, 8]
    assert torch.equal(batch["labels"].flatten()[batch["target_positions"]], batch["labels"][batch["labels"] != -100])


def feed(rows_of, first=0, last=5, **more) -> Feed:
    return Feed(rows_of, lambda rows: deal(rows, 2, 4)[1], 0, first, last, **more)


def test_the_feed_gives_what_would_be_made_on_the_spot():
    with feed(lambda step: some_rows(16, step), first=2) as batches:
        for step in (2, 3, 4):
            found = batches.next()
            mine = deal(some_rows(16, step), 2, 4)[1]
            assert found.rows == some_rows(16, step) and found.mine == [one for part in mine for one in part]
            assert found.padded_tokens == sum(padded_tokens(part) for part in mine)
            for here, part in zip(found.micro_batches, mine, strict=True):
                there = collate(part, 0)
                assert here.keys() == there.keys() and all(torch.equal(here[name], there[name]) for name in here)
        with pytest.raises(IndexError):
            batches.next()


def test_the_feed_works_ahead_and_says_how_long_it_was_waited_for():
    made = []

    def slowly(step: int) -> list[Row]:
        time.sleep(0.05)
        made.append((step, threading.current_thread().name))
        return some_rows(8, step)

    with feed(slowly, ahead=2) as batches:
        batches.next()
        assert batches.waited >= 0.04
        time.sleep(0.3)
        assert [step for step, _ in made] == [0, 1, 2] and all("feed" in name for _, name in made)
        waited = batches.waited
        batches.next()
        assert batches.waited - waited < 0.04


def test_what_goes_wrong_in_the_thread_is_raised_where_the_batch_is_taken():
    def rows_of(step: int) -> list[Row]:
        if step == 1:
            raise OSError("the disk is gone")
        return some_rows(8, step)

    with feed(rows_of) as batches:
        batches.next()
        with pytest.raises(OSError, match="the disk is gone"):
            batches.next()
