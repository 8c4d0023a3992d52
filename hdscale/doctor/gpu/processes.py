"""Processes of an examination: started without what a batch job says, and ended with all that they started."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import tempfile
from pathlib import Path

import psutil

from hdscale.files import package_root

LAUNCHERS = ("SLURM_", "SUBMITIT_", "TORCHELASTIC_", "PMI_", "PMIX_", "OMPI_")
RANK_VARIABLES = (
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "CROSS_RANK", "MASTER_ADDR", "MASTER_PORT",
    "HDSCALE_ERROR_FILE", "DS_ACCELERATOR",
)  # fmt: skip
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
PATIENCE = 5.0
"""Seconds that a killed process has to be gone; one that waits for a broken driver may stay."""


def own_environment() -> dict[str, str]:
    """The environment without a launcher's variables: what is started here is no rank of the job around it."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(LAUNCHERS) and name not in RANK_VARIABLES
    }
    path = os.pathsep.join(filter(None, [str(package_root()), kept.get("PYTHONPATH")]))
    return kept | OFFLINE | {"PYTHONPATH": path}


def start(
    command: list[str], output: Path, errors: Path | None = None, leader: bool = False, **variables: str
) -> subprocess.Popen[bytes]:
    """Start a command in a temporary folder, its output in files.

    Args:
        errors: file of its stderr; default: `output`.
        leader: of a session of its own, which is ended as a whole.
        variables: of its environment.
    """
    with output.open("ab") as out, (errors or output).open("ab") as err:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            cwd=tempfile.gettempdir(),
            env=own_environment() | variables,
            start_new_session=leader,
        )


def end(process: subprocess.Popen[bytes], leader: bool = False) -> None:
    """Kill a process and its descendants; of a leader, also what is left of its session's group."""
    with contextlib.suppress(psutil.Error):
        for child in psutil.Process(process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                child.kill()
    with contextlib.suppress(ProcessLookupError):
        if leader:
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(PATIENCE)


def ended(code: int | None) -> str:
    """An exit code in words."""
    if code is None:
        return "did not end when it was killed"
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return f"exit code {code}"


def reason(path: Path) -> str:
    """The line of a failed process's output that says what is wrong: hdscale's own, or that of a traceback's error."""
    lines = [re.sub(r"^\[rank\d+\]:\s?", "", line) for line in tail(path, 400)]
    for sign in (r"hdscale: ", r"[A-Za-z_.]*(Error|Exception|Interrupt)\b.*", r"."):
        for line in reversed(lines):
            if re.match(sign, line):
                return line
    return "no output"


def tail(path: Path, count: int = 15) -> list[str]:
    """The last lines of a file that say anything."""
    try:
        with path.open("rb") as stream:
            stream.seek(0, os.SEEK_END)
            stream.seek(max(0, stream.tell() - 65536))
            text = stream.read().decode(errors="replace")
    except OSError:
        return []
    # a progress bar writes over its line
    lines = [line.rsplit("\r", 1)[-1].rstrip() for line in text.splitlines()]
    return [line for line in lines if line][-count:]
