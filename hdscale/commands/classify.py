"""`hdscale classify --run R`: classifiers on a trained run's frozen encoder (Table 7)."""

from __future__ import annotations

import argparse

from rich.console import Console
from rich.table import Table

from hdscale.analysis.classifier import Classified, classify
from hdscale.analysis.options import ClassifierOptions
from hdscale.commands.arguments import add_options, read_options
from hdscale.errors import EXIT_DONE


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    # `args.run` is the function of the verb
    parser.add_argument("--run", dest="run_folder", metavar="DIR", required=True, help="folder of a finished run")
    add_options(parser, ClassifierOptions)


def run(args: argparse.Namespace) -> int:
    """Train and evaluate the classifiers, and show their scores beside the whole model's."""
    found = classify(args.run_folder, read_options(args, ClassifierOptions))
    Console().print(score_table(found))
    print(found.path)
    return EXIT_DONE


def score_table(found: Classified) -> Table:
    """Both models' validation scores, task by task."""
    table = Table(title="validation scores")
    table.add_column("task")
    table.add_column("metric")
    table.add_column("encoder-decoder", justify="right")
    table.add_column("encoder-only", justify="right")
    for task in found.tasks:
        for metric, score in found.encoder_only[task.name].items():
            beside = found.encoder_decoder.get(task.name, {}).get(metric)
            table.add_row(task.name, metric, "" if beside is None else f"{beside:.1f}", f"{score:.1f}")
    table.add_section()
    average = found.results["encoder_decoder"]
    shown = "" if average is None else f"{average:.2f}"
    table.add_row("average", "", shown, f"{found.results['encoder_only']:.2f}")
    return table
