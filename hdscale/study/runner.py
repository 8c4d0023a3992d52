"""Runs a study on this machine, several runs at a time; killed at any moment, it continues at the next start."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import filelock

from hdscale.cluster.pool import Job, Pool, how_it_ended, last_words
from hdscale.errors import EXIT_BROKEN, EXIT_DONE, EXIT_PREEMPTED, UserError
from hdscale.files import locked
from hdscale.study.rows import average_shown
from hdscale.study.spec import Run, Study
from hdscale.study.store import RunStatus, Store, given_up, max_steps_of

POLL_SECONDS = 0.25


class LocalRunner:
    """Trains the runs of a study that are not done, `parallel` at a time, each in a separate process.

    Args:
        study: expanded. store: its folder, opened. parallel: runs at a time.
        say: prints a line about an event. tick: called at each look, for a live table.
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
        self.study, self.store = study, store
        self.say, self.tick = say, tick
        self.command = command or train_command
        self.pool = Pool(parallel)
        self._runs = {run.name: run for run in study.runs}
        self._asked: signal.Signals | None = None
        self._waiting: list[Run] = []
        # trained by a process that has outlived the runner which started it
        self._adopted: set[str] = set()

    def run(self) -> int:
        """Run until nothing is left to do.

        Returns:
            exit code: 0 all done, 1 some runs failed, 75 told to stop (run the same command again).

        Raises:
            UserError: if another process runs this study already.
        """
        try:
            with locked(self.store.lock("study"), timeout=0):
                return self._run()
        except filelock.Timeout:
            raise UserError(f"{self.store.folder} is being run by another process; watch it with --status") from None

    def _run(self) -> int:
        handlers = {number: signal.signal(number, self._on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            return self._loop()
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._asked is not None:
            self.pool.kill()
        self._asked = signal.Signals(number)

    def _loop(self) -> int:
        self._waiting = [run for run in self.study.runs if not self._over(run)]
        while self._waiting or self.pool.jobs:
            if self._asked is not None:
                return self._stop(self._asked)
            self._start_waiting()
            for job in self.pool.ended():
                if self._ended(job):
                    self._waiting.append(self._runs[job.name])
            self.pool.stop_overdue()
            self.tick()
            time.sleep(POLL_SECONDS)
        failed = [run.name for run in self.study.runs if self._status(run).state != "done"]
        if failed:
            self.say(f"{len(failed)} of {len(self.study.runs)} runs failed: {', '.join(failed)}")
            return EXIT_BROKEN
        return EXIT_DONE

    def _status(self, run: Run) -> RunStatus:
        return self.store.status(run.name, max_steps_of(run))

    def _over(self, run: Run) -> bool:
        """Whether there is nothing (more) to do for a run."""
        status = self._status(run)
        return status.state == "done" or given_up(status, self.study.limits.retries)

    def _start_waiting(self) -> None:
        """Start as many of the waiting runs as there is room for."""
        for run in list(self._waiting):
            if len(self.pool.jobs) + len(self._adopted) >= self.pool.size and run.name not in self._adopted:
                continue
            if self._over(run):
                # done by a process that outlived the runner that started it
                self._waiting.remove(run)
                self._adopted.discard(run.name)
                continue
            lock = self.store.hold(run.name)
            if lock is None:
                if run.name not in self._adopted:
                    self.say(f"{run.name} is still being trained by an earlier start of the study: waiting for it")
                    self._adopted.add(run.name)
                continue
            self._adopted.discard(run.name)
            self._waiting.remove(run)
            self._start(run, lock)

    def _start(self, run: Run, lock: int) -> None:
        command = self.command(self.store.config(run.name))
        # the run's process keeps the lock for as long as it lives, also if this runner is killed
        job = self.pool.start(run.name, command, self.store.log(run.name), self.study.limits.minutes, (lock,))
        os.close(lock)
        self.store.note(run.name, "start", pid=job.process.pid)
        self.say(f"started {run.name}")

    def _ended(self, job: Job) -> bool:
        """Note how an attempt ended; whether the run is to be started again."""
        code, note = job.code, ""
        results = self.store.results(job.name)
        if job.overdue:
            code, note = EXIT_BROKEN, f"stopped after limits.minutes={self.study.limits.minutes:g}"
        elif code == EXIT_DONE and results is None:
            code, note = EXIT_BROKEN, "it ended with exit code 0 but left no results.json"
        elif code not in (EXIT_DONE, EXIT_PREEMPTED):
            note = f"{how_it_ended(code)}: {last_words(self.store.log(job.name))}"
        self.store.note(job.name, "end", code=code, note=note, seconds=round(job.seconds, 1))
        if code == EXIT_DONE and results is not None:
            done = sum(self.store.results(run.name) is not None for run in self.study.runs)
            self.say(f"done {job.name} ({done} of {len(self.study.runs)}): {average_shown(results)}")
            return False
        over = given_up(self._status(self._runs[job.name]), self.study.limits.retries)
        self.say(f"{'failed' if over else 'again'} {job.name}: {note or 'it was pre-empted'}")
        return not over

    def _stop(self, asked: signal.Signals) -> int:
        """Have every run save a checkpoint, wait for them, and leave."""
        self.say(f"{asked.name}: the runs save and stop (a second signal kills them); run the same command to continue")
        for job in self.pool.stop():
            # a run that is stopped has not failed, whatever its exit code
            code = EXIT_DONE if job.code == EXIT_DONE else EXIT_PREEMPTED
            self.store.note(job.name, "end", code=code, note="stopped")
        return EXIT_PREEMPTED


def train_command(config: Path) -> list[str]:
    """`hdscale train` of this very installation."""
    return [sys.executable, "-m", "hdscale", "train", "--config", str(config)]
