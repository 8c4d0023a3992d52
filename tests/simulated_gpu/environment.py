"""The Python with a CUDA build of torch that the tier runs on: made once by `make cuda-env`, and when that may fail."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hdscale.files import locked
from tests.helpers.places import ROOT

DISK_GB = 20
"""Free disk with which a CUDA environment must be possible; it takes 7 GB, and pip as much while it installs."""


def cuda_python() -> Path:
    """$HDSCALE_CUDA_PYTHON, or that of the environment in `.venv-cuda`, which is made if it is not there.

    Skips the test only where the environment cannot be made: too little disk, or no package index that answers. With
    both, an environment that is not made fails the test.
    """
    if named := os.environ.get("HDSCALE_CUDA_PYTHON"):
        return Path(named)
    with locked(ROOT / ".venv-cuda.lock"):
        made = subprocess.run(["make", "-C", str(ROOT), "cuda-env"], capture_output=True, text=True)
    if made.returncode == 0:
        return ROOT / ".venv-cuda" / "bin" / "python"
    if reason := why_impossible():
        pytest.skip(f"no CUDA build of torch: {reason}")
    pytest.fail(f"make cuda-env failed, with disk and a package index at hand:\n{made.stdout}{made.stderr}"[-3000:])


def why_impossible() -> str | None:
    """What keeps this machine from having a CUDA environment, or None."""
    free = shutil.disk_usage(ROOT).free / 1e9
    if free < DISK_GB:
        return f"{free:.0f} GB of disk are free, and {DISK_GB} are needed"
    if not index_answers():
        return "no package index answers"
    return None


def index_answers() -> bool:
    """Whether pip finds a package that is not installed."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed", "--no-deps"]
    return subprocess.run([*command, "packaging"], capture_output=True).returncode == 0


def toolkit(python: Path) -> Path:
    """CUDA's toolkit, with nvcc: $CUDA_HOME, else the wheels of the environment, else this machine's.

    Raises:
        AssertionError: if there is none.
    """
    if named := os.environ.get("CUDA_HOME"):
        return Path(named)
    wheels = [path.parents[1] for path in python.parents[1].glob("lib/python3*/site-packages/nvidia/cu13/bin/nvcc")]
    found = shutil.which("nvcc")
    homes = [*wheels, *([Path(found).resolve().parents[1]] if found else []), Path("/usr/local/cuda")]
    usable = [home for home in homes if (home / "bin" / "nvcc").exists() and (home / "include" / "crt").is_dir()]
    assert usable, f"no nvcc: neither in {python.parents[1]} nor on this machine"
    return usable[0]
