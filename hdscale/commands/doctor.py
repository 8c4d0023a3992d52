"""`hdscale doctor`: report which backends work on this machine, build the C++ and CUDA kernels, examine the GPUs."""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path

from hdscale.bench.report import command as command_line
from hdscale.doctor.backends import Findings, examine
from hdscale.doctor.engine import examine as examine_engine
from hdscale.doctor.gpu.examination import examine as examine_gpus
from hdscale.doctor.gpu.lines import FAILED, Line
from hdscale.doctor.gpu.report import JSON, MARKDOWN, default_folder, healthy, verdict
from hdscale.doctor.gpu.runner import Result, find_gpus, within
from hdscale.doctor.gpu.stages import STAGES, Stage, choose
from hdscale.errors import EXIT_BROKEN, EXIT_DONE, UserError

SHOWN = 8
"""Lines of stderr that are printed; the report has more."""
SECONDS_BETWEEN = 15
"""Between two lines about a stage that still runs, where they do not go to a terminal."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--build",
        action="store_true",
        help="build the kernels now: C++, and CUDA if a GPU is visible or if HDSCALE_FORCE_CUDA=1 (with "
        "TORCH_CUDA_ARCH_LIST) asks for it on a login node",
    )
    parser.add_argument("--rebuild", action="store_true", help="the same as --build, even if they are built already")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--gpu",
        action="store_true",
        help="examine the GPUs of this machine in at most ten minutes, and write a report to keep and to send",
    )
    parser.add_argument(
        "--engine",
        action="store_true",
        help="take a step under ZeRO 1, 2, 3 and offload, in bf16 and fp32, on all GPUs (without any: two processes), "
        "and compare its gradient with that of plain backward passes; about two minutes",
    )
    parser.add_argument(
        "--out", metavar="FOLDER", help="of the report of --gpu; default: here, named after the card and the date"
    )
    parser.add_argument(
        "--stages", metavar="A,B", help=f"only these stages of --gpu: {','.join(stage.name for stage in STAGES)}"
    )
    parser.add_argument(
        "--minutes", type=float, metavar="X", help="of --gpu, all stages together: their limits are scaled to it"
    )


def run(args: argparse.Namespace) -> int:
    if args.gpu:
        return run_gpu(args)
    for option in ("out", "stages", "minutes"):
        if getattr(args, option) is not None:
            raise UserError(f"--{option} belongs to --gpu: hdscale doctor --gpu --{option} {getattr(args, option)}")
    if args.engine:
        return run_engine(args.json)
    findings = examine(args.build, args.rebuild)
    if args.json:
        values = asdict(findings)
        del values["build_failed"]
        print(json.dumps(values, indent=2))
    else:
        print(describe(findings))
    return EXIT_BROKEN if findings.build_failed else EXIT_DONE


def run_gpu(args: argparse.Namespace) -> int:
    """Examine the GPUs: a line for each check, a verdict, and where the report is."""
    if args.build or args.rebuild:
        raise UserError("--gpu builds what is missing: leave --build out, or run hdscale doctor --rebuild first")
    if args.minutes is not None and not args.minutes > 0:
        raise UserError(f"--minutes={args.minutes}: must be above 0")
    stages = within(choose(args.stages), args.minutes)
    gpus = find_gpus()
    folder = Path(args.out) if args.out else default_folder(gpus[0])
    progress = Progress()
    say = progress.erase if args.json else progress.result
    results = examine_gpus(stages, gpus, folder, command_line(sys.argv[1:]), say, progress)
    if args.json:
        print((folder / JSON).read_text(), end="")
    else:
        print(verdict(results))
        print(f"report: {folder / MARKDOWN}, {folder / JSON}")
    return EXIT_DONE if healthy(results) else EXIT_BROKEN


def run_engine(as_json: bool) -> int:
    """Check the engine's gradients: a line for each ZeRO stage and number type."""

    def begin(name: str) -> None:
        print(f"{name} ...", file=sys.stderr, flush=True)

    def say(line: Line) -> None:
        if not as_json:
            print(f"{line.state}: {line.name}: {line.detail}", flush=True)

    found = examine_engine(begin, say)
    if as_json:
        print(json.dumps([asdict(line) for line in found], indent=2))
    return EXIT_BROKEN if any(line.state == FAILED for line in found) else EXIT_DONE


class Progress:
    """Says on stderr how long a stage has been running, and on stdout what came of it."""

    def __init__(self) -> None:
        self._terminal = sys.stderr.isatty()
        self._said = float("-inf")

    def __call__(self, stage: Stage, seconds: float, limit: float) -> None:
        now = time.monotonic()
        if now - self._said < (0.5 if self._terminal else SECONDS_BETWEEN):
            return
        self._said = now
        text = f"{stage.name}: {seconds:.0f} s of at most {limit:.0f} s"
        print(f"\r{text:<60}" if self._terminal else text, end="" if self._terminal else "\n", file=sys.stderr)
        sys.stderr.flush()

    def erase(self, result: Result) -> None:
        """Make room on the terminal for what comes next."""
        if self._terminal:
            print(f"\r{'':<60}\r", end="", file=sys.stderr, flush=True)
        self._said = float("-inf")

    def result(self, result: Result) -> None:
        """The lines of a stage that has ended, and its last words where something is wrong."""
        self.erase(result)
        print(f"{result.title} ({result.seconds:.0f} s)")
        for line in result.lines:
            print(f"  {line.state}: {line.name}{f': {line.detail}' if line.detail else ''}")
        for text in result.last_words[-SHOWN:]:
            print(f"    | {text}")
        sys.stdout.flush()


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
