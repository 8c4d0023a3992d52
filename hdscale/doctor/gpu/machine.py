"""What the machine is: cards, driver, versions; and whether each card computes at all."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
from pathlib import Path

import psutil
import torch

from hdscale.doctor.gpu.lines import Lines, Wrong
from hdscale.ops.architectures import OLDEST
from hdscale.runs.machine import processor_name

PACKAGES = ("torch", "triton", "deepspeed", "transformers", "datasets", "evaluate", "numpy", "safetensors", "submitit")
QUERIED = "driver_version,power.limit,clocks.max.sm,compute_mode,ecc.mode.current,memory.used,temperature.gpu"
GIB = 2**30


def examine(lines: Lines, work: Path) -> None:
    """The checks of the stage `machine`."""
    with lines.check("host") as found:
        memory = psutil.virtual_memory().total / GIB
        cores = len(os.sched_getaffinity(0))
        found.say(
            f"{processor_name()}, {cores} cores, {memory:.0f} GiB, {platform.platform()}, "
            f"load {os.getloadavg()[0]:.1f}",
            cores=cores,
            memory_gib=memory,
        )
    with lines.check("versions") as found:
        versions = {"python": platform.python_version()} | {name: version_of(name) for name in PACKAGES}
        versions |= {"cuda of torch": str(torch.version.cuda or torch.version.hip)}
        found.say(", ".join(f"{name} {version}" for name, version in versions.items()), **versions)
    with lines.check("compilers") as found:
        compilers = {name: shutil.which(name) or "none" for name in ("nvcc", os.environ.get("CXX", "c++"), "ninja")}
        found.say(", ".join(f"{name}: {path}" for name, path in compilers.items()), **compilers)
    with lines.check("NCCL") as found:
        found.say(".".join(map(str, torch.cuda.nccl.version())))
    for index in range(torch.cuda.device_count()):
        with lines.check(f"GPU {index}") as found:
            facts = card(index)
            found.say(", ".join(f"{name} {value}" for name, value in facts.items()), **facts)
            if torch.cuda.get_device_capability(index) < OLDEST and not torch.version.hip:
                found.detail += "; the compiled kernels need compute capability 8.0: PyTorch computes in their place"
        with lines.check(f"GPU {index} computes") as found:
            found.say(f"relative error of a float32 product {product_error(index):.1e}")


def card(index: int) -> dict[str, str]:
    """What torch and the driver say of a card."""
    about = torch.cuda.get_device_properties(index)
    free, total = torch.cuda.mem_get_info(index)
    facts = {
        "name": about.name,
        "compute capability": f"{about.major}.{about.minor}",
        "multiprocessors": str(about.multi_processor_count),
        "memory": f"{total / GIB:.1f} GiB",
        "free": f"{free / GIB:.1f} GiB",
    }
    command = ["nvidia-smi", f"--query-gpu={QUERIED}", "--format=csv,noheader", f"--id={about.uuid}"]
    if not command[-1].startswith("--id=GPU-"):
        command[-1] = f"--id=GPU-{about.uuid}"
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError) as error:
        return facts | {"nvidia-smi": type(error).__name__}
    values = [value.strip() for value in done.stdout.strip().split(",")]
    names = [name.replace(".", " ").replace("_", " ") for name in QUERIED.split(",")]
    return facts | (dict(zip(names, values, strict=True)) if len(values) == len(names) else {"nvidia-smi": "no answer"})


def product_error(index: int) -> float:
    """How far a small product on a card is from the CPU's.

    Raises:
        Wrong: if it is too far.
    """
    left, right = (torch.randn(512, 512, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    found = (left.to(f"cuda:{index}") @ right.to(f"cuda:{index}")).cpu()
    expected = left.double() @ right.double()
    error = float((found - expected).norm() / expected.norm())
    if not error <= 1e-3:  # TF32 has 10 bits
        raise Wrong(f"a product of two matrices is wrong by {error:.1e} of its norm")
    return error


def version_of(package: str) -> str:
    """A package's version, or "none"."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"
