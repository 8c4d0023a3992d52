"""`hdscale bench decode`: generation by hdscale, with the adapters generated once, against the released code's way.

Three comparisons on the same rows: a fixed number of tokens for mixed rows (hdscale sorts them into batches of similar
length, the released code takes them in the data's order); a fixed number of tokens for one batch; and an evaluation of
GLUE's validation sets, task by task (sorted as `hdscale evaluate` does, against the data's order). The released way
pads to the longest row, runs transformers' modules and greedy search with eager attention, and generates every adapter
again at each token. Both sides decode greedily, since the paper states beams for summaries only.
"""

from __future__ import annotations

import logging
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch

from hdscale.bench.options import DecodeOptions
from hdscale.bench.released import ReleasedModel
from hdscale.bench.report import progress, publish
from hdscale.bench.rows import EvaluationSet, check_size, evaluation_sets, make_rows
from hdscale.bench.timing import device_of, matmul_peak, timed
from hdscale.bench.variants import hyperdecoder_settings
from hdscale.data.batches import Row, collate
from hdscale.evaluation.generation import global_batches
from hdscale.modeling import build_model
from hdscale.modeling.model import AdaptedModel
from hdscale.ops.precision import DTYPES

CHECKED_TOKENS = 3
Jobs = list[tuple[list[list[Row]], int, int]]
"""What one side decodes: batches, most tokens, least tokens."""


def run(options: DecodeOptions) -> None:
    """Decode with both sides in turns, and compare."""
    check_size(options.size)
    # every model here has random weights on purpose: no warning for each
    logging.getLogger("hdscale.bases.loading").setLevel(logging.ERROR)
    device = device_of(options.device)
    mixed, sets = (
        make_rows(options, options.batch_size * options.mixed_batches, options.size),
        evaluation_sets(options, options.size, options.rows),
    )
    sides: dict[str, AdaptedModel | ReleasedModel] = {}
    for dtype in options.dtypes:
        ours = build_model(hyperdecoder_settings(options.size), DTYPES[dtype], device).eval()
        # the same weights, computed as the released code does
        theirs = ReleasedModel(
            build_model(hyperdecoder_settings(options.size, backend="torch"), DTYPES[dtype], device).eval()
        )
        sides |= {f"hdscale-{dtype}": ours, f"released-{dtype}": theirs}
        weights = ours.base.weights_per_token("encoder")
        if dtype == "fp32":
            check_same_tokens(ours, theirs, mixed[: options.batch_size], device)
    rows: list[dict[str, Any]] = []
    for name, our_jobs, their_jobs in comparisons(options, mixed, sets):
        progress(f"{name}: {options.turns} turns of {', '.join(sides)}")
        rows += compare(name, options.turns, device, sides, our_jobs, their_jobs)
    evaluated = dict(zip(("hdscale", "released"), comparisons(options, mixed, sets)[-1][1:], strict=True))
    peaks = {dtype: matmul_peak(DTYPES[dtype], device) for dtype in options.dtypes}
    publish(
        f"decoding, {options.size}, batches of {options.batch_size}, {options.lengths} lengths, {device.type}",
        rows,
        options,
        device,
        validation_rows={one.task: len(one.rows) for one in sets},
        mean_source_tokens={"whole": mean_tokens([one.rows for one in sets])}
        | {name: mean_tokens([batch for batches, *_ in jobs for batch in batches]) for name, jobs in evaluated.items()},
        padding={
            name: padding_share([batch for batches, *_ in jobs for batch in batches])
            for name, jobs in evaluated.items()
        },
        seconds_of_the_encoder_at_the_matmul_peak={
            dtype: encoder_flops(weights, evaluated["hdscale"]) / peak for dtype, peak in peaks.items()
        },
    )


def comparisons(options: DecodeOptions, mixed: list[Row], sets: list[EvaluationSet]) -> list[tuple[str, Jobs, Jobs]]:
    """(name, what hdscale decodes, what the released code decodes)."""
    size, tokens = options.batch_size, options.tokens
    one = [mixed[:size]]
    return [
        (f"{len(mixed)} mixed rows, {tokens} tokens",
         [(sorted_batches(mixed, size), tokens, tokens)], [(plain_batches(mixed, size), tokens, tokens)]),
        (f"one batch, {tokens} tokens", [(one, tokens, tokens)], [(one, tokens, tokens)]),
        ("evaluation",
         [(one_in(options.every, sorted_batches(one.rows, size)), one.most_tokens, 0) for one in sets],
         [(one_in(options.every, plain_batches(one.rows, size)), one.most_tokens, 0) for one in sets]),
    ]  # fmt: skip


