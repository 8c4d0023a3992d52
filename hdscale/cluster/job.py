"""What submitit runs in each rank: `hdscale train` on the run's own configuration."""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

from hdscale.cluster.batch import decide, read_error
from hdscale.cluster.records import RunState, error_file, newest_step, read_launch, read_state, write_state
from hdscale.errors import ERROR_FILE, EXIT_DONE

SUBMITIT_LOCAL_REQUEUE = 144
"""The exit code at which submitit's local controller starts the ranks again."""


@dataclass
class TrainingJob:
    """One run of a launch, as a picklable callable without arguments.

    Signals, checkpoints and requeueing are the run's own (`hdscale.engine.preemption`, `hdscale/cluster/batch.sh`):
    submitit's would tell global rank 0 only, and count every interruption of a short job as a time-out.

    Attributes:
        launch: folder of the launch.
        index: number of the run in it.
        fresh: start anew, where the job has not been requeued.
    """

    launch: str
    index: int
    fresh: bool = False

    def __call__(self) -> int:
        # submitit has installed its handlers just before; until the run has its own, a signal simply ends this rank
        for number in (signal.SIGUSR2, signal.SIGTERM, signal.SIGCONT):
            signal.signal(number, signal.SIG_DFL)
        from hdscale.cli import main

        folder = Path(self.launch)
        executor = os.environ.get("SUBMITIT_EXECUTOR", "debug")
        if executor != "slurm":
            os.environ[ERROR_FILE] = str(error_file(folder, self.index))
        started_before = int(os.environ.get("SLURM_RESTART_COUNT", 0)) or read_state(folder, self.index).starts > 1
        run = read_launch(folder).runs[self.index]
        fresh = ["--fresh"] if self.fresh and not started_before else []
        code = main(["train", "--config", run.config, *fresh])
        # SystemExit goes past submitit, which would otherwise take any return for success
        if code != EXIT_DONE:
            sys.exit(code)
        return code


def next_local_start(folder: Path, index: int, code: int, limit: int) -> bool:
    """After the ranks of a local job have ended with `code`: note the outcome; whether to start them again."""
    run = read_launch(folder).runs[index]
    mistake = read_error(folder, index)
    state = decide(read_state(folder, index), 2 if mistake else code, "RUNNING", newest_step(run.folder), limit)
    state.reason = mistake or state.reason
    write_state(folder, index, state)
    return state.outcome == "again"


def note_local_start(folder: Path, index: int, job: str, log: str) -> None:
    """Note that the ranks of a local or debug job are starting."""
    state = read_state(folder, index)
    if state.job != job:
        state = RunState(job=job, log=log)
    state.starts += 1
    state.outcome = "running"
    write_state(folder, index, state)
    error_file(folder, index).unlink(missing_ok=True)
