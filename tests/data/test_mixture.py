"""The global order: proportional, complete in each epoch, a function of seed and step."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hdscale.data.batches import Row, collate
from hdscale.data.mixture import Mixture, permutation
from hdscale.errors import UserError


class Set:
    """A tokenised set whose rows say which they are."""

    def __init__(self, task, size):
        self.task, self.size = task, size

    def __len__(self):
        return self.size

    def row(self, index, task_id=0):
        return Row([index, 1], [task_id, 1], task_id, f"{self.task}-{index}", self.task)


SETS = [Set("large", 70), Set("middle", 25), Set("small", 5)]


def ids(mixture, steps, batch):
    return [row.id for step in steps for row in mixture.rows(step, batch)]


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    batch=st.integers(1, 30),
    seed=st.integers(0, 2**63),
)
def test_every_row_once_an_epoch(sizes, batch, seed):
    mixture = Mixture([Set(f"t{number}", size) for number, size in enumerate(sizes)], seed)
    total, steps = sum(sizes), -(-2 * sum(sizes) // batch)
    seen = ids(mixture, range(steps), batch)
    for epoch in range(2):
        assert len(set(seen[epoch * total : (epoch + 1) * total])) == total


def test_a_batch_is_a_function_of_seed_and_step():
    straight = Mixture(SETS, seed=3)
    order = [straight.rows(step, 8) for step in range(40)]
    jumping = Mixture(SETS, seed=3)
    for step in (39, 0, 17, 5, 18):
        assert jumping.rows(step, 8) == order[step]
    assert Mixture(SETS, seed=4).rows(0, 8) != order[0]
    assert order[0] != order[25]
    # the sequence does not depend on how it is cut into batches
    assert ids(Mixture(SETS, 3), range(10), 32) == ids(straight, range(40), 8)


def test_ranks_cut_one_sequence():
    whole = Mixture(SETS, seed=9).rows(7, 12)
    for world in (1, 2, 3, 4):
        each = 12 // world
        parts = [Mixture(SETS, seed=9).rows(7, 12)[rank * each : (rank + 1) * each] for rank in range(world)]
        assert [row for part in parts for row in part] == whole


def test_the_order_is_the_same_for_ever():
    """Numbers of today: whoever changes them breaks every interrupted run's resumption."""
    assert permutation(8, seed=42, purpose=1, number=0).tolist() == [0, 2, 6, 3, 5, 4, 7, 1]
    first = [row.id for row in Mixture(SETS, seed=42).rows(0, 4)]
    assert first == ["large-23", "middle-20", "large-64", "middle-8"]


def test_shares_are_the_sizes_and_temperature_evens_them():
    assert Mixture(SETS, 1).proportions == pytest.approx({"large": 0.7, "middle": 0.25, "small": 0.05})
    hot = Mixture(SETS, 1, temperature=2.0)
    roots = np.sqrt([70, 25, 5])
    assert list(hot.proportions.values()) == pytest.approx(list(roots / roots.sum()))
    drawn = Counter(row.task for step in range(400) for row in hot.rows(step, 50))
    for task, share in hot.proportions.items():
        assert drawn[task] / 20000 == pytest.approx(share, abs=0.015)
    assert len({row.id for step in range(400) for row in hot.rows(step, 50)}) == 100
    # draws, too, are a function of the position
    assert Mixture(SETS, 1, temperature=2.0).rows(399, 50) == hot.rows(399, 50)
    assert ids(hot, range(10), 40) == ids(hot, range(20), 20)
    assert hot.rows(0, 50) != Mixture(SETS, 2, temperature=2.0).rows(0, 50)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_a_fraction_of_each_set(temperature):
    used = {}
    for fraction in (0.1, 0.5):
        mixture = Mixture(SETS, 5, temperature, fraction)
        used[fraction] = set(ids(mixture, range(60), 20))
        counts = Counter(name.split("-")[0] for name in used[fraction])
        assert counts == {
            "large": round(70 * fraction),
            "middle": round(25 * fraction),
            "small": max(1, round(5 * fraction)),
        }
    assert used[0.1] < used[0.5]


def test_task_ids_are_those_given():
    mixture = Mixture(SETS, 1, task_ids=[7, 3, 5])
    named = {row.task: row.task_id for step in range(10) for row in mixture.rows(step, 10)}
    assert named == {"large": 7, "middle": 3, "small": 5}
    assert {row.task_id for row in Mixture(SETS, 1).rows(0, 100)} == {0, 1, 2}


def test_nothing_to_train_on():
    for arguments, message in [
        (([], 1), "training set"),
        (([Set("none", 0)], 1), "task none is empty"),
    ]:
        with pytest.raises(UserError, match=message):
            Mixture(*arguments)


def test_collate_pads_to_the_longest_or_a_multiple():
    rows = [Row([5, 6, 7, 1], [8, 1], 2, "a", "t"), Row([9, 1], [4, 4, 1], 0, "b", "t")]
    batch = collate(rows, pad_id=0)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 1], [9, 1, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch["labels"].tolist() == [[8, 1, -100], [4, 4, 1]]
    assert batch["task_ids"].tolist() == [2, 0]
    assert {str(tensor.dtype) for tensor in batch.values()} == {"torch.int64"}
    padded = collate(rows, pad_id=3, multiple=8)
    assert padded["input_ids"].shape == (2, 8) and padded["labels"].shape == (2, 8)
    assert padded["input_ids"][0].tolist() == [5, 6, 7, 1, 3, 3, 3, 3]
    assert padded["attention_mask"].sum().item() == 6