def one_in(every: int, batches: list[list[Row]]) -> list[list[Row]]:
    """Every so many batches of a set, evenly spread: a sample whose time is representative of the set."""
    return batches[min(every // 2, len(batches) - 1) :: every]


def compare(
    name: str,
    turns: int,
    device: torch.device,
    sides: dict[str, AdaptedModel | ReleasedModel],
    ours: Jobs,
    theirs: Jobs,
) -> list[dict[str, Any]]:
    """One row per side; the sides alternate. `x_<side>`: rows per second against that side's, the median over turns."""

    def work(side: str) -> Callable[[], None]:
        released = side.startswith("released")
        return lambda: decode_jobs(sides[side], theirs if released else ours, device)

    for side, model in sides.items():
        batches, most, least = (theirs if side.startswith("released") else ours)[0]
        decode_jobs(model, [(batches[:1], most, least)], device)
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(turns):
        for side in sides:
            seconds[side].append(timed(work(side), device))
    others = [side for side in sides if side.startswith("released")]
    counts = {side: count_rows(theirs if side in others else ours) for side in sides}
    return [
        {
            "what": name,
            "side": side,
            "seconds": statistics.median(taken),
            "rows": counts[side],
            "rows/s": counts[side] / statistics.median(taken),
            **{
                f"x_{other}": counts[side] / counts[other] * statistics.median(
                    b / a for a, b in zip(taken, seconds[other], strict=True)
                )
                for other in others
            },
        }
        for side, taken in seconds.items()
    ]  # fmt: skip


def count_rows(jobs: Jobs) -> int:
    """Rows that are decoded."""
    return sum(len(batch) for batches, *_ in jobs for batch in batches)


def sorted_batches(rows: Sequence[Row], size: int) -> list[list[Row]]:
    """As `hdscale evaluate` forms them."""
    return [[rows[index] for index in batch] for batch in global_batches([len(row.input_ids) for row in rows], size)]


def plain_batches(rows: Sequence[Row], size: int) -> list[list[Row]]:
    """In the data's own order."""
    return [list(rows[start : start + size]) for start in range(0, len(rows), size)]


def padding_share(batches: list[list[Row]]) -> float:
    """Share of the encoder's tokens that are padding."""
    padded = sum(len(batch) * max(len(row.input_ids) for row in batch) for batch in batches)
    return 1 - sum(len(row.input_ids) for batch in batches for row in batch) / padded


def mean_tokens(batches: list[list[Row]]) -> float:
    """Source tokens of a row."""
    return statistics.fmean(len(row.input_ids) for batch in batches for row in batch)


def encoder_flops(weights: int, jobs: Jobs) -> float:
    """Operations of the base encoder's linears for the real source tokens: no way of decoding has fewer."""
    return 2.0 * weights * sum(len(row.input_ids) for batches, *_ in jobs for batch in batches for row in batch)


def decode_jobs(model: AdaptedModel | ReleasedModel, jobs: Jobs, device: torch.device) -> None:
    """Decode everything, one batch after the other."""
    for batches, most, least in jobs:
        decode_batches(model, batches, most, least, device)


@torch.inference_mode()
def decode_batches(
    model: AdaptedModel | ReleasedModel, batches: list[list[Row]], most: int, least: int, device: torch.device
) -> list[torch.Tensor]:
    """Greedy tokens of each batch."""
    found = []
    for rows in batches:
        batch = {name: tensor.to(device) for name, tensor in collate(rows, 0).items()}
        ids, mask = batch["input_ids"], batch["attention_mask"]
        found.append(model.generate(ids, mask, max_new_tokens=most, min_new_tokens=least).cpu())
    return found


def check_same_tokens(ours: AdaptedModel, theirs: ReleasedModel, rows: list[Row], device: torch.device) -> None:
    """Both ways must decode the same in float32 before either is timed."""
    a, b = (decode_batches(model, [rows], CHECKED_TOKENS, CHECKED_TOKENS, device)[0] for model in (ours, theirs))
    if not torch.equal(a, b):
        raise RuntimeError("the two ways decode different tokens: nothing was timed")
