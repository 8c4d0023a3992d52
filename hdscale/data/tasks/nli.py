"""Abductive and adversarial NLI (Section 3.1.3, Table 12); MNLI is among the GLUE tasks."""

from __future__ import annotations

from hdscale.data.settings import DataSettings
from hdscale.data.task import SplitRule, Task
from hdscale.data.tasks.glue import CARVED, NLI
from hdscale.data.tasks.sizes import TABLE_12

ROUNDS = ("r1", "r2", "r3")


def tasks(settings: DataSettings) -> list[Task]:
    """`art`, whose validation rows come from training (Table 12), and `anli`, its three rounds joined."""
    return [
        Task(
            name="art",
            kind="label",
            splits=CARVED,
            source=(
                "art observation 1: {observation_1} observation 2: {observation_2} "
                "hypothesis 1: {hypothesis_1} hypothesis 2: {hypothesis_2}"
            ),
            target="{label}",
            metrics=("accuracy",),
            labels=("1", "2"),
            repo="allenai/art",
            configs=("anli", "default", "data", ""),
            revision="a111127b9e8f020d9342a2fde5d25f51795be2ea",
            sizes=TABLE_12["art"],
        ),
        Task(
            name="anli",
            kind="label",
            splits={
                split: SplitRule(tuple(f"{origin}_{number}" for number in ROUNDS))
                for split, origin in {"train": "train", "validation": "dev", "test": "test"}.items()
            },
            source="anli premise: {premise} hypothesis: {hypothesis}",
            target="{label}",
            metrics=("accuracy",),
            labels=NLI,
            repo="facebook/anli",
            configs=("plain_text", "default", "data", ""),
            revision="8e4813d81f46d313dac7892e1c28076917cfcdf9",
            sizes=TABLE_12["anli"],
        ),
    ]
