"""`hdscale bench data`: how fast batches are made, how much of them is padding, and whether a step ever waits for them.

Parts are timed one by one in one thread, as the run's own thread does them; `feed` is that thread at work, several
steps ahead of a consumer that takes no time.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any, cast

import torch

from hdscale.bench.options import DataOptions
from hdscale.bench.report import progress, publish
from hdscale.bench.rows import check_size, make_rows, real_mixture
from hdscale.bench.variants import build_variants
from hdscale.data.batches import Row, collate
from hdscale.data.feed import Feed
from hdscale.data.micro_batches import deal, padded_tokens
from hdscale.data.mixture import Mixture

SYNTHETIC_ROWS = 4096
PAD_ID = 0


class RowsInMemory:
    """Synthetic rows in place of a tokenised set."""

    task = "synthetic"

    def __init__(self, rows: Sequence[Row]) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def row(self, index: int, task_id: int = 0) -> Row:
        return self._rows[index]._replace(task_id=task_id)


def run(options: DataOptions) -> None:
    """Make batches, time each part, and compare with what a training step consumes."""
    check_size(options.size)
    device = torch.device("cpu")
    progress("reading rows")
    mixture = (
        real_mixture(options)
        if options.lengths == "real"
        else Mixture(cast(Any, [RowsInMemory(make_rows(options, SYNTHETIC_ROWS, options.size))]), options.seed)
    )
    progress(f"making {options.batches} batches")
    made = parts_of(mixture, options)
    consumed = options.consume
    if consumed is None and options.steps:
        progress(f"{options.steps} training steps of {options.size}")
        consumed = consumption(options, mixture.rows(0, options.global_batch_size), device)
    for row in made:
        row["times_what_a_step_consumes"] = row["rows/s"] / consumed if consumed else None
    publish(
        f"making batches of {options.global_batch_size} for {options.ranks} ranks, {options.lengths} lengths",
        made,
        options,
        device,
        share_of_padding=paddings(
            [mixture.rows(step, options.global_batch_size) for step in range(min(options.batches, 20))], options
        ),
        samples_per_second_that_training_consumes=consumed,
        training="given" if options.consume else f"{options.size}, fp32, {torch.get_num_threads()} threads",
    )


class Clock:
    """Adds the time since the last lap to a part of `seconds`."""

    def __init__(self, seconds: dict[str, float]) -> None:
        self._seconds, self._last = seconds, time.perf_counter()

    def lap(self, part: str) -> None:
        now = time.perf_counter()
        self._seconds[part] += now - self._last
        self._last = now


def parts_of(mixture: Mixture, options: DataOptions) -> list[dict[str, Any]]:
    """Rows and real tokens per second of each part of making a rank's batches, of all parts, and of the feed."""
    size, seconds = options.global_batch_size, dict.fromkeys(("order", "fetch", "deal", "collate"), 0.0)
    mixture.places(0, size)  # an epoch's order is made once

    tokens = 0
    for step in range(options.batches):
        clock = Clock(seconds)
        places = mixture.places(step, size)
        clock.lap("order")
        rows = [mixture.sets[number].row(index, mixture.task_ids[number]) for number, index in places]
        clock.lap("fetch")
        parts = dealt(rows, options)
        clock.lap("deal")
        for part in parts:
            collate(part, PAD_ID)
        clock.lap("collate")
        tokens += sum(len(row.input_ids) + len(row.labels) for row in rows)
    seconds["all"] = sum(seconds.values())
    start = time.perf_counter()
    with Feed(
        lambda step: mixture.rows(step, size), lambda rows: dealt(rows, options), PAD_ID, 0, options.batches
    ) as feed:
        for _ in range(options.batches):
            feed.next()
    seconds["feed"] = time.perf_counter() - start
    return [
        {
            "part": part,
            "ms_per_batch": 1000 * taken / options.batches,
            "rows/s": options.batches * size / taken,
            "tokens/s": tokens / taken,
        }
        for part, taken in seconds.items()
    ]


def dealt(rows: list[Row], options: DataOptions) -> list[list[Row]]:
    """The first rank's micro-batches."""
    return deal(rows, options.ranks, options.micro_batch_size)[0]


def paddings(batches: list[list[Row]], options: DataOptions) -> dict[str, float]:
    """{how a global batch is cut: share of the tokens computed that are padding}."""
    ways: dict[str, dict[str, Any]] = {
        "the batch whole": {"sort_by_length": False},
        f"{options.micro_batch_size} rows at random": {
            "micro_batch_size": options.micro_batch_size,
            "sort_by_length": False,
        },
        f"{options.micro_batch_size} rows of similar length": {"micro_batch_size": options.micro_batch_size},
        f"{options.tokens_per_micro_batch} tokens of similar length": {
            "tokens_per_micro_batch": options.tokens_per_micro_batch
        },
    }
    real = sum(len(row.input_ids) + len(row.labels) for rows in batches for row in rows)
    return {
        name: 1
        - real
        / sum(padded_tokens(part) for rows in batches for parts in deal(rows, options.ranks, **how) for part in parts)
        for name, how in ways.items()
    }


def consumption(options: DataOptions, rows: list[Row], device: torch.device) -> float:
    """Samples per second of hdscale's training steps in float32, on this machine."""
    (variant,) = build_variants(options.size, "fp32", options.micro_batch_size, len(rows), device, ["hdscale"])
    batch = variant.prepare(rows)
    variant.step(batch)
    taken = []
    for _ in range(options.steps):
        start = time.perf_counter()
        variant.step(batch)
        taken.append(time.perf_counter() - start)
    return len(rows) / statistics.median(taken)
