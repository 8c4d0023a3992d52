"""What is recorded when a job starts and ends, and whether it is requeued.

`python -m hdscale.cluster.batch` is the command of batch shells (`hdscale/commands/batch.py`). It imports no torch: it
runs while a grace period ends.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

from hdscale.cluster.records import (
    RunEntry,
    RunState,
    error_file,
    newest_step,
    read_state,
    write_state,
)
from hdscale.errors import EXIT_DONE, EXIT_PREEMPTED, EXIT_USER_ERROR

RUNNING_STATES = ("RUNNING", "UNKNOWN")
"""States in which SLURM has not ended the job (by scancel, scontrol requeue, a time limit …)."""


def note_start(folder: Path, index: int, run: RunEntry, job: str, log: str) -> None:
    """Write down that the ranks of a run are about to start."""
    state = read_state(folder, index)
    if state.job != job:
        # submitted anew by the user: what counts is progress from here
        state = RunState(job=job, step=newest_step(run.folder))
    state.starts += 1
    state.log = log or state.log
    state.outcome, state.reason, state.code = "running", "", None
    write_state(folder, index, state)
    error_file(folder, index).unlink(missing_ok=True)


def note_end(folder: Path, index: int, run: RunEntry, code: int, slurm_state: str, limit: int) -> RunState:
    """Write down what follows from the ranks' exit code; see `decide`."""
    mistake = read_error(folder, index)
    code = EXIT_USER_ERROR if mistake else code
    state = decide(read_state(folder, index), code, slurm_state, newest_step(run.folder), limit)
    state.reason = mistake or state.reason
    write_state(folder, index, state)
    return state


def decide(state: RunState, code: int, slurm_state: str, step: int, limit: int) -> RunState:
    """What follows from the ranks' exit code.

    Args:
        state: as it was when the job started; changed and returned.
        code: 0 done, 2 the user's mistake, 75 pre-empted with a checkpoint; else a crash or a lost rank.
        slurm_state: SLURM's state of the job now.
        step: of the newest checkpoint.
        limit: ends in a row without a newer checkpoint that are forgiven.
    """
    state.code = code
    why = "told to stop, and saved" if code == EXIT_PREEMPTED else f"the ranks ended with exit code {code}"
    kept = f"its newest checkpoint is of step {step}" if step >= 0 else "it has no checkpoint yet"
    if code == EXIT_DONE:
        state.outcome, state.reason = "done", "done"
    elif code == EXIT_USER_ERROR:
        state.outcome, state.reason = "failed", "stopped by a mistake that only you can correct (see its log)"
    elif slurm_state not in RUNNING_STATES:
        state.outcome, state.reason = (
            "left",
            f"{why}; SLURM has ended or requeued the job ({slurm_state}); {kept}",
        )
    else:
        state.stalled = 0 if step > state.step else state.stalled + 1
        if state.stalled > limit:
            state.outcome = "stalled"
            state.reason = f"{why}; not requeued after {state.stalled} ends without a newer checkpoint; {kept}"
        else:
            state.outcome, state.reason = "again", f"{why}; requeued; {kept}"
            if state.stalled:
                state.reason += f"; {state.stalled} of {limit} ends without a newer one"
    state.step = max(state.step, step)
    return state


def read_error(folder: Path, index: int) -> str:
    """The first user error that a rank has recorded; empty where there is none."""
    try:
        return error_file(folder, index).read_text().strip().split("\n")[0]
    except FileNotFoundError:
        return ""


def job_id(environ: Mapping[str, str]) -> str:
    """SLURM's id of this job, as squeue and scancel name it: `12`, or `12_3` in an array."""
    if "SLURM_ARRAY_JOB_ID" in environ:
        return f"{environ['SLURM_ARRAY_JOB_ID']}_{environ.get('SLURM_ARRAY_TASK_ID', '0')}"
    return environ.get("SLURM_JOB_ID", "")


if __name__ == "__main__":
    from hdscale.commands.batch import main

    sys.exit(main())
