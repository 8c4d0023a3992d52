"""`hdscale launch --status | --cancel | --logs NAME`: what has become of a launch."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
from pathlib import Path

from rich.console import Console
from rich.table import Table

from hdscale.cluster.records import (
    LAUNCHES,
    LaunchRecord,
    RunEntry,
    RunState,
    error_file,
    launch_folder,
    newest_step,
    read_launch,
    read_state,
)
from hdscale.errors import UserError, one_line
from hdscale.runs.folder import RESULTS

ENDED = (
    "COMPLETED",
    "FAILED",
    "CANCELLED",
    "TIMEOUT",
    "NODE_FAIL",
    "PREEMPTED",
    "BOOT_FAIL",
    "DEADLINE",
    "OUT_OF_MEMORY",
)
OUTCOMES = {
    "again": "requeued",
    "left": "ended by SLURM",
    "done": "done",
    "failed": "failed",
    "stalled": "not requeued",
}


def show_launches(run_dir: str) -> int:
    """List the launches of a folder of runs."""
    folders = sorted(Path(run_dir, LAUNCHES).glob("*/launch.json"))
    if not folders:
        print(f"no launch is recorded in {Path(run_dir, LAUNCHES)}")
    for path in folders:
        record = read_launch(path.parent)
        runs = f"{len(record.runs)} runs"
        print(f"{record.name}: {record.executor} job {record.job}, {runs}, {record.submitted} UTC")
    return 0


def show_status(run_dir: str, name: str) -> int:
    """A table with one line per run; below it, the errors of those that failed."""
    folder = launch_folder(run_dir, name)
    record = read_launch(folder)
    known = known_jobs(record)
    table = Table("run", "job", "state", "step", "starts", box=None, pad_edge=False)
    errors = []
    for index, run in enumerate(record.runs):
        state = read_state(folder, index)
        words = describe(record, index, run, state, known)
        step = newest_step(run.folder)
        table.add_row(
            run.name, job_of(record, index, state), words, "-" if step < 0 else str(step), str(state.starts or "-")
        )
        if state.outcome in ("failed", "stalled") or (state.outcome == "again" and state.stalled):
            errors.append(f"{run.name}: {find_error(folder, index, record, state)}")
    # rows must not be cut where the output goes to a file or a narrow terminal
    console = Console(width=max(100, shutil.get_terminal_size().columns), highlight=False)
    console.print(f"{record.name}: {record.executor} job {record.job}, submitted {record.submitted} UTC")
    console.print(table)
    for line in errors:
        print(line)
    return 0


def job_of(record: LaunchRecord, index: int, state: RunState) -> str:
    """The id of a run's job; without SLURM, of the process that the run itself has noted."""
    return record.job_of(index) if record.executor in ("slurm", "sbatch") else state.job


def describe(record: LaunchRecord, index: int, run: RunEntry, state: RunState, known: dict[str, str]) -> str:
    """The state of a run in a word or two."""
    now = known.get(job_of(record, index, state), "").replace("_", " ").lower()
    if state.outcome in ("done", "failed", "stalled"):
        return OUTCOMES[state.outcome]
    if now and now not in ("completed", "failed"):
        return now
    if (Path(run.folder) / RESULTS).exists():
        return "done"
    if state.outcome in OUTCOMES:
        return OUTCOMES[state.outcome]
    return "lost: cancelled, or its node died" if record.executor in ("slurm", "sbatch") else "ended without a word"


def live_jobs(record: LaunchRecord) -> dict[str, str]:
    """{job id: state} of the record's jobs that have not ended."""
    return {job: state for job, state in known_jobs(record).items() if state not in ENDED}


def known_jobs(record: LaunchRecord) -> dict[str, str]:
    """{job id: state} of the record's jobs that SLURM has not forgotten (minutes after a job's end)."""
    if record.executor in ("slurm", "sbatch"):
        if not shutil.which("squeue") or not record.job:
            return {}
        # --array: one line per job of an array, also before it has started
        command = [
            "squeue",
            "--noheader",
            "--array",
            "--states=all",
            "--format=%i %T",
            f"--jobs={record.job}",
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        return dict(line.split() for line in done.stdout.splitlines())  # an id that squeue has forgotten: none
    return {job: "RUNNING" for job in record.job.split(",") if is_controller(job)}


def is_controller(pid: str) -> bool:
    """Whether a job of the local executor is still there; its id is that of submitit's controlling process."""
    try:
        return b"submitit.local._local" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def log_files(folder: Path, index: int, record: LaunchRecord, state: RunState) -> list[Path]:
    """The logs of a run, rank 0's first."""
    if record.executor == "sbatch":
        return [Path(state.log)] if state.log else []
    return sorted(
        folder.glob(f"{job_of(record, index, state)}_*_log.out"),
        key=lambda path: int(path.name.split("_")[-2]),
    )


def find_error(folder: Path, index: int, record: LaunchRecord, state: RunState) -> str:
    """Why a run failed: the user's mistake, else the last exception in its logs, else the exit code."""
    mistakes = error_file(folder, index)
    if mistakes.exists():
        return mistakes.read_text().split("\n")[0]
    exception = re.compile(
        r"^hdscale: .*out of GPU memory.*|^(?:\w+\.)*\w*(?:Error|Exception|Interrupt|Stopped|Failure)\b.*", re.MULTILINE
    )
    for log in log_files(folder, index, record, state):
        if log.exists() and (found := exception.findall(log.read_text(errors="replace"))):
            return f"{found[-1].strip()} ({state.reason})"
    return state.reason


def show_logs(run_dir: str, name: str, lines: int) -> int:
    """The last lines of each run's log."""
    folder = launch_folder(run_dir, name)
    record = read_launch(folder)
    for index, run in enumerate(record.runs):
        logs = log_files(folder, index, record, read_state(folder, index))
        if not logs or not logs[0].exists():
            print(f"==> {run.name}: no output yet")
            continue
        print(f"==> {run.name}: {logs[0]}")
        print("\n".join(logs[0].read_text(errors="replace").splitlines()[-lines:]))
    return 0


def cancel(run_dir: str, name: str) -> int:
    """Cancel whatever of a launch has not ended. Its ranks save a checkpoint before they leave."""
    record = read_launch(launch_folder(run_dir, name))
    live = live_jobs(record)
    if not live:
        print(f"{name}: nothing of it is queued or running")
        return 0
    if record.executor in ("slurm", "sbatch"):
        done = subprocess.run(["scancel", record.job], capture_output=True, text=True)
        if done.returncode:
            raise UserError(f"scancel refuses: {one_line(done.stderr)}")
    else:
        for job in record.job.split(","):
            if is_controller(job):
                os.kill(int(job), signal.SIGINT)
    print(f"{name}: cancelled {record.job}")
    return 0
