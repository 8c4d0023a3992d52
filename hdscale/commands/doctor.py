"""`hdscale doctor`: which backend computes generated adapters here, which could, why not, and how long builds
took."""

from __future__ import annotations

import argparse
import json
import platform

import torch

from hdscale.ops.backend import availability
from hdscale.ops.build import (
    BuildError,
    build_kernels,
    cache_folder,
    cuda_architectures,
    find_built,
    forced_cuda,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--build",
        action="store_true",
        help="build the kernels now: C++, and CUDA where a GPU is visible or HDSCALE_FORCE_CUDA=1 (with "
        "TORCH_CUDA_ARCH_LIST) asks for it on a login node",
    )
    parser.add_argument("--rebuild", action="store_true", help="as --build, even if they are built already")
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")


def run(args: argparse.Namespace) -> int:
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    findings: dict = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "gpus": gpus,
        "cache": str(cache_folder()),
        "backends": {},
    }
    failed = False
    for backend in ("cpp", "cuda"):
        wanted = backend == "cpp" or bool(gpus) or forced_cuda()
        finding = examine(backend, wanted and (args.build or args.rebuild), args.rebuild)
        failed = failed or "error" in finding and args.build | args.rebuild and wanted
        findings["backends"][backend] = finding
    findings["backends"]["torch"] = {"state": "usable", "detail": "plain PyTorch, on any device"}
    states = {name: finding["state"] for name, finding in findings["backends"].items()}
    findings["active"] = {
        "cpu": "cpp" if states["cpp"] in ("usable", "buildable") else "torch",
        "cuda": "none" if not gpus else "cuda" if states["cuda"] in ("usable", "buildable") else "torch",
    }
    print(json.dumps(findings, indent=2) if args.json else describe(findings))
    return 1 if failed else 0


def examine(backend: str, build: bool, rebuild: bool = False) -> dict:
    """State of a backend: `usable`, `buildable` (at first use, or now with --build), `built` (for other
    machines than this one), or `unusable` with the error."""
    try:
        if build:
            build_kernels(backend, force=rebuild)
        built = find_built(backend)
    except BuildError as error:
        return {"state": "unusable", "detail": str(error), "error": str(error)}
    if backend == "cuda" and not torch.cuda.is_available():
        if built is None:
            how = "on a login node build with HDSCALE_FORCE_CUDA=1 hdscale doctor --build"
            detail = f"no CUDA device is visible; {how}"
            return {"state": "unusable", "detail": detail}
        where = "for machines with a GPU; no CUDA device is visible here"
        detail = f"built for {' '.join(cuda_architectures())}, {where}"
        return {"state": "built", "detail": detail} | built
    if built is None:
        return {
            "state": "buildable",
            "detail": "not built yet: built at first use, or by hdscale doctor --build",
        }
    found = availability(backend)
    if not found.usable:
        return {"state": "unusable", "detail": found.reason, "error": found.reason}
    return {"state": "usable", "detail": found.reason} | built


def describe(findings: dict) -> str:
    """The findings in lines to read."""
    lines = [
        f"python {findings['python']}, torch {findings['torch']}",
        f"GPUs: {', '.join(findings['gpus']) or 'none'}",
        f"compiled kernels are kept in {findings['cache']} (HDSCALE_CACHE)",
    ]
    for backend, finding in findings["backends"].items():
        lines.append(f"  {backend:<6}{finding['state']:<10}{finding['detail']}")
    active = findings["active"]
    lines.append(f"method.backend=auto computes with: {active['cpu']} on CPU, {active['cuda']} on GPU")
    return "\n".join(lines)
