"""The start and the end of a job, as its batch shell sees them (`hdscale/cluster/batch.sh` calls this).

    python -m hdscale.cluster.batch begin (--launch DIR | --config FILE [key=value ...])
    python -m hdscale.cluster.batch end --code N --state STATE (--launch DIR | --config FILE [key=value ...])

The exit code of `end` says what to do: 0 put the job back into the queue, 3 do not.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from hdscale.cluster.batch import job_id, note_end, note_start
from hdscale.cluster.records import (
    LaunchRecord,
    RunEntry,
    error_file,
    launch_folder,
    now,
    read_launch,
    write_launch,
)
from hdscale.config import load_config
from hdscale.errors import EXIT_DONE, guarded

ANSWER_AGAIN = 0
ANSWER_NOT_AGAIN = 3


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and run `begin` or `end`."""
    parser = argparse.ArgumentParser(prog="hdscale.cluster.batch", allow_abbrev=False)
    parser.add_argument("moment", choices=["begin", "end"])
    parser.add_argument("--launch", metavar="DIR", help="folder of a launch; the run is that of the array index")
    parser.add_argument("--config", metavar="FILE")
    parser.add_argument("--log", default="", help="file of the job's output")
    parser.add_argument("--code", type=int, default=0, help="exit code of the ranks")
    parser.add_argument("--state", default="UNKNOWN", help="SLURM's state of the job")
    parser.add_argument("--fresh", action="store_true", help="no effect here; the ranks get it too")
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


def locate(args: argparse.Namespace, environ: Mapping[str, str]) -> tuple[Path, int, RunEntry, int]:
    """(launch folder, index of the run, the run, requeues that are forgiven)."""
    if args.launch:
        folder = Path(args.launch)
        record = read_launch(folder)
        index = int(environ.get("SLURM_ARRAY_TASK_ID", 0))
        run = record.runs[index]
        return folder, index, run, record.max_requeues
    config = load_config(args.config, args.overrides)
    folder = launch_folder(config.run.dir, config.run.name)
    run = RunEntry(config.run.name, str(Path(config.run.dir) / config.run.name), args.config, args.overrides)
    job = environ.get("SLURM_JOB_ID", "")
    if not (folder / "launch.json").exists() or read_launch(folder).job != job:
        write_launch(folder, LaunchRecord(run.name, "sbatch", [run], job, now()))
    return folder, 0, run, config.cluster.max_requeues
