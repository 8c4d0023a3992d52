"""`hdscale classify --run R`: classifiers on a trained run's frozen encoder, without the decoder (Table 7)."""

from __future__ import annotations

import argparse

from rich.console import Console
from rich.table import Table

from hdscale.analysis.classifier import (
    BATCH_SIZE,
    EPOCHS,
    LEARNING_RATE,
    WARMUP_STEPS,
    ClassifierOptions,
    ClassifierScores,
    classify,
)
from hdscale.errors import EXIT_DONE, UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    # `args.run` is the function of the verb
    parser.add_argument("--run", dest="run_folder", metavar="DIR", required=True, help="folder of a finished run")
    parser.add_argument("--epochs", type=int, default=EPOCHS, help=f"default: {EPOCHS}")
    parser.add_argument("--learning-rate", type=float, default=LEARNING_RATE, help=f"default: {LEARNING_RATE:g}")
    parser.add_argument("--warmup-steps", type=int, default=WARMUP_STEPS, help=f"default: {WARMUP_STEPS}")
    parser.add_argument("--batch-size", type=int, default=BATCH_SIZE, help=f"default: {BATCH_SIZE}")
    parser.add_argument("--limit", type=int, metavar="N", help="at most N rows of each split (for trial runs)")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="of the encoder; default: a GPU where there is one")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings over the run's (data.root=...)")


def run(args: argparse.Namespace) -> int:
    """The verb."""
    for name in ("epochs", "batch_size", "limit"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1")
    scores = classify(
        ClassifierOptions(
            run=args.run_folder,
            epochs=args.epochs,
            learning_rate=args.learning_rate,
            warmup_steps=args.warmup_steps,
            batch_size=args.batch_size,
            limit=args.limit,
            seed=args.seed,
            device=args.device,
            overrides=args.overrides,
        )
    )
    print_scores(scores)
    print(scores.path)
    return EXIT_DONE


def print_scores(scores: ClassifierScores) -> None:
    """Validation scores of the whole model and of the classifiers, by task."""
    table = Table(title="validation scores")
    table.add_column("task")
    table.add_column("metric")
    table.add_column("encoder-decoder", justify="right")
    table.add_column("encoder-only", justify="right")
    for task, metrics in scores.encoder_only.items():
        for metric, score in metrics.items():
            beside = scores.encoder_decoder.get(task, {}).get(metric)
            table.add_row(task, metric, "" if beside is None else f"{beside:.1f}", f"{score:.1f}")
    table.add_section()
    beside = scores.encoder_decoder_average
    table.add_row("average", "", "" if beside is None else f"{beside:.2f}", f"{scores.encoder_only_average:.2f}")
    Console().print(table)
