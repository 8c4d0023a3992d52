"""compute-sanitizer over the operator's kernels: accesses out of bounds, and races within shared memory."""

from __future__ import annotations

import os
import re
import shutil
import sys
from pathlib import Path

from hdscale.doctor.gpu.extension import need_kernels
from hdscale.doctor.gpu.lines import Lines, NotPossible, Wrong
from hdscale.doctor.gpu.processes import end, ended, reason, start

TOOLS = {"memcheck": "no access out of bounds", "racecheck": "no race in shared memory"}
FOUND_ERRORS = 97


def examine(lines: Lines, work: Path) -> None:
    """The checks of the stage `sanitizer`."""
    for tool, name in TOOLS.items():
        with lines.check(f"{tool}: {name}") as found:
            sanitizer = find_sanitizer()
            if sanitizer is None:
                raise NotPossible("compute-sanitizer is not installed (it comes with the CUDA toolkit)")
            need_kernels()
            log = work / f"{tool}.log"
            command = [
                sanitizer, "--tool", tool, "--error-exitcode", str(FOUND_ERRORS), "--report-api-errors", "no",
                sys.executable, "-P", "-m", "hdscale.doctor.gpu.small_pass",
            ]  # fmt: skip
            # torch asks the driver for more than it has, which is no error of the kernels; and
            # with torch's own blocks, an access beyond a tensor may end in another one unseen
            process = start(command, log, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
            try:
                process.wait()
            finally:
                end(process)
            found.say(judge(process.returncode, log))


def judge(code: int, log: Path) -> str:
    """The tool's summary.

    Raises:
        Wrong: with the first error that it names. NotPossible: if it could not watch the process.
    """
    text = log.read_text(errors="replace")
    summary = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (.*)", text)
    if code == FOUND_ERRORS or (summary and not summary[-1].startswith("0 ")):
        told = [line.strip("= ") for line in text.splitlines() if line.startswith("=========")]
        first = next((line for line in told if re.search(r"Invalid|Race|hazard|Error|error", line)), "")
        raise Wrong(f"{summary[-1] if summary else ended(code)}: {first}")
    if code or not summary:
        raise NotPossible(f"it could not watch the process ({ended(code)}: {reason(log)})")
    return summary[-1]


def find_sanitizer() -> str | None:
    """The path of compute-sanitizer."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    places = [os.path.join(home, "bin") for home in homes if home]
    if nvcc := shutil.which("nvcc"):
        places.append(os.path.dirname(os.path.realpath(nvcc)))
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=os.pathsep.join(places))
