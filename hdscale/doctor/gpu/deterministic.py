"""Twice the same five steps, with and without `train.deterministic`: are they equal to the bit?"""

from __future__ import annotations

from pathlib import Path

from hdscale.doctor.gpu.lines import Lines, Wrong
from hdscale.doctor.gpu.runs import SMALL, TrainingRun, deterministic, equal, finish_all, shareable, train

STEPS = 5


def examine(lines: Lines, work: Path) -> None:
    """The checks of the stage `deterministic`."""
    with lines.check(f"2 x {STEPS} steps with train.deterministic") as found:
        unlike = compare(work, "deterministic", deterministic())
        if unlike:
            raise Wrong(unlike)
        found.say("losses, gradients' norms and trained weights are equal to the bit")
    with lines.check(f"2 x {STEPS} steps without it") as found:
        unlike = compare(work, "usual")
        found.say(unlike or "equal to the bit as well", equal=unlike is None)


def compare(work: Path, name: str, *settings: str) -> str | None:
    """How two runs differ; see `equal`."""

    def begin(number: int) -> TrainingRun:
        steps = (f"train.max_steps={STEPS}", "train.global_batch_size=32", "train.micro_batch_size=16")
        return train(work, f"{name}-{number}", 1, *SMALL, *steps, *settings)

    if shareable():
        runs = [begin(1), begin(2)]
        finish_all(runs)
    else:
        runs = []
        for number in (1, 2):
            runs.append(begin(number))
            finish_all(runs[-1:])
    return equal(*runs)
