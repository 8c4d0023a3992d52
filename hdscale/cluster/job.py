"""What submitit runs as each rank: `python -m hdscale train` on the run's own configuration."""

from __future__ import annotations

import ctypes
import os
import runpy
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from hdscale.cluster.batch import note_end, note_start
from hdscale.cluster.records import LaunchRecord, error_file, read_launch, read_state
from hdscale.errors import ERROR_FILE, EXIT_BROKEN, EXIT_DONE
from hdscale.files import package_root

LOCAL_AGAIN = 144
"""The exit code at which submitit's local controller starts the ranks again (at most six times)."""
SIGNALS = (signal.SIGUSR2, signal.SIGTERM, signal.SIGCONT)
"""Signals that submitit handles, and that the run handles itself here."""
PR_SET_PDEATHSIG = 1
"""Of Linux's prctl: the signal that a process gets when its parent ends."""


@dataclass
class TrainingJob:
    """One run of a launch, as a picklable callable without arguments.

    Signals, checkpoints and requeueing are handled by the run itself (`hdscale.engine.preemption`) and by
    `hdscale/cluster/batch.sh`: submitit would tell global rank 0 only, and count every interruption of a short job as a
    time-out.

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
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        folder = Path(self.launch)
        record = read_launch(folder)
        executor = os.environ.get("SUBMITIT_EXECUTOR", "debug")
        if executor != "slurm":
            os.environ[ERROR_FILE] = str(error_file(folder, self.index))
            if os.environ.get("SUBMITIT_LOCAL_GLOBALID", "0") == "0":
                code = self.noted(folder, record, executor)
                # SystemExit goes past submitit, which would otherwise take any return for success
                if code != EXIT_DONE:
                    sys.exit(code)
                return code
        # under SLURM the batch shell notes the start and the end, elsewhere rank 0: this process becomes the rank
        command = self.command(folder, record)
        os.execve(command[0], command, environment())

    def command(self, folder: Path, record: LaunchRecord) -> list[str]:
        """The command line of a rank."""
        fresh = ["--fresh"] if self.fresh and read_state(folder, self.index).starts <= 1 else []
        # -P: the package is that of PYTHONPATH, not one in the working folder
        return [sys.executable, "-P", "-m", "hdscale", "train", "--config", record.runs[self.index].config, *fresh]

    def noted(self, folder: Path, record: LaunchRecord, executor: str) -> int:
        """Run rank 0 without SLURM, and note its start and end as the batch shell does under SLURM.

        Returns:
            its exit code, or submitit's code for another start.
        """
        run = record.runs[self.index]
        job = os.environ.get("SUBMITIT_LOCAL_JOB_ID", str(os.getpid()))
        note_start(folder, self.index, run, job, str(folder / f"{job}_0_log.out") if executor == "local" else "")
        run_rank = run_in_process if executor == "debug" else run_with_signals
        code = run_rank(self.command(folder, record))
        state = note_end(folder, self.index, run, code, "RUNNING", record.max_requeues)
        if state.outcome == "again" and executor == "local":
            print(f"hdscale: {run.name}: {state.reason}", file=sys.stderr, flush=True)
            return LOCAL_AGAIN
        return code


def environment() -> dict[str, str]:
    """This process's environment, with the package that runs here first on Python's path."""
    path = os.environ.get("PYTHONPATH")
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(package_root()), *([path] if path else [])])}


def run_with_signals(command: list[str]) -> int:
    """Run a command, pass on the signals that this process gets, and return its exit code (as a shell counts it).

    The command ends with this process, however that ends: submitit kills what it has started, and knows only this one.
    """
    with subprocess.Popen(command, env=environment(), preexec_fn=end_with_parent) as child:

        def forward(number: int, frame: FrameType | None) -> None:
            child.send_signal(number)

        before = {number: signal.signal(number, forward) for number in SIGNALS}
        try:
            code = child.wait()
        except KeyboardInterrupt:
            # the launch was cancelled: nothing is noted, since the run has not ended by itself
            child.send_signal(signal.SIGINT)
            child.wait()
            raise
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    return code if code >= 0 else 128 - code


def end_with_parent() -> None:
    """Have the kernel kill this process when its parent ends; on Linux, elsewhere it stays alive."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def run_in_process(command: list[str]) -> int:
    """Run `python -m hdscale ...` in this process and return its exit code.

    Raises:
        Exception: any that the run does not handle, for the debugger of submitit's debug executor.
    """
    arguments = sys.argv
    sys.argv = command[command.index("-m") + 1 :]
    try:
        runpy.run_module("hdscale", run_name="__main__", alter_sys=False)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else EXIT_DONE if end.code is None else EXIT_BROKEN
    finally:
        sys.argv = arguments
    return EXIT_DONE
