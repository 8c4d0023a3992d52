"""`hdscale predict`: JSON lines in, JSON lines out, in order, in bounded memory.

Rows are read a window at a time; inside a window they are sorted by length and decoded in batches, and
written in the order in which they came. `{"source": "any text"}` is read as it is; with `--task` or a field
`task`, a row has the task's columns. The question and context of an MRQA task are cut into chunks, and the
likeliest answer is kept (Section 3.1.2).
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import sys
import time
from collections.abc import Callable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any

import torch
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

from hdscale.config import Config
from hdscale.data.batches import Row
from hdscale.data.tasks import Task, get_task
from hdscale.errors import EXIT_DONE, UserError
from hdscale.evaluation.decode import Decoder, Decoding, Prediction, dumps
from hdscale.evaluation.evaluate import CPU_BATCH_SIZE, task_decoding
from hdscale.evaluation.mrqa_protocol import best_chunk
from hdscale.evaluation.requests import BadRow, Request, open_input, read_requests, tokenize_requests
from hdscale.load import DTYPES, Choice, Loaded

WINDOW = 4096
"""Rows in memory at once: enough that batches inside are of like length."""
GPU_BATCH_SIZE = 128


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """The model to use, the same for `predict` and `evaluate`."""
    # `args.run` is the function of the verb
    parser.add_argument("--run", dest="run_folder", metavar="DIR", help="folder of a finished run")
    parser.add_argument("--model", metavar="DIR_OR_ID", help="export, or checkpoint folder or hub id of transformers")
    parser.add_argument("--tokenizer", metavar="DIR_OR_ID", help="default: the model's own")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: a GPU where there is one")
    parser.add_argument("--dtype", choices=list(DTYPES), help="default: the run's; else bf16 on a GPU, fp32 on a CPU")
    parser.add_argument("--batch-size", type=positive, metavar="N", help="rows decoded at once")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="settings over the run's (data.root=..., eval.num_beams=4)",
    )


def choice_of(args: argparse.Namespace) -> Choice:
    """What `add_model_arguments` read."""
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
        "--input", required=True, metavar="FILE|-", help="JSON lines (.gz is unpacked); - is standard input"
    )
    parser.add_argument("--output", required=True, metavar="FILE|-", help="JSON lines; - is standard output")
    parser.add_argument("--task", metavar="NAME", help="task of rows without a field `task`; default: free text")
    parser.add_argument(
        "--on-error",
        choices=["stop", "skip"],
        default="stop",
        help="rows that cannot be used (default: stop)",
    )
    parser.add_argument("--scores", action="store_true", help="also write the log-likelihood of each prediction")
    parser.add_argument(
        "--window", type=positive, default=WINDOW, metavar="N", help=f"rows in memory at once ({WINDOW})"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress on standard error")


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
    check_output(args.output, args.input)
    console = Console(stderr=True, highlight=False)
    skipped = 0

    def report(error: BadRow) -> None:
        nonlocal skipped
        if args.on_error == "stop":
            raise error
        skipped += 1
        console.print(f"skipped {error}", markup=False, soft_wrap=True)

    started = time.monotonic()
    with open_input(args.input) as stream:
        requests = read_requests(stream, default, find_task, report)
        # the first window is read before the model is: a file of the wrong kind costs nothing
        first = list(islice(requests, args.window))
        loaded = choice.load(config)
        predictor = Predictor(loaded, config, args.batch_size, scored=args.scores)
        written = 0
        with writing(args.output) as out, progress_bar(console, args.quiet) as advance:
            for answer in predictor.stream(chain(first, requests), args.window):
                out.write(dumps(answer))
                written += 1
                advance(1)
    seconds = time.monotonic() - started
    console.print(f"{written:,} rows predicted, {skipped:,} skipped, {seconds:.1f} s")
    return EXIT_DONE


class Predictor:
    """Decodes requests with a loaded model.

    Args:
        loaded: the model.
        config: lengths and beams (`data.*`, `eval.*`).
        batch_size: rows at once; default: `eval.batch_size`, else by device. Halved where memory does not
            suffice.
        scored: also return log-likelihoods.
    """

    def __init__(self, loaded: Loaded, config: Config, batch_size: int | None = None, scored: bool = False) -> None:
        self.loaded, self.config, self.scored = loaded, config, scored
        device = next(loaded.model.parameters()).device
        default = GPU_BATCH_SIZE if device.type == "cuda" else CPU_BATCH_SIZE
        self.batch_size = batch_size or config.eval.batch_size or default

    def stream(self, requests: Iterator[Request], window: int) -> Iterator[dict[str, Any]]:
        """The output rows of all requests, in order, `window` of them in memory at once."""
        while group := list(islice(requests, window)):
            yield from self.answer(group)

    def answer(self, requests: list[Request]) -> list[dict[str, Any]]:
        """The output rows of some requests: `line`, `id` (where the row has one), `prediction`, `score`
        (where asked for).
        """
        tokenize_requests(requests, self.loaded.tokenizer, self.config.data)
        pieces = [(number, ids) for number, request in enumerate(requests) for ids in request.pieces]
        groups: dict[tuple[Any, ...], list[int]] = {}
        for place, (number, _) in enumerate(pieces):
            request = requests[number]
            groups.setdefault((self.decoding(request.task), request.chunked, self.task_id(request.task)), []).append(
                place
            )
        found: list[Prediction | None] = [None] * len(pieces)
        for (decoding, chunked, task_id), places in groups.items():
            decoder = Decoder(
                self.loaded.model,
                self.loaded.tokenizer,
                decoding,
                scored=chunked or self.scored,
                task_id=task_id,
            )
            places.sort(key=lambda place: (-len(pieces[place][1]), place))
            start = 0
            while start < len(places):
                batch = places[start : start + self.batch_size]
                try:
                    rows = [Row(pieces[place][1], [], task_id or 0, "", "") for place in batch]
                    for prediction in decoder(rows, batch):
                        found[prediction.row] = prediction
                    start += len(batch)
                except torch.OutOfMemoryError as error:
                    self.shrink(error)
        by_request: list[list[Prediction]] = [[] for _ in requests]
        for (number, _), prediction in zip(pieces, found, strict=True):
            assert prediction is not None  # every piece is in one batch
            by_request[number].append(prediction)
        return [self.output(request, parts) for request, parts in zip(requests, by_request, strict=True)]

    def shrink(self, error: BaseException) -> None:
        """Halve the batches; give up where a single row is too much."""
        if self.batch_size == 1:
            raise UserError(
                "not one row can be decoded in this device's memory; lower data.max_source_length"
            ) from error
        self.batch_size = max(1, self.batch_size // 2)
        torch.cuda.empty_cache()

    def decoding(self, task: Task | None) -> Decoding:
        """How a task's rows are decoded; free text by `data.max_target_length` and `eval.num_beams`."""
        if task is None:
            return Decoding(self.config.data.max_target_length, self.config.eval.num_beams)
        return task_decoding(task, self.loaded.tokenizer, self.config.eval, self.config.data.max_target_length)

    def task_id(self, task: Task | None) -> int | None:
        """The task's id in the model; -1 for free text and for a task that it was not trained on."""
        if not self.loaded.task_ids:
            return None
        return -1 if task is None else self.loaded.task_ids.get(task.name, -1)

    def output(self, request: Request, parts: list[Prediction]) -> dict[str, Any]:
        """One output row; the answers of a question's chunks become one."""
        best = parts[0]
        if request.chunked:
            records = [{"prediction": part.text, "score": part.score, "tokens": part.tokens} for part in parts]
            chosen = best_chunk(records, mean=self.config.eval.mrqa_score == "mean")
            best = dataclasses.replace(parts[chosen or 0], text="" if chosen is None else parts[chosen].text.strip())
        row: dict[str, Any] = {"line": request.line}
        if request.id is not None:
            row["id"] = request.id
        row["prediction"] = best.text
        if self.scored:
            row["score"] = best.score
        return row


