"""A run that is killed by SIGKILL and resumed, against one that is not."""

from __future__ import annotations

import time
from pathlib import Path

from hdscale.doctor.gpu.lines import Lines, Wrong
from hdscale.doctor.gpu.runs import (
    DETERMINISTIC,
    POLL_SECONDS,
    QUICK,
    TrainingRun,
    equal,
    finish_all,
    shareable,
    train,
)

STEPS, EVERY, KILLED_AFTER = 40, 5, 12
"""Steps of the run, between its checkpoints, and of the log at which it is killed."""


def examine(lines: Lines, work: Path) -> None:
    """The checks of the stage `resume`."""
    settings = [*QUICK, f"train.max_steps={STEPS}", f"train.checkpoint_every={EVERY}", "train.global_batch_size=32"]
    settings += [f"{DETERMINISTIC}=true"]
    whole = broken = None
    try:
        with lines.check("killed by SIGKILL and resumed") as found:
            broken = train(work, "broken", 1, *settings)
            # the other run's start is not waited for
            whole = train(work, "whole", 1, *settings) if shareable() else None
            at = kill_at_step(broken, KILLED_AFTER)
            broken = train(work, "broken", 1, *settings)
            broken.finish()
            found.say(f"killed after step {at}, resumed, and trained to step {max(broken.losses())}", killed=at)
            if sorted(broken.losses()) != list(range(1, STEPS + 1)):
                raise Wrong(f"steps are missing: {found.detail}; the log has {sorted(broken.losses())}")
        with lines.check("equal to the uninterrupted run") as found:
            whole = whole or train(work, "whole", 1, *settings)
            finish_all([whole])
            if broken is None:
                raise Wrong("there is no resumed run")
            if unlike := equal(whole, broken):
                raise Wrong(unlike)
            found.say("losses, gradients' norms and trained weights are equal to the bit")
    finally:
        for run in (whole, broken):
            if run is not None:
                run.kill()


def kill_at_step(run: TrainingRun, step: int) -> int:
    """Kill a run once its log has a step; the last step of the log.

    Raises:
        Wrong: if it ends before.
    """
    while max(run.losses(), default=0) < step:
        if not run.alive():
            run.finish()
            raise Wrong("the run ended before it was killed")
        time.sleep(POLL_SECONDS)
    run.kill()
    at = max(run.losses())
    if at >= STEPS:
        raise Wrong("the run ended before it was killed")
    return at
