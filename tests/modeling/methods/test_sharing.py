"""Hyperformer's own training setting, and the configurations of single methods."""

from __future__ import annotations

import numpy as np
import pytest

from hdscale.config import load_config
from hdscale.data.mixture import Mixture
from hdscale.data.settings import DataSettings
from hdscale.data.tasks import expand_tasks
from hdscale.modeling.parameters import count_for
from hdscale.resolve import resolve_model
from tests.helpers.places import ROOT

METHODS = sorted((ROOT / "configs" / "methods").glob("*.yaml"))


class NumberedSet:
    """A training set of rows that say where they come from."""

    def __init__(self, task: str, size: int) -> None:
        self.task, self.size = task, size

    def __len__(self) -> int:
        return self.size


def mixture(temperature: float, seed: int = 3) -> Mixture:
    return Mixture([NumberedSet("large", 9000), NumberedSet("small", 90)], seed, temperature, single_task=True)


@pytest.mark.parametrize("temperature", [1.0, 10.0])
def test_batches_of_one_task(temperature):
    steps = [mixture(temperature).places(step, 16) for step in range(2000)]
    assert all(len({number for number, _ in places}) == 1 for places in steps)
    weights = np.array([9000.0, 90.0]) ** (1 / temperature)
    share = np.mean([places[0][0] for places in steps])
    assert share == pytest.approx(weights[1] / weights.sum(), abs=0.03)
    # rows are spread over the set, and a step is a function of seed and step alone
    rows = [row for places in steps for number, row in places if number == 0]
    assert max(rows) < 9000 and len(set(rows)) > 0.5 * min(len(rows), 9000)
    assert mixture(temperature).places(1234, 16) == steps[1234]
    assert mixture(temperature, seed=4).places(1234, 16) != steps[1234]


def test_without_the_task_prefix():
    with_prefix = {task.name: task.source for task in expand_tasks(["glue", "art"])}
    without = {task.name: task.source for task in expand_tasks(["glue", "art"], DataSettings(task_prefix=False))}
    assert without["rte"] == "sentence1: {sentence1} sentence2: {sentence2}"
    for name, source in with_prefix.items():
        assert source == f"{name} {without[name]}"


@pytest.mark.parametrize("path", METHODS, ids=[path.stem for path in METHODS])
def test_configurations_of_single_methods(path):
    config = load_config(path)
    count = count_for(resolve_model(config))
    assert count.trainable > 0
    if path.stem == "lora":
        assert abs(count.percent - 2.9) <= 0.05
    if path.stem == "hyperformer_original":
        assert (config.data.temperature, config.data.single_task_batches, config.data.task_prefix) == (
            10.0,
            True,
            False,
        )
        assert count.trainable == 5_211_056
