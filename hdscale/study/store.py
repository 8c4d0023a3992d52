"""What a study leaves on disk, and the state of its runs read from it.

    <folder>/_study/study.json          the expanded study: every run's resolved configuration
    <folder>/_study/study.yaml          a copy of its file
    <folder>/_study/configs/<run>.yaml  what `hdscale train` is given
    <folder>/_study/logs/<run>.log      a local run's output
    <folder>/_study/attempts/<run>.jsonl   one line at the start and one at the end of each attempt
    <folder>/_study/locks/<run>         held by the process that trains the run, for as long as it lives
    <folder>/<run>/                     the run's own folder

The state of a run is never stored but follows from these files: a kill leaves nothing to repair.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from hdscale.cluster.records import newest_step
from hdscale.config import to_dict
from hdscale.errors import EXIT_DONE, EXIT_PREEMPTED, EXIT_USER_ERROR, UserError
from hdscale.files import json_line, write_json, write_text
from hdscale.runs.folder import METRICS, RESULTS
from hdscale.study.spec import Run, Study, differences, flat_config

FORMAT = 1
SHOWN = 8
"""Differences named in an error."""


@dataclass(frozen=True)
class RunStatus:
    """How far a run is.

    Attributes:
        state: waiting, running, queued, interrupted (continues at the next start), failed, or done.
        step: of the last line of its log. max_steps: as planned (0: by epochs).
        failures: attempts that failed. seconds: of training so far.
        note: why it failed.
        results: of a run that is done.
    """

    state: str
    step: int
    max_steps: int
    failures: int = 0
    loss: float | None = None
    seconds: float | None = None
    note: str = ""
    results: dict[str, Any] | None = None


class Store:
    """The folder of a study."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.own = self.folder / "_study"
        self.record = self.own / "study.json"

    def config(self, run: str) -> Path:
        """The configuration that a run is started with."""
        return self.own / "configs" / f"{run}.yaml"

    def log(self, run: str) -> Path:
        """The output of a run that was started here."""
        return self.own / "logs" / f"{run}.log"

    def attempts(self, run: str) -> Path:
        """The record of a run's attempts."""
        return self.own / "attempts" / f"{run}.jsonl"

    def lock(self, name: str) -> Path:
        """The lock file of a run, or (`study`) of the process that runs the study."""
        return self.own / "locks" / name

    def run_folder(self, run: str) -> Path:
        """The run's own folder."""
        return self.folder / run

    def open(self, study: Study, extend: bool = False) -> None:
        """Write the study down, or check that it is the one in this folder.

        Args:
            extend: more runs may have been added.

        Raises:
            UserError: if the folder has a study with other runs (the differences are shown), or cannot be written.
        """
        if self.record.exists():
            self._check_same(study, self.read(), extend)
        try:
            for name in ("configs", "logs", "attempts", "locks"):
                (self.own / name).mkdir(parents=True, exist_ok=True)
            for run in study.runs:
                text = yaml.safe_dump(to_dict(run.config), sort_keys=False, allow_unicode=True)
                path = self.config(run.name)
                if not path.exists() or path.read_text() != text:
                    write_text(path, text)
            shutil.copyfile(study.file, self.own / "study.yaml")
            write_json(self.record, description(study))
        except OSError as error:
            raise UserError(
                f"cannot write to {self.own} ({error.strerror}); set dir in {study.file}, or correct its permissions"
            ) from error

    def read(self) -> dict[str, Any]:
        """`study.json`.

        Raises:
            UserError: if there is none, or it cannot be read.
        """
        try:
            tree = json.loads(self.record.read_text())
            if tree["format"] != FORMAT:
                raise UserError(f"{self.record} has format {tree['format']}, this hdscale reads {FORMAT}")
            return tree
        except FileNotFoundError:
            raise UserError(
                f"{self.folder} is not the folder of a study ({self.record} is missing); "
                "start one with hdscale study FILE"
            ) from None
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{self.record} is damaged ({error}); remove it and start the study again: no run is lost"
            ) from error

    def _check_same(self, study: Study, before: dict[str, Any], extend: bool) -> None:
        old, new = before["runs"], description(study)["runs"]
        told = [f"run {name} is gone" for name in old if name not in new]
        for name in old:
            if name in new:
                told += [f"{name}: {line}" for line in differences(old[name]["config"], new[name]["config"])]
        added = [name for name in new if name not in old]
        if added and not extend:
            told += [f"run {name} is new" for name in added]
        if not told:
            return
        only_added = len(told) == len(added) and not extend
        finished = sum(self.status(name, 0).state == "done" for name in old)
        remedy = (
            "--extend adds the new runs" if only_added else "give the changed study another name, or undo the change"
        )
        more = f" and {len(told) - SHOWN} more" if len(told) > SHOWN else ""
        raise UserError(
            f"{study.file} differs from the study in {self.folder} ({finished} of {len(old)} runs are done): "
            f"{'; '.join(told[:SHOWN])}{more}; {remedy}"
        )

    # ---- runs

    def status(self, run: str, max_steps: int) -> RunStatus:
        """The state of a run, from what is on disk."""
        results = self.results(run)
        last = last_line(self.run_folder(run) / METRICS, "train")
        step = max(int(last.get("step", 0)), newest_step(self.run_folder(run)), 0)
        loss, seconds = last.get("loss"), last.get("seconds")
        failures, note, ended = self.history(run)
        if results is not None:
            return RunStatus(
                "done", results.get("steps", step), max_steps, failures, loss, results.get("seconds"), "", results
            )
        if self.alive(run):
            return RunStatus("running", step, max_steps, failures, loss, seconds)
        if note:
            return RunStatus("failed", step, max_steps, failures, loss, seconds, note)
        return RunStatus("interrupted" if ended or step else "waiting", step, max_steps, failures, loss, seconds)

    def results(self, run: str) -> dict[str, Any] | None:
        """`results.json` of a run that is done."""
        try:
            tree = json.loads((self.run_folder(run) / RESULTS).read_text())
            return tree if isinstance(tree, dict) else None
        except (OSError, ValueError):
            return None

    def history(self, run: str) -> tuple[int, str, bool]:
        """(failures, why the last attempt failed or "", whether there was any attempt).

        An attempt without an end was killed with its runner: an interruption, not a failure.
        """
        failures, note, any_start = 0, "", False
        for line in self.lines(run):
            if line.get("event") == "start":
                any_start, note = True, ""
            elif line.get("event") == "end" and line.get("code") not in (EXIT_DONE, EXIT_PREEMPTED):
                failures += 1
                note = str(line.get("note") or f"exit code {line.get('code')}")
            elif line.get("event") == "retry":
                failures, note = 0, ""
        return failures, note, any_start

    def lines(self, run: str) -> list[dict[str, Any]]:
        """The record of a run's attempts."""
        return read_lines(self.attempts(run))

    def note(self, run: str, event: str, **details: Any) -> None:
        """Add a line to the record of a run's attempts."""
        path = self.attempts(run)
        path.parent.mkdir(parents=True, exist_ok=True)
        line = {"event": event, "time": time.strftime("%Y-%m-%d %H:%M:%S"), **details}
        # a line that a kill cut off must not swallow the next one
        cut_off = path.exists() and path.stat().st_size and not path.read_bytes().endswith(b"\n")
        with path.open("a") as file:
            file.write(("\n" if cut_off else "") + json_line(line))

    def retry(self, study: Study) -> None:
        """Give the runs that have failed their attempts anew."""
        for run in study.runs:
            if self.history(run.name)[0]:
                self.note(run.name, "retry")

    def hold(self, run: str) -> int | None:
        """Lock a run: a file descriptor, or None where another process has the lock.

        Unlike a lock of `hdscale.files.locked`, it can be handed on: a child that inherits the descriptor keeps the
        lock for as long as it lives, also when this process is killed.
        """
        path = self.lock(run)
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        for pause in (0.05, 0.1, None):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return descriptor
            except BlockingIOError:
                # `alive` in another process holds it for an instant
                if pause is not None:
                    time.sleep(pause)
        os.close(descriptor)
        return None

    def alive(self, run: str) -> bool:
        """Whether a process trains the run on this machine."""
        path = self.lock(run)
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except OSError:
            return False
        try:
            # shared: two processes that look at the same time do not take each other for the run
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return False
        except BlockingIOError:
            return True
        finally:
            os.close(descriptor)


