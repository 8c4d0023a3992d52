"""Which backends can compute generated adapters on this machine, which one is used, and why not the others."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from typing import Any

import torch

from hdscale.errors import UserError
from hdscale.files import cache_folder
from hdscale.ops.backend import availability
from hdscale.ops.build import BuildError, build_kernels, cuda_architectures, find_built, forced_cuda

COMPILED = ("cpp", "cuda")


@dataclass(frozen=True)
class Findings:
    """What is known about this machine's backends.

    Attributes:
        python, torch: versions.
        gpus: names of the visible GPUs.
        cache: folder of the compiled kernels.
        backends: for each backend its `state`, a `detail` for people, and what is known of its build. The state is
            `usable`; `buildable` (at first use or by --build); `built` (for machines with a GPU); or `unusable`.
        active: for CPU and GPU the backend that `method.backend=auto` uses.
        build_failed: whether a requested build failed.
    """

    python: str
    torch: str
    gpus: list[str]
    cache: str
    backends: dict[str, dict[str, Any]]
    active: dict[str, str]
    build_failed: bool


def examine(build: bool, rebuild: bool) -> Findings:
    """Examine every backend.

    Args:
        build: build the kernels now: C++, and CUDA if a GPU is visible or HDSCALE_FORCE_CUDA=1 asks for it.
        rebuild: the same, even if they are built already.
    """
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    backends: dict[str, dict[str, Any]] = {}
    build_failed = False
    for backend in COMPILED:
        requested = (build or rebuild) and (backend == "cpp" or bool(gpus) or forced_cuda())
        backends[backend] = examine_backend(backend, requested, rebuild)
        build_failed = build_failed or (requested and "error" in backends[backend])
    backends["torch"] = {"state": "usable", "detail": "plain PyTorch, on any device"}
    compiled = {name: backends[name]["state"] in ("usable", "buildable") for name in COMPILED}
    return Findings(
        python=platform.python_version(),
        torch=torch.__version__,
        gpus=gpus,
        cache=kernel_cache(),
        backends=backends,
        active={
            "cpu": "cpp" if compiled["cpp"] else "torch",
            "cuda": "none" if not gpus else "cuda" if compiled["cuda"] else "torch",
        },
        build_failed=build_failed,
    )


def kernel_cache() -> str:
    """The folder of the compiled kernels, or why there is none."""
    try:
        return str(cache_folder() / "ops")
    except UserError as error:
        return str(error)


def examine_backend(backend: str, build: bool, rebuild: bool = False) -> dict[str, Any]:
    """A compiled backend's entry in `Findings.backends`.

    Args:
        backend: `cpp` or `cuda`.
        build: build the kernels now.
        rebuild: even if they are built already.
    """
    try:
        if build:
            build_kernels(backend, force=rebuild)
        built = find_built(backend)
    except BuildError as error:
        return {"state": "unusable", "detail": str(error), "error": str(error)}
    if backend == "cuda" and not torch.cuda.is_available():
        if built is None:
            remedy = "on a login node, build with HDSCALE_FORCE_CUDA=1 hdscale doctor --build"
            return {"state": "unusable", "detail": f"no CUDA device is visible; {remedy}"}
        target = f"built for {' '.join(cuda_architectures())}"
        return {"state": "built", "detail": f"{target}, for machines with a GPU; no CUDA device is visible"} | built
    if built is None:
        return {
            "state": "buildable",
            "detail": "not built yet: will be built at first use, or by hdscale doctor --build",
        }
    found = availability(backend)
    if not found.usable:
        return {"state": "unusable", "detail": found.reason, "error": found.reason}
    return {"state": "usable", "detail": found.reason} | built
