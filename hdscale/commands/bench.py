"""`hdscale bench NAME`: one table of benchmarks, each a module with `add_arguments(parser)` and `run(args)`."""

from __future__ import annotations

import argparse
import importlib
import sys

BENCHES: dict[str, tuple[str, str]] = {
    "step": ("hdscale.bench.step", "training steps against the released manner, a plain adapter and full fine-tuning"),
    "decode": ("hdscale.bench.decode", "decoding and evaluation against the released manner"),
    "data": ("hdscale.bench.data", "how fast batches are made, and how much of them is padding"),
    "scaling": ("hdscale.bench.scaling", "1 and 2 ranks here, bytes communicated, and what they predict"),
    "memory": ("hdscale.bench.memory", "the plan's memory against measured peaks"),
    "curves": ("hdscale.bench.curves", "losses of a fast run against a plain one"),
    "op": ("hdscale.bench.op", "the generated-adapter operator against matmul + bmm"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    names = parser.add_subparsers(dest="bench", metavar="NAME", required=True)
    for name, (module_name, help_line) in BENCHES.items():
        sub = names.add_parser(name, help=help_line, description=help_line, allow_abbrev=False)
        if name in sys.argv:
            module = importlib.import_module(module_name)
            module.add_arguments(sub)
            sub.set_defaults(run_bench=module.run)


def run(args: argparse.Namespace) -> int:
    return args.run_bench(args)
