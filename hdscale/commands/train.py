"""`hdscale train`, and `deepspeed hdscale/train.py`: the arguments of a training run."""

from __future__ import annotations

import argparse

from hdscale import train
from hdscale.commands.arguments import add_config_arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What a training run takes."""
    add_config_arguments(parser)
    parser.add_argument("--fresh", action="store_true", help="start anew; an earlier run of this name is moved aside")
    # the deepspeed launcher passes it; the environment says the same
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)


def run(args: argparse.Namespace) -> int:
    """Train as one rank; its exit code."""
    return train.run(args.config, args.overrides, args.fresh)


def main() -> int:
    """For `deepspeed hdscale/train.py` and `srun python hdscale/train.py`."""
    parser = argparse.ArgumentParser(
        prog="train.py", description="Train, evaluate and test a model.", allow_abbrev=False
    )
    add_arguments(parser)
    return run(parser.parse_args())
