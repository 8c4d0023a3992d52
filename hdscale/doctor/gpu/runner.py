"""Runs the stages one after the other, each within its limit, so that a crash or a hang in one leaves the others."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hdscale.doctor.gpu.lines import FAILED, MOST_OUTPUT, NOT_FINISHED, Line, read_lines
from hdscale.doctor.gpu.processes import end, ended, own_environment, reason, start, tail
from hdscale.doctor.gpu.stages import Command, Stage, command_of, lines_file
from hdscale.errors import UserError

POLL_SECONDS = 0.1
LOOK_SECONDS = 60.0
"""How long the driver may take to say which GPUs there are."""
LOOK = """
import json, torch
names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
reason = ""
if not names:
    try:
        torch.cuda.init()
    except Exception as error:
        reason = " ".join(str(error).split())
print(json.dumps([names, reason]))
"""
ADVICE = "run it on a node with a GPU, or in a job: srun --gpus-per-node=1 hdscale doctor --gpu"

Tick = Callable[[Stage, float, float], None]
"""Called while a stage runs: stage, seconds so far, limit."""


@dataclass
class Result:
    """What came of a stage.

    Attributes:
        limit, seconds: that it could take, and took.
        ended: "done", or how it ended otherwise.
        lines: its checks. last_words: of its stderr, where not everything passed.
    """

    name: str
    title: str
    limit: float
    seconds: float = 0.0
    ended: str = "done"
    lines: list[Line] = field(default_factory=list)
    last_words: list[str] = field(default_factory=list)


def find_gpus() -> list[str]:
    """The names of the visible GPUs, asked for by a process of its own: a driver may hang, and a context takes memory.

    Raises:
        UserError: if there is none.
    """
    command = [sys.executable, "-P", "-c", LOOK]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=LOOK_SECONDS, stdin=subprocess.DEVNULL,
            env=own_environment(),
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise UserError(f"doctor --gpu: the driver has not answered for {LOOK_SECONDS:.0f} s (nvidia-smi?)") from None
    if done.returncode:
        words = done.stderr.strip().splitlines() or ["no output"]
        raise UserError(f"doctor --gpu: torch cannot use the GPUs ({words[-1]}); {ADVICE}")
    names, reason = json.loads(done.stdout.splitlines()[-1])
    if not names:
        raise UserError(f"doctor --gpu: no GPU is visible{f' ({reason})' if reason else ''}; {ADVICE}")
    return names


def within(stages: Sequence[Stage], minutes: float | None) -> list[Stage]:
    """The stages with limits that add up to a number of minutes; their own limits without one."""
    if minutes is None:
        return list(stages)
    share = 60 * minutes / sum(stage.seconds for stage in stages)
    return [dataclasses.replace(stage, seconds=max(1, int(stage.seconds * share))) for stage in stages]


def run_stage(stage: Stage, work: Path, tick: Tick, command: Command = command_of) -> Result:
    """Run a stage, and cut it off at its limit.

    Args:
        work: folder of the examination.
        tick: called several times per second.
        command: that is run (for tests).
    """
    result = Result(stage.name, stage.title, stage.seconds)
    output, errors = work / f"{stage.name}.out", work / f"{stage.name}.err"
    began = time.monotonic()
    process = start(command(stage, work), output, errors, leader=True)
    cut = False
    try:
        while process.poll() is None and not cut:
            result.seconds = time.monotonic() - began
            cut = result.seconds >= stage.seconds
            tick(stage, result.seconds, stage.seconds)
            time.sleep(POLL_SECONDS)
    finally:
        end(process, leader=True)
    result.seconds = round(time.monotonic() - began, 1)
    result.lines, begun = read_lines(lines_file(stage, work))
    if cut:
        result.ended = f"cut off after {stage.seconds} s"
        result.lines.append(Line(begun or "the rest of this stage", NOT_FINISHED, result.ended))
    elif process.returncode != 0:
        result.ended = ended(process.returncode)
        result.lines.append(Line(begun or "this stage", FAILED, f"{result.ended}: {reason(errors)}"))
    elif not result.lines:
        result.lines.append(Line("this stage", FAILED, "it ended without a line"))
    if any(line.state in (FAILED, NOT_FINISHED) for line in result.lines):
        result.last_words = tail(errors, MOST_OUTPUT)
    return result
