"""`hdscale bench data`: how fast batches are made, how much of them is padding, and whether a step ever waits for them.

Parts are timed one by one in one thread, as the run's own thread does them; `feed` is that thread at work, several steps ahead of
a consumer that takes no time.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from hdscale.bench.report import add_report_arguments, progress, publish
from hdscale.bench.rows import add_row_arguments, check_sizes, make_rows, real_mixture
from hdscale.bench.variants import build_variants
from hdscale.data.batches import Row, collate
from hdscale.data.feed import Feed
from hdscale.data.micro_batches import deal, padded_tokens
from hdscale.data.mixture import Mixture
from hdscale.errors import UserError

SYNTHETIC_ROWS = 4096
PAD_ID = 0


class RowsInMemory:
    """Synthetic rows in the place of a tokenised set."""

    task = "synthetic"

    def __init__(self, rows: Sequence[Row]) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def row(self, index: int, task_id: int = 0) -> Row:
        return self._rows[index]._replace(task_id=task_id)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--size", default="t5-v1_1-small", help="built-in size whose training step consumes the batches"
    )
    parser.add_argument("--global-batch-size", type=int, default=128)
    parser.add_argument("--micro-batch-size", type=int, default=16)
    parser.add_argument("--tokens-per-micro-batch", type=int, default=2048)
    parser.add_argument(
        "--ranks", type=int, default=1, help="each rank mixes the global batch and collates its own share"
    )
    parser.add_argument("--batches", type=int, default=50, help="global batches that are made")
    parser.add_argument("--steps", type=int, default=2, help="training steps that are timed; 0: none")
    parser.add_argument(
        "--consume", type=float, metavar="SAMPLES", help="samples a second to compare with instead of a timed step"
    )
    add_row_arguments(parser)
    add_report_arguments(parser)


def run(args: argparse.Namespace) -> int:
    check_sizes(args, "global_batch_size", "micro_batch_size", "tokens_per_micro_batch", "batches", "ranks")
    if args.steps < 0 or (args.consume is not None and not args.consume > 0):
        raise UserError("--steps must be at least 0 and --consume above 0")
    if args.global_batch_size % args.ranks:
        raise UserError(f"--global-batch-size {args.global_batch_size} must be a multiple of --ranks {args.ranks}")
    device = torch.device("cpu")
    progress("reading rows")
    mixture = (
        real_mixture(args)
        if args.lengths == "real"
        else Mixture([RowsInMemory(make_rows(args, SYNTHETIC_ROWS))], args.seed)
    )
    progress(f"making {args.batches} batches")
    made = parts_of(mixture, args)
    consumed = args.consume
    if consumed is None and args.steps:
        progress(f"{args.steps} training steps of {args.size}")
        consumed = consumption(args, mixture.rows(0, args.global_batch_size), device)
    for row in made:
        row["times_a_step_consumes"] = row["rows/s"] / consumed if consumed else None
    publish(
        f"making batches of {args.global_batch_size} for {args.ranks} ranks, {args.lengths} lengths",
        made,
        args,
        device,
        share_of_padding=paddings(
            [mixture.rows(step, args.global_batch_size) for step in range(min(args.batches, 20))], args
        ),
        samples_a_second_that_training_consumes=consumed,
        training="given" if args.consume else f"{args.size}, fp32, {torch.get_num_threads()} threads",
    )
    return 0


def parts_of(mixture: Mixture, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows and real tokens a second of each part of making a rank's batches, of all together, and of the feed's thread."""
    size, seconds = args.global_batch_size, dict.fromkeys(("order", "fetch", "deal", "collate"), 0.0)
    mixture.places(0, size)  # an epoch's order is made once

    def clock(part: str, work: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = work()
        seconds[part] += time.perf_counter() - start
        return result

    tokens = 0
    for step in range(args.batches):
        places = clock("order", lambda: mixture.places(step, size))  # noqa: B023
        rows = clock(
            "fetch", lambda: [mixture.sets[number].row(index, mixture.task_ids[number]) for number, index in places]
        )  # noqa: B023
        parts = clock("deal", lambda: dealt(rows, args))  # noqa: B023
        clock("collate", lambda: [collate(part, PAD_ID) for part in parts])  # noqa: B023
        tokens += sum(len(row.input_ids) + len(row.labels) for row in rows)
    seconds["all"] = sum(seconds.values())
    start = time.perf_counter()
    with Feed(lambda step: mixture.rows(step, size), lambda rows: dealt(rows, args), PAD_ID, 0, args.batches) as feed:
        for _ in range(args.batches):
            feed.next()
    seconds["feed"] = time.perf_counter() - start
    return [
        {
            "part": part,
            "ms_a_batch": 1000 * taken / args.batches,
            "rows/s": args.batches * size / taken,
            "tokens/s": tokens / taken,
        }
        for part, taken in seconds.items()
    ]


def dealt(rows: list[Row], args: argparse.Namespace) -> list[list[Row]]:
    """The first rank's micro-batches."""
    return deal(rows, args.ranks, args.micro_batch_size)[0]


def paddings(batches: list[list[Row]], args: argparse.Namespace) -> dict[str, float]:
    """{how a global batch is cut: share of the tokens computed that are padding}."""
    ways = {
        "the batch whole": {"sort_by_length": False},
        f"{args.micro_batch_size} rows at random": {"micro_batch_size": args.micro_batch_size, "sort_by_length": False},
        f"{args.micro_batch_size} rows of like length": {"micro_batch_size": args.micro_batch_size},
        f"{args.tokens_per_micro_batch} tokens of like length": {"tokens_per_micro_batch": args.tokens_per_micro_batch},
    }
    real = sum(len(row.input_ids) + len(row.labels) for rows in batches for row in rows)
    return {
        name: 1
        - real
        / sum(padded_tokens(part) for rows in batches for parts in deal(rows, args.ranks, **how) for part in parts)
        for name, how in ways.items()
    }


def consumption(args: argparse.Namespace, rows: list[Row], device: torch.device) -> float:
    """Samples a second of this code's training steps in float32, here."""
    (variant,) = build_variants(args.size, "fp32", args.micro_batch_size, len(rows), device, ["hdscale"])
    variant.step(rows, device)
    taken = []
    for _ in range(args.steps):
        start = time.perf_counter()
        variant.step(rows, device)
        taken.append(time.perf_counter() - start)
    return len(rows) / statistics.median(taken)
