"""Twice the same five steps, with and without `train.deterministic`: are they equal to the bit?"""

from __future__ import annotations

from pathlib import Path

from hdscale.doctor.gpu.lines import Lines, Wrong
from hdscale.doctor.gpu.runs import DETERMINISTIC, SMALL, TrainingRun, equal, finish_all, shareable, train

STEPS = 5
USUAL = "usual"


def examine(lines: Lines, work: Path) -> None:
    """The checks of the stage `deterministic`."""
    usual = [*SMALL, f"train.max_steps={STEPS}", "train.global_batch_size=32", "train.micro_batch_size=16"]
    asked = {USUAL: usual, DETERMINISTIC: [*usual, f"{DETERMINISTIC}=true"]}
    together = shareable()

    def pair(kind: str) -> list[TrainingRun]:
        runs: list[TrainingRun] = []
        for number in (1, 2):
            runs.append(train(work, f"{kind}-{number}", 1, *asked[kind]))
            if not together:
                finish_all(runs)
        return runs

    begun = {kind: pair(kind) for kind in asked} if together else {}

    def compare(kind: str) -> tuple[str | None, list[str]]:
        """How two runs differ, and what the log of the first says of the cost."""
        runs = begun.get(kind) or pair(kind)
        finish_all(runs)
        return equal(*runs), runs[0].log_lines(f"{DETERMINISTIC}:")

    try:
        with lines.check(f"2 x {STEPS} steps with {DETERMINISTIC}") as found:
            unlike, cost = compare(DETERMINISTIC)
            if unlike:
                raise Wrong(unlike)
            found.say("; ".join(["losses, gradients' norms and trained weights are equal to the bit", *cost]))
        with lines.check(f"2 x {STEPS} steps without it") as found:
            unlike, _ = compare(USUAL)
            found.say(unlike or "equal to the bit as well", equal=unlike is None)
    finally:
        for run in [run for runs in begun.values() for run in runs]:
            run.kill()
