"""Run a study on this machine, so many runs at a time; killed at any moment, it goes on at the next start."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hdscale.errors import EXIT_DONE, EXIT_PREEMPTED, UserError
from hdscale.study.spec import Run, Study
from hdscale.study.store import Store, finished_badly, max_steps_of

POLL_SECONDS = 0.25
GRACE_SECONDS = 300.0
"""Time that runs have for saving a checkpoint when the study is told to stop."""


@dataclass
class Slot:
    """A run in progress: its process, its lock, and when it has to end."""

    run: Run
    process: subprocess.Popen
    started: float
    deadline: float | None
    number: int
    overdue: bool = False


class LocalRunner:
    """Trains the runs of a study that are not done, `parallel` at a time, each in a process of its own.

    Args:
        study: expanded. store: its folder, opened. parallel: runs at a time.
        say: prints a line of news. tick: called at each look, for a live table.
        command: of one run, given its configuration file (for tests).
    """

    def __init__(
        self,
        study: Study,
        store: Store,
        parallel: int,
        say: Callable[[str], None] = print,
        tick: Callable[[], None] = lambda: None,
        command: Callable[[Path], list[str]] | None = None,
    ) -> None:
        self.study, self.store, self.parallel = study, store, parallel
        self.say, self.tick = say, tick
        self.command = command or train_command
        self.slots: list[Slot] = []
        self.stop: signal.Signals | None = None
        self.gpus = visible_gpus()

    def run(self) -> int:
        """Run until nothing is left to do.

        Returns:
            exit code: 0 all done, 1 some runs failed, 75 told to stop (run the same command again).

        Raises:
            UserError: if another process runs this study already.
        """
        lock = self.store.hold("study")
        if lock is None:
            raise UserError(f"{self.store.folder} is being run by another process; watch it with --status")
        handlers = {number: signal.signal(number, self._asked) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            return self._loop()
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
            os.close(lock)

    def _asked(self, number: int, frame: Any) -> None:
        if self.stop is not None:
            for slot in self.slots:
                slot.process.kill()
        self.stop = signal.Signals(number)

    def _loop(self) -> int:
        waiting = [run for run in self.study.runs if not self._settled(run)]
        adopted: set[str] = set()
        while waiting or self.slots:
            if self.stop is not None:
                return self._stop()
            for run in list(waiting):
                if len(self.slots) + len(adopted) >= self.parallel and run.name not in adopted:
                    continue
                if self._settled(run):
                    # done by a process that outlived the runner that started it
                    waiting.remove(run)
                    adopted.discard(run.name)
                    continue
                lock = self.store.hold(run.name)
                if lock is None:
                    if run.name not in adopted:
                        self.say(f"{run.name} is still being trained by an earlier start of the study: waiting for it")
                        adopted.add(run.name)
                    continue
                adopted.discard(run.name)
                waiting.remove(run)
                self._start(run, lock)
            for slot in [slot for slot in self.slots if slot.process.poll() is not None]:
                self.slots.remove(slot)
                if self._ended(slot):
                    waiting.append(slot.run)
            self._watch_deadlines()
            self.tick()
            time.sleep(POLL_SECONDS)
        failed = [run.name for run in self.study.runs if self._status(run).state != "done"]
        if failed:
            self.say(f"{len(failed)} of {len(self.study.runs)} runs failed: {', '.join(failed)}")
            return 1
        return EXIT_DONE

    def _status(self, run: Run) -> Any:
        return self.store.status(run.name, max_steps_of(run))

    def _settled(self, run: Run) -> bool:
        """Whether there is nothing (more) to do for a run."""
        status = self._status(run)
        return status.state == "done" or finished_badly(status, self.study.limits.retries)

    def _start(self, run: Run, lock: int) -> None:
        used = {slot.number for slot in self.slots}
        number = next(number for number in range(len(used) + 1) if number not in used)
        environment = dict(os.environ)
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // self.parallel)))
        if self.gpus and self.parallel > 1:
            environment["CUDA_VISIBLE_DEVICES"] = self.gpus[number % len(self.gpus)]
        with self.store.log(run.name).open("ab") as log:
            # a session of its own: Ctrl-C reaches the runs through the runner, which waits for their checkpoints
            process = subprocess.Popen(
                self.command(self.store.config(run.name)),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
                pass_fds=(lock,),
            )
        os.close(lock)
        self.store.note(run.name, "start", pid=process.pid)
        minutes = self.study.limits.minutes
        now = time.monotonic()
        self.slots.append(Slot(run, process, now, now + 60 * minutes if minutes else None, number))
        self.say(f"started {run.name}")

    def _ended(self, slot: Slot) -> bool:
        """Note how an attempt ended; whether the run is to be started again."""
        code, name = slot.process.returncode, slot.run.name
        results = self.store.results(name)
        note = ""
        if slot.overdue:
            code, note = 1, f"stopped after limits.minutes={self.study.limits.minutes:g}"
        elif code == EXIT_DONE and results is None:
            code, note = 1, "it ended well but left no results.json"
        elif code not in (EXIT_DONE, EXIT_PREEMPTED):
            how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
            note = f"{how}: {last_words(self.store.log(name))}"
        self.store.note(name, "end", code=code, note=note, seconds=round(time.monotonic() - slot.started, 1))
        if code == EXIT_DONE:
            self.say(f"done {name} ({self._done()} of {len(self.study.runs)}): average {results['average']:.1f}")
            return False
        status = self._status(slot.run)
        given_up = finished_badly(status, self.study.limits.retries)
        self.say(f"{'failed' if given_up else 'again'} {name}: {note or 'it was pre-empted'}")
        return not given_up

    def _done(self) -> int:
        return sum(self.store.results(run.name) is not None for run in self.study.runs)

    def _watch_deadlines(self) -> None:
        now = time.monotonic()
        for slot in self.slots:
            if slot.deadline is None or now < slot.deadline:
                continue
            if slot.overdue and now > slot.deadline + GRACE_SECONDS:
                slot.process.kill()
            elif not slot.overdue:
                slot.overdue = True
                slot.process.terminate()

    def _stop(self) -> int:
        """Have every run save a checkpoint, wait for them, and leave."""
        self.say(f"{self.stop.name}: the runs save and stop (again: kill them); run the same command to go on")
        for slot in self.slots:
            slot.process.terminate()
        end = time.monotonic() + GRACE_SECONDS
        for slot in self.slots:
            try:
                slot.process.wait(max(0.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                slot.process.kill()
                slot.process.wait()
            code = slot.process.returncode
            # being stopped is no failure of the run's, whatever state it was in
            self.store.note(
                slot.run.name, "end", code=EXIT_DONE if code == EXIT_DONE else EXIT_PREEMPTED, note="stopped"
            )
        return EXIT_PREEMPTED


def train_command(config: Path) -> list[str]:
    """`hdscale train` of this very installation."""
    return [sys.executable, "-m", "hdscale", "train", "--config", str(config)]


def visible_gpus() -> list[str]:
    """The GPUs that runs at a time are dealt out to."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [one for one in named.split(",") if one.strip()]
    try:
        done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return []
    return [str(index) for index, line in enumerate(done.stdout.splitlines()) if line.startswith("GPU")]


def last_words(log: Path) -> str:
    """What a failed run said last: the error line where there is one."""
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
