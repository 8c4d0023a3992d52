"""Where a result comes from: commit, versions, device, ranks, threads, seed."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from hdscale.engine.ranks import Ranks

PACKAGES = ("hdscale", "torch", "deepspeed", "transformers", "datasets", "safetensors")


def provenance(ranks: Ranks, config: Any) -> dict[str, Any]:
    """What `results.json` records beside the scores; plain JSON values."""
    return {
        "commit": git_commit(Path(__file__).resolve().parents[2]),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "device": device_name(ranks.device),
        "host": platform.node(),
        "launcher": ranks.launcher,
        "job": os.environ.get("SLURM_JOB_ID"),
        "world_size": ranks.world_size,
        "threads": ranks.threads,
        "seed": config.run.seed,
        "dtype": config.train.dtype,
    }


def version(package: str) -> str | None:
    """Version of an installed package, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


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
