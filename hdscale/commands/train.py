"""`hdscale train`, and `deepspeed hdscale/train.py`: the arguments of a training run."""

from __future__ import annotations

import argparse

from hdscale.commands.arguments import Parser, add_config_arguments
from hdscale.errors import guarded
from hdscale.requirements import require


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What a training run takes."""
    add_config_arguments(parser)
    parser.add_argument("--fresh", action="store_true", help="start anew; an earlier run of this name is moved aside")
    # the deepspeed launcher passes it; the environment says the same
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)


def run(args: argparse.Namespace) -> int:
    """Train as one rank; its exit code."""
    require("torch", "transformers", "deepspeed")
    # not before the versions are checked
    from hdscale import train

    return train.run(args.config, args.overrides, args.fresh)


def main() -> int:
    """For `deepspeed hdscale/train.py` and `srun python hdscale/train.py`."""
    return guarded(parse_and_run)


def parse_and_run() -> int:
    """The exit code; what is wrong with the arguments or the libraries is raised."""
    parser = Parser(prog="train.py", description="Train, evaluate and test a model.")
    add_arguments(parser)
    return run(parser.parse_args())
