"""The whole examination: one stage after the other, the report written after each."""

from __future__ import annotations

import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from hdscale import __version__
from hdscale.doctor.gpu.report import write_report
from hdscale.doctor.gpu.runner import Result, Tick, run_stage
from hdscale.doctor.gpu.stages import Command, Stage, command_of
from hdscale.errors import UserError

Say = Callable[[Result], None]
"""Called with each stage that has ended."""


def examine(
    stages: Sequence[Stage],
    gpus: list[str],
    folder: Path,
    told: str,
    say: Say,
    tick: Tick,
    command: Command = command_of,
) -> list[Result]:
    """Run the stages, and write the report into a folder.

    Args:
        gpus: their names. told: the command line, for the report.
        say, tick: see `Say` and `Tick`.
        command: of a stage (for tests).

    Raises:
        UserError: if the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_report(folder, gpus, [], __version__, told)
    except OSError as error:
        raise UserError(f"--out {folder}: cannot be written ({error.strerror}); choose another folder") from error
    results: list[Result] = []
    with tempfile.TemporaryDirectory(prefix="hdscale-doctor-", ignore_cleanup_errors=True) as work, ends_when_told():
        for stage in stages:
            results.append(run_stage(stage, Path(work), tick, command))
            write_report(folder, gpus, results, __version__, told)
            say(results[-1])
    return results


@contextmanager
def ends_when_told() -> Iterator[None]:
    """SIGTERM ends this process as an exception does: the stage that runs is ended with it."""

    def leave(number: int, frame: FrameType | None) -> None:
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
