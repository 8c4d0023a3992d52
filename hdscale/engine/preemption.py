"""Being asked to stop: signals, or the loss of the launcher; agreed on by all ranks."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable
from types import FrameType, TracebackType

import psutil

from hdscale.engine.ranks import Ranks

SIGNALS = ("SIGTERM", "SIGUSR2")
PARENT_LAUNCHERS = ("deepspeed", "torchrun")
"""Launchers that are the ranks' ancestors. `srun`'s is SLURM's own daemon, and a lone process may outlive its shell."""


class Preemption:
    """Notes a request to stop; `agreed()` tells when all ranks know, at a place where all of them are.

    The handler does nothing but set a flag, so a second signal, or one in the middle of a save, disturbs nothing.
    Signals usually reach some ranks first, and the deepspeed launcher ends without passing them on: so
    a rank that has lost its launcher asks to stop too.

        with Preemption(ranks) as preemption:
            ...
            if preemption.agreed():        # at the end of each step, and between evaluation batches
                save_checkpoint(...)
                return EXIT_PREEMPTED

    Args:
        signals: names such as "SIGUSR1" (which NCCL uses for itself in some versions, so it is not on by default).
    """

    def __init__(self, ranks: Ranks, signals: Iterable[str] = SIGNALS) -> None:
        self._ranks = ranks
        self._signals = [getattr(signal, name) for name in signals]
        self._before: dict[int, object] = {}
        self._lineage = lineage() if ranks.launcher in PARENT_LAUNCHERS else {}
        self._reason: str | None = None

    def __enter__(self) -> Preemption:
        for number in self._signals:
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._reason is not None:
            # on the way out: `srun --kill-on-bad-exit` sends SIGTERM to the ranks that leave a moment later than the
            # first, and they should come to the same exit code
            return
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._reason is None:
            self._reason = signal.Signals(number).name

    @property
    def requested(self) -> bool:
        """Whether this rank was asked to stop. Others may not know yet: act on `agreed()`."""
        if self._reason is None and any(parent_of(child) != parent for child, parent in self._lineage.items()):
            self._reason = "loss of the launcher"
        return self._reason is not None

    def agreed(self) -> bool:
        """Whether any rank was asked to stop. Collective: the same answer everywhere."""
        if not self._ranks.any_true(self.requested):
            return False
        if self._reason is None:
            self._reason = "request to another rank"
        return True

    @property
    def reason(self) -> str:
        """What asked this rank to stop, for the log."""
        return self._reason or ""


def lineage() -> dict[int, int]:
    """{process: its parent} from this process up to the launcher.

    `deepspeed` is two processes: the one that the user started, and its child, which is the ranks' parent and stays
    alive when the first dies. Above the launcher nothing is watched: a shell may end and leave its jobs running.
    """
    parent = os.getppid()
    chain = {os.getpid(): parent}
    above = parent_of(parent)
    if above is not None and "deepspeed" in command_of(above):
        chain[parent] = above
    return chain


def parent_of(process: int) -> int | None:
    """A process's parent; None if the process is gone, or its parent unknown on this system."""
    if process == os.getpid():
        return os.getppid()
    try:
        return psutil.Process(process).ppid()
    except psutil.Error:
        return None


def command_of(process: int) -> str:
    """A process's command line, its words separated by spaces; empty if unknown."""
    try:
        return " ".join(psutil.Process(process).cmdline())
    except psutil.Error:
        return ""
