"""`hdscale predict`: JSON lines in, JSON lines out, in the same order, in bounded memory.

The text of `{"source": "any text"}` is read as it is. With `--task`, or with a field `task`, a row has the task's
columns.
"""

from __future__ import annotations

import argparse
import functools
import time
from itertools import chain, islice

from rich.console import Console

from hdscale.data.tasks import get_task
from hdscale.errors import EXIT_DONE, UserError
from hdscale.evaluation.predictor import WINDOW, Predictor
from hdscale.evaluation.requests import BadRow, read_requests
from hdscale.evaluation.streams import check_output, open_input, open_output
from hdscale.files import json_line
from hdscale.load import Choice
from hdscale.ops.precision import DTYPES
from hdscale.runs.progress import RowProgress


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Which model to use: the same arguments for `predict` and `evaluate`."""
    # `args.run` is the function of the verb
    parser.add_argument("--run", dest="run_folder", metavar="DIR", help="folder of a finished run")
    parser.add_argument(
        "--model", metavar="DIR_OR_ID", help="an export, or a checkpoint of transformers (a folder or hub id)"
    )
    parser.add_argument("--tokenizer", metavar="DIR_OR_ID", help="default: the model's own")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: a GPU if there is one")
    parser.add_argument(
        "--dtype", choices=list(DTYPES), help="default: the run's; otherwise bf16 on a GPU, fp32 on a CPU"
    )
    parser.add_argument(
        "--unseen-task",
        choices=["mean"],
        help="mean: a task that a task-conditioned model does not know gets the mean of its task embeddings "
        "(default: an error)",
    )
    parser.add_argument("--batch-size", type=positive, metavar="N", help="rows decoded at once")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="settings that override the run's (data.root=..., eval.num_beams=4)",
    )


def choice_of(args: argparse.Namespace) -> Choice:
    """The model that the arguments of `add_model_arguments` name."""
    return Choice(args.run_folder, args.model, args.tokenizer, args.device, args.dtype)


def positive(text: str) -> int:
    """A whole number above 0, for argparse."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument(
        "--input", required=True, metavar="FILE|-", help="JSON lines (.gz is decompressed); - is standard input"
    )
    parser.add_argument("--output", required=True, metavar="FILE|-", help="JSON lines; - is standard output")
    parser.add_argument("--overwrite", action="store_true", help="replace the output file if there is one")
    parser.add_argument("--task", metavar="NAME", help="task of rows without a field `task`; default: free text")
    parser.add_argument(
        "--on-error",
        choices=["stop", "skip"],
        default="stop",
        help="what to do with rows that cannot be used (default: stop)",
    )
    parser.add_argument("--scores", action="store_true", help="also write the log-likelihood of each prediction")
    parser.add_argument(
        "--window", type=positive, default=WINDOW, metavar="N", help=f"rows in memory at once (default: {WINDOW})"
    )
    parser.add_argument("--quiet", action="store_true", help="show no progress on standard error")


def run(args: argparse.Namespace) -> int:
    choice = choice_of(args)
    choice.check()
    if choice.kind() == "extractive":
        raise UserError(
            "predict generates text; an extractive checkpoint can be evaluated: hdscale evaluate --model ..."
        )
    config = choice.config(args.overrides)
    find_task = functools.cache(lambda name: get_task(name, config.data))
    default = find_task(args.task) if args.task else None
    check_output(args.output, args.input, args.overwrite)
    console = Console(stderr=True, highlight=False)
    skipped = 0

    def report(error: BadRow) -> None:
        nonlocal skipped
        if args.on_error == "stop":
            raise error
        skipped += 1
        console.print(f"skipped {error}", markup=False, soft_wrap=True)

    started = time.monotonic()
    written = 0
    with open_input(args.input) as stream:
        requests = read_requests(stream, default, find_task, report)
        # the first window is read before the model is loaded: a file of the wrong kind fails at once
        first = list(islice(requests, args.window))
        loaded = choice.load(config)
        predictor = Predictor(
            loaded.model,
            loaded.tokenizer,
            config.eval,
            config.data,
            task_id=functools.partial(loaded.task_id, unseen=args.unseen_task),
            batch_size=args.batch_size,
            scored=args.scores,
        )
        with open_output(args.output) as out, RowProgress(not args.quiet, console) as progress:
            for answer in predictor.stream(chain(first, requests), args.window):
                out.write(json_line(answer))
                written += 1
                progress("predict", written, None)
    seconds = time.monotonic() - started
    rows = "row" if written == 1 else "rows"
    console.print(f"{written:,} {rows} predicted, {skipped:,} skipped, {seconds:.1f} s")
    return EXIT_DONE
