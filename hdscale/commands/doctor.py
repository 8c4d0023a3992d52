"""`hdscale doctor`: report which backends work here, build the kernels, examine the GPUs, examine several nodes."""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from hdscale.bench.report import command as command_line
from hdscale.commands.arguments import add_config_arguments
from hdscale.config import load_config
from hdscale.doctor.backends import Findings, examine
from hdscale.doctor.engine import examine as examine_engine
from hdscale.doctor.gpu.examination import examine as examine_gpus
from hdscale.doctor.gpu.lines import FAILED, Line
from hdscale.doctor.gpu.report import JSON, MARKDOWN, default_folder, healthy, verdict
from hdscale.doctor.gpu.runner import Result, find_gpus, within
from hdscale.doctor.gpu.stages import STAGES, Stage, choose
from hdscale.doctor.nodes.examination import CACHE_FOLDER, RUN_FOLDER
from hdscale.doctor.nodes.examination import examine as examine_nodes
from hdscale.doctor.nodes.report import not_ready
from hdscale.engine.environment import read_environment, set_interface
from hdscale.engine.ranks import Ranks
from hdscale.engine.rendezvous import RendezvousError
from hdscale.errors import EXIT_BROKEN, EXIT_DONE, EXIT_USER_ERROR, UserError
from hdscale.errors import report as show_error
from hdscale.files import cache_folder

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
    parser.add_argument(
        "--nodes",
        action="store_true",
        help="examine the nodes of all processes that are started together, one per GPU (sbatch slurm/doctor.sh): "
        "GPUs, versions, clocks, file system, all-reduce; --config and key=value say which folders and network",
    )
    add_config_arguments(parser, required=False)


def run(args: argparse.Namespace) -> int:
    if not args.nodes and (args.config or args.overrides):
        raise UserError(f"{args.config or args.overrides[0]} belongs to --nodes: hdscale doctor --nodes")
    if args.gpu and not args.nodes:
        return run_gpu(args)
    for option in ("out", "stages", "minutes"):
        if getattr(args, option) is not None:
            raise UserError(f"--{option} belongs to --gpu: hdscale doctor --gpu --{option} {getattr(args, option)}")
    if args.nodes:
        return run_nodes(args)
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


def run_nodes(args: argparse.Namespace) -> int:
    """One process's part in the examination of several nodes; rank 0 prints, and the verdict is the last line."""
    for option in ("gpu", "engine", "build", "rebuild"):
        if getattr(args, option):
            raise UserError(f"--nodes and --{option} are two examinations: run one after the other")
    ranks, rank = None, 0
    try:
        launch = read_environment(os.environ)
        rank = launch.rank
        config = load_config(args.config, args.overrides)
        set_interface(config.cluster.interface)
        folders = {RUN_FOLDER: Path(config.run.dir).resolve(), CACHE_FOLDER: cache_folder(config.data.cache).resolve()}
        # on the CPUs, which must work: what is wrong with a GPU is to be found, not to be stumbled over
        seconds = config.cluster.rendezvous_timeout
        ranks = Ranks.start(launch, config.run.threads, device="cpu", rendezvous_seconds=seconds)

        def say(lines: Sequence[str]) -> None:
            if lines and ranks.is_main and not args.json:
                print("\n".join(lines), flush=True)

        say(
            [str(launch)] if launch.world_size > 1 else [f"{launch} (start one per GPU, on all nodes, to compare them)"]
        )
        report = examine_nodes(ranks, folders, say, functools.partial(ended_after, show=ranks.is_main))
        say([*[f"note: {note}" for note in report.notes], report.verdict])
        if ranks.is_main and args.json:
            print(json.dumps({**asdict(report), "ready": report.ready, "verdict": report.verdict}, indent=2))
        return EXIT_DONE if report.ready else EXIT_BROKEN
    except UserError as error:
        show_error(error, show=rank == 0)
        return EXIT_USER_ERROR
    except RendezvousError as error:
        if rank == 0 or not error.shared:
            print(not_ready([str(error)]), flush=True)
        return EXIT_BROKEN
    finally:
        if ranks is not None:
            ranks.close()


@contextlib.contextmanager
def ended_after(seconds: float, what: str, show: bool) -> Iterator[None]:
    """End the process with a verdict if a block takes longer: what hangs in a driver or in a file system stays there.

    Args:
        show: print the verdict.
    """

    def leave() -> None:
        if show:
            print(not_ready([f"no answer within {seconds:.0f} s while {what}"]), flush=True)
        os._exit(EXIT_BROKEN)

    timer = threading.Timer(seconds, leave)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


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
