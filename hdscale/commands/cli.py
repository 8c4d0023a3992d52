"""`hdscale VERB`: the table of verbs. A verb is a module with `add_arguments(parser)` and `run(args) -> exit code`."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from hdscale.commands.arguments import Parser
from hdscale.errors import guarded

VERBS: dict[str, tuple[str, str]] = {
    "prepare": ("hdscale.commands.prepare", "fetch data, tokenizer and weights into a folder for offline machines"),
    "train": ("hdscale.commands.train", "train, evaluate and test a model (one process, or a rank under SLURM)"),
    "evaluate": (
        "hdscale.commands.evaluate",
        "evaluate a run, an export or any seq2seq or extractive-QA checkpoint",
    ),
    "predict": ("hdscale.commands.predict", "predict for JSON lines: any task, or free text"),
    "params": ("hdscale.commands.params", "count parameters by part, and the trainable share"),
    "convert": ("hdscale.commands.convert", "convert a checkpoint of the released implementation to an export"),
    "launch": ("hdscale.commands.launch", "submit a run or a sweep to SLURM; status, logs, cancel"),
    "plan": ("hdscale.commands.plan", "memory, time and communication of a run, before it costs anything"),
    "study": ("hdscale.commands.study", "run a scaling study, resume it, report it"),
    "analyze": ("hdscale.commands.analyze", "embeddings as pictures, comparisons over seeds, the paper's tables"),
    "classify": ("hdscale.commands.classify", "classifiers on a trained run's frozen encoder (Table 7)"),
    "doctor": (
        "hdscale.commands.doctor",
        "report which backends work on this machine, and build the C++ and CUDA kernels",
    ),
    "bench": ("hdscale.commands.bench", "measure speed and memory"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the console script."""
    return guarded(parse_and_run, list(sys.argv[1:] if argv is None else argv))


def parse_and_run(argv: list[str]) -> int:
    """A verb's exit code; what is wrong with its arguments or its libraries is raised."""
    args = parse(argv)
    return int(args.run(args))


def parse(argv: list[str]) -> argparse.Namespace:
    """The arguments of a command line; `run` is the verb's function."""
    parser = Parser(prog="hdscale", description="Train hyperdecoders at cluster scale.")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    wanted = argv[0] if argv else None
    for name, (module_name, help_line) in VERBS.items():
        sub = verbs.add_parser(name, help=help_line, description=help_line)
        if name == wanted:
            # only for a verb that is run: `hdscale --help` waits neither for metadata of libraries nor for torch
            from hdscale.requirements import require

            require("torch", "transformers")
            module = importlib.import_module(module_name)
            module.add_arguments(sub)
            sub.set_defaults(run=module.run)
    return parser.parse_args(argv)
