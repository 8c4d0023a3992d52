"""The stages of `hdscale doctor --gpu`: what matters most comes first, and what later stages share is made first."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hdscale.errors import UserError, nearest

MOST_SECONDS = 590
"""What the limits of all stages may add up to: ten minutes, less the look for GPUs and the report."""


@dataclass(frozen=True)
class Stage:
    """A part of the examination, in a process of its own.

    Attributes:
        name: on the command line. title: in the report.
        seconds: after which it is cut off.
        module: file of `hdscale.doctor.gpu` whose function `examine(lines, work)` makes the checks.
    """

    name: str
    title: str
    seconds: int
    module: str = ""


STAGES = (
    Stage("machine", "Machine", 20, "machine"),
    Stage("extension", "CUDA extension: built, loaded, registered", 60, "extension"),
    Stage("operator", "Operator against float64", 35, "operator"),
    Stage("zero", "ZeRO 1, 2, 3 and offload", 65, "zero"),
    Stage("step", "Training step", 50, "step"),
    Stage("memory", "Plan against measured memory", 45, "memory"),
    Stage("deterministic", "Two runs, bit for bit", 50, "deterministic"),
    Stage("resume", "Kill and resume", 60, "resume"),
    Stage("decode", "Decoding", 35, "decode"),
    Stage("compile", "Training step, compiled and packed", 95, "compiled"),
    Stage("op", "Operator against library products", 30, "op_table"),
    Stage("sanitizer", "compute-sanitizer", 45, "sanitizer"),
)

Command = Callable[[Stage, Path], list[str]]
"""The command of a stage, which writes its lines into a folder."""


def choose(names: str | None) -> list[Stage]:
    """The stages of a list such as `machine,extension`; all of them without one.

    Raises:
        UserError: for an unknown name.
    """
    known = {stage.name: stage for stage in STAGES}
    if names is None:
        return list(STAGES)
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    for name in wanted:
        if name not in known:
            raise UserError(f"--stages {name}: unknown{nearest(name, known)}")
    if not wanted:
        raise UserError(f"--stages: names no stage; known: {', '.join(known)}")
    return [stage for stage in STAGES if stage.name in wanted]


def command_of(stage: Stage, work: Path) -> list[str]:
    """The process that makes a stage's checks."""
    return [sys.executable, "-P", "-m", "hdscale.doctor.gpu.stage", stage.name, str(work)]


def lines_file(stage: Stage, work: Path) -> Path:
    """Where a stage writes its lines."""
    return work / f"{stage.name}.jsonl"
