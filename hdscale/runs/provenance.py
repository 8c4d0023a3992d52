"""Where a result comes from: commit, versions, device, ranks, threads, seed."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

PACKAGES = ("hdscale", "torch", "deepspeed", "transformers", "datasets", "safetensors")


@dataclasses.dataclass(frozen=True)
class Computation:
    """What a run is computed on: the device's name, the launcher, the number of ranks, and CPU threads per rank."""

    device: str
    launcher: str
    world_size: int
    threads: int


def provenance(computation: Computation, seed: int, dtype: str) -> dict[str, Any]:
    """What `results.json` records beside the scores; plain JSON values."""
    return {
        "commit": git_commit(Path(__file__).resolve().parents[2]),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "device": computation.device,
        "host": platform.node(),
        "launcher": computation.launcher,
        "job": os.environ.get("SLURM_JOB_ID"),
        "world_size": computation.world_size,
        "threads": computation.threads,
        "seed": seed,
        "dtype": dtype,
    }


def version(package: str) -> str | None:
    """Version of an installed package, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def git_commit(folder: Path) -> str | None:
    """Commit of a checkout, with "-dirty" after it where tracked files differ; None outside of git."""
    if not (folder / ".git").exists():
        return None
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"],
            capture_output=True, text=True, timeout=30, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
