"""`hdscale bench NAME`: measure speed and memory."""

from __future__ import annotations

import argparse
import importlib

from hdscale.bench import options
from hdscale.commands.arguments import add_options, read_options
from hdscale.errors import EXIT_DONE

BENCHES = {
    "step": (options.StepOptions, "training steps against the released code, a plain adapter and full fine-tuning"),
    "decode": (options.DecodeOptions, "decoding and evaluation against the released code"),
    "data": (options.DataOptions, "how fast batches are made, and how much of them is padding"),
    "scaling": (options.ScalingOptions, "1 and 2 ranks here, bytes communicated, and what they predict"),
    "memory": (options.MemoryOptions, "the plan's memory against measured peaks"),
    "curves": (options.CurvesOptions, "losses of a fast run against a plain one"),
    "op": (options.OpOptions, "the generated-adapter operator against matmul + bmm"),
}
"""Options and help of each benchmark, which is `run(options)` of the module of that name in `hdscale.bench`."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One sub-verb for each benchmark."""
    names = parser.add_subparsers(dest="bench", metavar="NAME", required=True)
    for name, (kind, help_line) in BENCHES.items():
        add_options(names.add_parser(name, help=help_line, description=help_line), kind)


def run(args: argparse.Namespace) -> int:
    """Measure, and print the table."""
    kind: type[options.ReportOptions] = BENCHES[args.bench][0]
    # one benchmark's imports are not another's
    importlib.import_module(f"hdscale.bench.{args.bench}").run(read_options(args, kind))
    return EXIT_DONE
