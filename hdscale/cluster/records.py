"""What is written down about a launch: `launch.json` and `state.<index>.json` in `<run.dir>/launches/<name>/`.

`hdscale launch` and the batch jobs write it, `hdscale launch --status` reads it. Plain files, since a cluster
without accounting forgets a job minutes after its end.
"""

from __future__ import annotations

import dataclasses
import json
import re
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from hdscale.errors import UserError
from hdscale.files import write_json

LAUNCHES = "launches"


@dataclass
class RunEntry:
    """One run of a launch: its name, its run directory, its own configuration, and what a sweep set in it."""

    name: str
    folder: str
    config: str
    overrides: list[str] = field(default_factory=list)


@dataclass
class LaunchRecord:
    """A launch: a single run, or the runs of a sweep.

    Attributes:
        name: as given to `--status`.
        executor: slurm, local, debug, or sbatch (a script of slurm/ submitted by hand).
        job: SLURM's id of the job or of the array; of a process for the local executor.
        max_requeues: restarts without a newer checkpoint before a job is not requeued any more.
    """

    name: str
    executor: str
    runs: list[RunEntry]
    job: str = ""
    submitted: str = ""
    max_requeues: int = 3

    def job_of(self, index: int) -> str:
        """SLURM's id of one run."""
        return f"{self.job}_{index}" if len(self.runs) > 1 else self.job


@dataclass
class RunState:
    """How far the job of a run has come.

    Attributes:
        job: id of the job that wrote this last.
        log: file of rank 0's output.
        starts: times that the job was started.
        stalled: ends in a row without a newer checkpoint.
        step: step of the newest checkpoint at the last end; -1: none.
        code: exit code of the ranks at the last end.
        outcome: running, again (requeued by hdscale), left (ended or requeued by SLURM), done, failed or
            stalled.
        reason: the outcome in words.
        time: when this was written, UTC.
    """

    job: str = ""
    log: str = ""
    starts: int = 0
    stalled: int = 0
    step: int = -1
    code: int | None = None
    outcome: str = ""
    reason: str = ""
    time: str = ""


def launch_folder(run_dir: str | Path, name: str) -> Path:
    """Folder of a launch's records and logs."""
    return Path(run_dir) / LAUNCHES / name


def write_launch(folder: Path, record: LaunchRecord) -> None:
    """Write `launch.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "launch.json", dataclasses.asdict(record))


def read_launch(folder: Path) -> LaunchRecord:
    """Read `launch.json`.

    Raises:
        UserError: if there is none, or it cannot be read.
    """
    path = folder / "launch.json"
    try:
        tree = json.loads(path.read_text())
        return LaunchRecord(**{**tree, "runs": [RunEntry(**run) for run in tree["runs"]]})
    except FileNotFoundError:
        raise UserError(f"no launch is recorded in {folder}; `hdscale launch --status` lists them") from None
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} is damaged ({error}); remove it and launch again") from error


def read_state(folder: Path, index: int) -> RunState:
    """The state of one run; an empty one where its job has not started."""
    known = {one.name for one in dataclasses.fields(RunState)}
    try:
        tree = json.loads((folder / f"state.{index}.json").read_text())
        return RunState(**{key: value for key, value in tree.items() if key in known})
    except (FileNotFoundError, ValueError, TypeError):
        return RunState()


def write_state(folder: Path, index: int, state: RunState) -> None:
    """Write the state of one run."""
    folder.mkdir(parents=True, exist_ok=True)
    state.time = now()
    write_json(folder / f"state.{index}.json", dataclasses.asdict(state))


def error_file(folder: Path, index: int) -> Path:
    """Where the ranks of a run write a mistake of the user's (`hdscale.errors.ERROR_FILE`)."""
    return folder.absolute() / f"error.{index}.txt"


def newest_step(run_folder: str | Path) -> int:
    """Step of the newest checkpoint folder of a run; -1 where there is none.

    Checkpoints get their name when they are complete, so the name is enough to see progress.
    """
    steps = [
        int(match[1])
        for path in Path(run_folder).glob("checkpoints/step_*")
        if (match := re.fullmatch(r"step_(\d+)", path.name))
    ]
    return max(steps, default=-1)


def now() -> str:
    """The time, UTC, to the second."""
    return datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S")