def description(study: Study) -> dict[str, Any]:
    """`study.json` of a study."""
    return {
        "format": FORMAT,
        "name": study.name,
        "title": study.title,
        "file": str(study.file.resolve()),
        "axes": study.axes,
        "retries": study.limits.retries,
        "runs": {run.name: {"point": run.point, "config": flat_config(run.config)} for run in study.runs},
    }


def given_up(status: RunStatus, retries: int) -> bool:
    """Whether a run is not started again: a mistake of the user's made it fail, or it failed too often."""
    return status.state == "failed" and (status.failures > retries or f"exit code {EXIT_USER_ERROR}" in status.note)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a JSON-lines file that can be read: a kill may have cut one off."""
    lines = []
    try:
        text = path.read_text(errors="replace")
    except OSError:
        return []
    for line in text.splitlines():
        try:
            tree = json.loads(line)
        except ValueError:
            continue
        if isinstance(tree, dict):
            lines.append(tree)
    return lines


def last_line(path: Path, kind: str) -> dict[str, Any]:
    """The last line of a kind in metrics.jsonl, from its last few kilobytes; {} where there is none."""
    try:
        with path.open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - 16384))
            text = file.read().decode(errors="replace")
    except OSError:
        return {}
    for line in reversed(text.splitlines()):
        try:
            tree = json.loads(line)
        except ValueError:
            continue
        if isinstance(tree, dict) and tree.get("kind") == kind:
            return tree
    return {}


def max_steps_of(run: Run) -> int:
    """Steps that a run is to take; 0 where epochs decide."""
    return 0 if run.config.train.epochs else run.config.train.max_steps
