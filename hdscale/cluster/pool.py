"""Runs commands on this machine, a limited number at a time: GPUs, time limits, and a stop that leaves time to save."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

GRACE_SECONDS = 300.0
"""Time that a process has for saving a checkpoint when it is told to stop."""


@dataclass
class Job:
    """A command in progress.

    Attributes:
        started, deadline: of `time.monotonic()`; no deadline: it may take any time.
        place: number among those that run at the same time, which decides its GPU.
        overdue: it was told to stop because its time is up.
    """

    name: str
    process: subprocess.Popen[bytes]
    started: float
    deadline: float | None
    place: int
    overdue: bool = False

    @property
    def code(self) -> int:
        """Exit code of a job that has ended; negative: the signal that killed it."""
        return self.process.returncode

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self.started


class Pool:
    """At most `size` jobs at a time.

    Attributes:
        jobs: those in progress.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.jobs: list[Job] = []
        self._gpus = visible_gpus()

    def start(
        self, name: str, command: Sequence[str], log: Path, minutes: float | None = None, inherited: Sequence[int] = ()
    ) -> Job:
        """Start a command.

        It gets a GPU of its own where there are enough, its share of the processor's cores, and a session of its own:
        Ctrl-C reaches it through this process alone, which can wait for its checkpoint.

        Args:
            log: file to which its output is appended. minutes: after which it is stopped.
            inherited: file descriptors that it keeps open, such as that of a lock.
        """
        used = {job.place for job in self.jobs}
        place = next(place for place in range(len(used) + 1) if place not in used)
        environment = dict(os.environ)
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // self.size)))
        if self._gpus and self.size > 1:
            environment["CUDA_VISIBLE_DEVICES"] = self._gpus[place % len(self._gpus)]
        with log.open("ab") as output:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
                pass_fds=inherited,
            )
        now = time.monotonic()
        job = Job(name, process, now, now + 60 * minutes if minutes else None, place)
        self.jobs.append(job)
        return job

    def ended(self) -> list[Job]:
        """The jobs that have ended since the last call."""
        done = [job for job in self.jobs if job.process.poll() is not None]
        self.jobs = [job for job in self.jobs if job not in done]
        return done

    def stop_overdue(self) -> None:
        """Tell jobs past their deadline to stop; kill those that have not done so after `GRACE_SECONDS`."""
        now = time.monotonic()
        for job in self.jobs:
            if job.deadline is None or now < job.deadline:
                continue
            if not job.overdue:
                job.overdue = True
                job.process.terminate()
            elif now > job.deadline + GRACE_SECONDS:
                job.process.kill()

    def stop(self) -> Iterator[Job]:
        """Tell all jobs to stop, and yield each when it has ended; after `GRACE_SECONDS` they are killed."""
        for job in self.jobs:
            job.process.terminate()
        end = time.monotonic() + GRACE_SECONDS
        for job in self.jobs:
            try:
                job.process.wait(max(0.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                job.process.kill()
                job.process.wait()
            yield job
        self.jobs = []

    def kill(self) -> None:
        """Kill all jobs."""
        for job in self.jobs:
            job.process.kill()


def visible_gpus() -> list[str]:
    """The GPUs that the jobs of a pool are distributed over: those of CUDA_VISIBLE_DEVICES, or all of the machine."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [one for one in named.split(",") if one.strip()]
    try:
        done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return []
    return [str(index) for index, line in enumerate(done.stdout.splitlines()) if line.startswith("GPU")]


def how_it_ended(code: int) -> str:
    """An exit code in words."""
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def last_words(log: Path) -> str:
    """The last line of a failed job's output, or its error line where there is one."""
    try:
        with log.open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - 8192))
            lines = [line.strip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    except OSError:
        return "no output"
    for line in reversed(lines):
        if line.startswith("hdscale: error: "):
            return line.removeprefix("hdscale: error: ")
    return lines[-1] if lines else "no output"
