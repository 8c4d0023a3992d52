"""What submitit runs in each rank: `hdscale train` on the run's own configuration."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path

from hdscale.cluster.batch import note_end, note_start
from hdscale.cluster.records import error_file, read_launch, read_state
from hdscale.config import load_config
from hdscale.errors import ERROR_FILE, EXIT_DONE

LOCAL_AGAIN = 144
"""The exit code at which submitit's local controller starts the ranks again (at most six times)."""


@dataclass
class TrainingJob:
    """One run of a launch, as a picklable callable without arguments.

    Signals, checkpoints and requeueing are the run's own (`hdscale.engine.preemption`,
    `hdscale/cluster/batch.sh`): submitit's would tell global rank 0 only, and count every interruption of a
    short job as a time-out.

    Attributes:
        launch: folder of the launch.
        index: number of the run in it.
        fresh: start anew, where the job has not been requeued.
    """

    launch: str
    index: int
    fresh: bool = False

    def __call__(self) -> int:
        # submitit has installed its handlers just before; until the run has its own, a signal ends this rank
        for number in (signal.SIGUSR2, signal.SIGTERM, signal.SIGCONT):
            signal.signal(number, signal.SIG_DFL)
        folder = Path(self.launch)
        executor = os.environ.get("SUBMITIT_EXECUTOR", "debug")
        if executor == "slurm":  # the batch shell notes the start and the end
            code = self.train(folder)
        else:
            code = self.train_without_slurm(folder, executor)
        # SystemExit goes past submitit, which would otherwise take any return for success
        if code != EXIT_DONE:
            sys.exit(code)
        return code

    def train(self, folder: Path) -> int:
        """`hdscale train`; its exit code."""
        from hdscale.commands.cli import main

        run = read_launch(folder).runs[self.index]
        fresh = ["--fresh"] if self.fresh and read_state(folder, self.index).starts <= 1 else []
        return main(["train", "--config", run.config, *fresh])

    def train_without_slurm(self, folder: Path, executor: str) -> int:
        """The same, doing what the batch shell does under SLURM: rank 0 notes the start and the end."""
        os.environ[ERROR_FILE] = str(error_file(folder, self.index))
        if os.environ.get("SUBMITIT_LOCAL_GLOBALID", "0") != "0":
            return self.train(folder)
        run = read_launch(folder).runs[self.index]
        job = os.environ.get("SUBMITIT_LOCAL_JOB_ID", str(os.getpid()))
        note_start(folder, self.index, run, job, str(folder / f"{job}_0_log.out") if executor == "local" else "")
        try:
            code = self.train(folder)
        except Exception:
            if executor == "debug":
                raise
            traceback.print_exc()
            code = 1
        limit = load_config(run.config).cluster.max_requeues
        state = note_end(folder, self.index, run, code, "RUNNING", limit)
        if state.outcome != "again":
            return code
        if executor == "local":
            print(f"hdscale: {run.name}: {state.reason}", file=sys.stderr, flush=True)
            return LOCAL_AGAIN
        return code
