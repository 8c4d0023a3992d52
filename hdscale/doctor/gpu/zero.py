"""ZeRO 1, 2, 3 and offload: three steps each on all GPUs, under the self-check of the gradients."""

from __future__ import annotations

import math
from pathlib import Path

import torch

from hdscale.doctor.gpu.lines import Lines, NotPossible, Wrong
from hdscale.doctor.gpu.runs import KINDS, QUICK, TrainingRun, shareable, train
from hdscale.engine.checks import SKIPPED

MOST_RANKS = 8
STEPS = 3
CLOSE = 0.02
"""Difference of the losses of two kinds, in relation to their size: bf16 rounds differently."""


def examine(lines: Lines, work: Path) -> None:
    """The checks of the stage `zero`."""
    ranks = min(MOST_RANKS, torch.cuda.device_count())
    settings = [*QUICK, f"train.max_steps={STEPS}", f"train.global_batch_size={16 * ranks}"]

    def begin(kind: str) -> TrainingRun:
        return train(work, kind.replace(" ", "_"), ranks, *settings, zero=kind)

    together = shareable()
    runs = {kind: begin(kind) for kind in KINDS} if together else {}
    first: dict[int, float] = {}
    try:
        for kind in KINDS:
            with lines.check(f"{kind}, {ranks} ranks" if ranks > 1 else f"{kind}, 1 rank") as found:
                run = runs[kind] if together else begin(kind)
                run.finish()
                losses = {step: loss for step, (loss, _) in run.losses().items()}
                told = ", ".join(f"{loss:.4f}" for loss in losses.values())
                self_check = " ".join(run.log_lines("self-check")[:1])
                found.say(f"losses {told}; {self_check}", losses=losses)
                first = first or losses
                if not run.log_lines(f"ZeRO stage {kind.removeprefix('ZeRO-')[0]}"):
                    raise Wrong(f"the run's log does not say that it ran under {kind}")
                if not self_check:
                    raise Wrong("the run's log says nothing of the self-check")
                if self_check.startswith(SKIPPED):
                    raise NotPossible(self_check)
                if sorted(losses) != list(range(1, STEPS + 1)):
                    raise Wrong(f"{STEPS} steps were asked for, {sorted(losses)} are in the log")
                if unlike := [s for s in losses if not math.isclose(losses[s], first[s], rel_tol=CLOSE)]:
                    raise Wrong(
                        f"losses {told}: step {unlike[0]} differs from {next(iter(KINDS))}'s {first[unlike[0]]}"
                    )
    finally:
        for run in runs.values():
            run.kill()
