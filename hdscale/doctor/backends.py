"""Which backends can compute generated adapters on this machine, which one is used, and why not the others."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from typing import Any

import torch

from hdscale.errors import UserError
from hdscale.files import cache_folder
from hdscale.ops.backend import availability
from hdscale.ops.build import Build, BuildError, build_kernels, find_builds, forced_cuda, load_kernels

COMPILED = ("cpp", "cuda")
OPERATORS_WITH_KERNELS = (
    "generated_adapter",
    "generated_adapter_backward",
    "generated_adapter_heads_backward",
)


@dataclass(frozen=True)
class Findings:
    """What is known about this machine's backends.

    Attributes:
        python, torch: versions.
        gpus: names of the visible GPUs.
        cache: folder of the compiled kernels.
        backends: for each backend its `state`, a `detail` for people, and what is known of its build. The state is
            `usable`; `buildable` (at first use or by --build); for machines with a GPU `loaded`, or `built` where this
            CPU build of torch cannot load it; or `unusable`.
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
        builds = [build_kernels(backend, force=rebuild)] if build else find_builds(backend)
    except BuildError as error:
        return {"state": "unusable", "detail": str(error), "error": str(error)}
    known = {"folder": str(builds[0].folder), "seconds": builds[0].seconds} if builds else {}
    if backend == "cuda" and not torch.cuda.is_available():
        return without_gpu(builds) | known
    if not builds:
        return {
            "state": "buildable",
            "detail": "not built yet: will be built at first use, or by hdscale doctor --build",
        }
    found = [availability(backend, device) for device in devices_of(backend)]
    failed = [one.reason for one in found if not one.usable]
    if failed:
        return {"state": "unusable", "detail": failed[0], "error": failed[0]}
    return {"state": "usable", "detail": found[0].reason} | known


def devices_of(backend: str) -> list[torch.device]:
    """The devices that a backend computes on."""
    if backend == "cpp":
        return [torch.device("cpu")]
    return [torch.device("cuda", index) for index in range(torch.cuda.device_count())]


def without_gpu(builds: list[Build]) -> dict[str, Any]:
    """The entry of the CUDA kernels where no GPU is visible. A CUDA build of torch loads them all the same."""
    if not builds:
        remedy = "on a login node, build with HDSCALE_FORCE_CUDA=1 hdscale doctor --build"
        return {"state": "unusable", "detail": f"no CUDA device is visible; {remedy}"}
    target = f"built for {' '.join(builds[0].architectures)}, for machines with a GPU; no CUDA device is visible"
    if torch.version.cuda is None:
        return {"state": "built", "detail": f"{target}; this CPU build of torch cannot load them"}
    try:
        load_kernels("cuda")
    except BuildError as error:
        return {"state": "unusable", "detail": str(error), "error": str(error)}
    if unregistered():
        reason = f"{builds[0].library} loads, but has no CUDA kernels"
        return {"state": "unusable", "detail": reason, "error": reason}
    return {"state": "loaded", "detail": target}


def unregistered() -> list[str]:
    """The operators that have no CUDA kernel in this process, once the library is loaded."""
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    return [name for name in OPERATORS_WITH_KERNELS if not has_kernel(f"hdscale::{name}", "CUDA")]
