"""`train.compile`: compile the stacks, and say what that cost and when it has paid."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from hdscale.bases.compilation import compile_stacks, decompile_stacks
from hdscale.engine.deepspeed_engine import Batch, Engine
from hdscale.engine.trial import seconds_of_passes
from hdscale.errors import UserError, nearest
from hdscale.runs.settled import Settled

CHOICES = {"off": "off", "on": "on", "auto": "auto", "False": "off", "True": "on"}
"""YAML reads an unquoted on or off as true or false."""
TIMED = 3
"""Passes that are timed, before and after."""


def parse_compile(value: str, stage: int) -> str:
    """`train.compile`: "off", "on" or "auto".

    Args:
        stage: of ZeRO.

    Raises:
        UserError: if it is unknown, or cannot be under that stage.
    """
    if value not in CHOICES:
        raise UserError(f"train.compile={value}{nearest(value, ('off', 'on', 'auto'))}")
    if CHOICES[value] == "on" and stage == 3:
        raise UserError(
            "train.compile=on is for ZeRO stages 1 and 2: stage 3 gathers weights inside what would be compiled; use off"
        )
    return CHOICES[value]


def compile_for_training(engine: Engine, value: str, sample: Sequence[Batch], settled: Settled, log: Any) -> None:
    """Compile the stacks if asked to, on every rank. Collective.

    `auto` is off on a CPU, where compiling wins nothing, and under ZeRO-3; elsewhere it is on, if a compiler is there. What it
    was for a run's first session it stays.

    Args:
        value: `train.compile`. sample: this rank's micro-batches of a step, to compile for and to time.
        log: with `info` and `warning`.

    Raises:
        UserError: on every rank, if compiling was asked for and fails.
    """
    choice = parse_compile(value, engine.stage)
    if choice == "auto" and (engine.ranks.device.type == "cpu" or engine.stage == 3):
        return
    if choice == "off" or settled.values.get("compile") == "off":
        return
    middle = sample[len(sample) // 2]
    plain = timed(engine, middle)
    compile_stacks(engine.module.base)
    failure = None
    try:
        first = seconds_of_passes(engine, [sample[0], middle])
    except Exception as error:
        failure = str(error).strip().splitlines()[0]
    failures = [one for one in engine.ranks.gather_objects(failure) if one is not None]
    if failures:
        decompile_stacks(engine.module.base)
        if choice == "on":
            raise UserError(f"train.compile=on: the compiler failed ({failures[0]}); use train.compile=off")
        if settled.once("compile", lambda: "off") == "on":
            log.warning(
                f"the run began compiled, and the compiler fails here ({failures[0]}): losses will differ in their last bits"
            )
        else:
            log.warning(
                f"train.compile=auto: the compiler failed ({failures[0]}); going on without, as this run will from now on"
            )
        return
    settled.once("compile", lambda: "on")
    log.info(worth(plain, timed(engine, middle), first, len(sample)))


def timed(engine: Engine, batch: Batch) -> float:
    """Seconds of a pass, the first one not counted."""
    seconds_of_passes(engine, [batch])
    return seconds_of_passes(engine, [batch] * TIMED) / TIMED


def worth(plain: float, compiled: float, first: float, passes: int) -> str:
    """What the compiler cost and won: one line.

    Args:
        plain, compiled: seconds of a pass. first: seconds of the first two passes, the compiler's included.
        passes: of a step.
    """
    cost = max(0.0, first - 2 * compiled)
    text = f"train.compile: {cost:.1f} s to compile; a pass of forward and backward takes {compiled:.3g} s instead of {plain:.3g} s"
    if compiled >= plain:
        return f"{text}, so it does not pay (train.compile=off)"
    return f"{text}, which pays from step {math.ceil(cost / ((plain - compiled) * passes)):,} on"