def check_output(output: str, source: str) -> None:
    """Raise UserError if the output cannot be written, before anything is computed."""
    if output == "-":
        return
    path = Path(output)
    if path.is_dir() or not path.parent.is_dir():
        raise UserError(f"--output {output}: {'is a folder' if path.is_dir() else f'no folder {path.parent}'}")
    if source != "-" and path.resolve() == Path(source).resolve():
        raise UserError(f"--output {output}: is the input too; give another name")
    try:
        with partial_path(path).open("a"):
            pass
        partial_path(path).unlink()
    except OSError as error:
        raise UserError(f"--output {output}: cannot be written ({error.strerror})") from error


def partial_path(path: Path) -> Path:
    """Where predictions go until all are there."""
    return path.with_name(path.name + ".partial")


@contextlib.contextmanager
def writing(output: str) -> Iterator[IO[str]]:
    """A stream for the predictions; a file gets its name when all are in it, and is `NAME.partial` until
    then.
    """
    if output == "-":
        yield sys.stdout
        sys.stdout.flush()
        return
    path = Path(output)
    try:
        with partial_path(path).open("w", encoding="utf-8", newline="\n") as stream:
            yield stream
    except UserError as error:
        raise UserError(f"{error} (predictions so far: {partial_path(path)})") from error
    except OSError as error:
        raise UserError(f"{partial_path(path)}: {error.strerror or error}; free some space and run again") from error
    partial_path(path).replace(path)


class RateColumn(ProgressColumn):
    """Rows a second."""

    def render(self, task: Any) -> Text:
        return Text(f"{task.speed:.0f} rows/s" if task.speed else "")


@contextlib.contextmanager
def progress_bar(console: Console, quiet: bool) -> Iterator[Callable[[int], None]]:
    """A counter of rows on standard error, where that is a terminal."""
    if quiet or not console.is_terminal:
        yield lambda rows: None
        return
    with Progress(
        TextColumn("predict"), MofNCompleteColumn(), RateColumn(), TimeElapsedColumn(), console=console
    ) as bar:
        rows = bar.add_task("predict", total=None)
        yield lambda count: bar.advance(rows, count)
