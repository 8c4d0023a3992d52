"""`hdscale doctor`: report which backends work on this machine and build the C++ and CUDA kernels."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

from hdscale.doctor.backends import Findings, examine
from hdscale.errors import EXIT_BROKEN, EXIT_DONE


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--build",
        action="store_true",
        help="build the kernels now: C++, and CUDA if a GPU is visible or if HDSCALE_FORCE_CUDA=1 (with "
        "TORCH_CUDA_ARCH_LIST) asks for it on a login node",
    )
    parser.add_argument("--rebuild", action="store_true", help="the same as --build, even if they are built already")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    findings = examine(args.build, args.rebuild)
    if args.json:
        values = asdict(findings)
        del values["build_failed"]
        print(json.dumps(values, indent=2))
    else:
        print(describe(findings))
    return EXIT_BROKEN if findings.build_failed else EXIT_DONE


def describe(findings: Findings) -> str:
    """The findings as lines of text."""
    lines = [
        f"python {findings.python}, torch {findings.torch}",
        f"GPUs: {', '.join(findings.gpus) or 'none'}",
        f"folder of compiled kernels: {findings.cache} (set by HDSCALE_CACHE)",
    ]
    lines += [f"  {name:<6}{found['state']:<10}{found['detail']}" for name, found in findings.backends.items()]
    lines.append("method.backend=auto uses:")
    lines.append(f"  on a CPU: {findings.active['cpu']}")
    lines.append(f"  on a GPU: {'(no GPU here)' if findings.active['cuda'] == 'none' else findings.active['cuda']}")
    return "\n".join(lines)
