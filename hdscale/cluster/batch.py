"""The start and the end of a job, as its batch shell sees them (`hdscale/cluster/batch.sh` calls this).

    python -m hdscale.cluster.batch begin (--launch DIR | --config FILE [key=value ...])
    python -m hdscale.cluster.batch end --code N --state STATE (--launch DIR | --config FILE [key=value ...])

`end` answers with its exit code: 0 put the job back into the queue, 3 do not. No torch: it runs while a grace
period ends.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from hdscale.cluster.records import (
    LaunchRecord,
    RunEntry,
    RunState,
    error_file,
    launch_folder,
    newest_step,
    now,
    read_launch,
    read_state,
    write_launch,
    write_state,
)
from hdscale.commands.cli import guarded
from hdscale.config import load_config
from hdscale.errors import EXIT_DONE, EXIT_PREEMPTED, EXIT_USER_ERROR

ANSWER_AGAIN = 0
ANSWER_NOT_AGAIN = 3
RUNNING_STATES = ("RUNNING", "UNKNOWN")
"""States in which the job is still its own master. Otherwise SLURM has decided (scancel, requeue …)."""


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and run `begin` or `end`."""
    parser = argparse.ArgumentParser(prog="hdscale.cluster.batch", allow_abbrev=False)
    parser.add_argument("moment", choices=["begin", "end"])
    parser.add_argument("--launch", metavar="DIR", help="folder of a launch; the run is that of the array index")
    parser.add_argument("--config", metavar="FILE")
    parser.add_argument("--log", default="", help="file of the job's output")
    parser.add_argument("--code", type=int, default=0, help="exit code of the ranks")
    parser.add_argument("--state", default="UNKNOWN", help="SLURM's state of the job")
    parser.add_argument("--fresh", action="store_true", help="ignored here: passed on to the ranks")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_intermixed_args(argv)
    return guarded(begin if args.moment == "begin" else end, args)


def begin(args: argparse.Namespace) -> int:
    """Check the configuration before any rank starts, note the start, print the path of the error file."""
    folder, index, run, _ = locate(args, os.environ)
    note_start(folder, index, run, job_id(os.environ), args.log)
    print(error_file(folder, index))
    return EXIT_DONE


def end(args: argparse.Namespace) -> int:
    """Decide whether the job starts again, and note the outcome."""
    folder, index, run, limit = locate(args, os.environ)
    state = note_end(folder, index, run, args.code, args.state, limit)
    print(f"hdscale: {run.name}: {state.reason}", file=sys.stderr)
    return ANSWER_AGAIN if state.outcome == "again" else ANSWER_NOT_AGAIN


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
        state.outcome, state.reason = "failed", "stopped by a mistake that only you can mend (see its log)"
    elif slurm_state not in RUNNING_STATES:
        state.outcome, state.reason = (
            "left",
            f"{why}; SLURM has ended or requeued the job ({slurm_state}); {kept}",
        )
    else:
        state.stalled = 0 if step > state.step else state.stalled + 1
        if state.stalled > limit:
            state.outcome = "stalled"
            state.reason = f"{why}; given up after {state.stalled} ends without a newer checkpoint; {kept}"
        else:
            state.outcome, state.reason = "again", f"{why}; requeued; {kept}"
            if state.stalled:
                state.reason += f"; {state.stalled} of {limit} ends without a newer one"
    state.step = max(state.step, step)
    return state


def locate(args: argparse.Namespace, environ: Mapping[str, str]) -> tuple[Path, int, RunEntry, int]:
    """(launch folder, index of the run, the run, requeues that are forgiven)."""
    if args.launch:
        folder = Path(args.launch)
        record = read_launch(folder)
        index = int(environ.get("SLURM_ARRAY_TASK_ID", 0))
        run = record.runs[index]
        return folder, index, run, load_config(run.config).cluster.max_requeues
    config = load_config(args.config, args.overrides)
    folder = launch_folder(config.run.dir, config.run.name)
    run = RunEntry(config.run.name, str(Path(config.run.dir) / config.run.name), args.config, args.overrides)
    job = environ.get("SLURM_JOB_ID", "")
    if not (folder / "launch.json").exists() or read_launch(folder).job != job:
        write_launch(folder, LaunchRecord(run.name, "sbatch", [run], job, now()))
    return folder, 0, run, config.cluster.max_requeues


def read_error(folder: Path, index: int) -> str:
    """The first mistake that a rank has written down; empty where there is none."""
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
    sys.exit(main())
