"""`hdscale bench decode`: generation with the adapters generated once, against the released manner.

Three comparisons on the same rows: so many tokens for mixed rows (in batches of like length here, in the data's order there), so many
tokens for one and the same batch, and a whole evaluation of GLUE's validation sets, task by task (sorted batches as `hdscale evaluate`
forms them here, the data's order there). The released manner pads to the longest row, runs transformers' modules and greedy search with
eager attention, and generates every adapter anew at each token. Each side runs in its own dtypes; both decode greedily, since the release
states beams for summaries only.
"""

from __future__ import annotations

import argparse
import logging
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutput

from hdscale.bench.report import add_report_arguments, progress, publish
from hdscale.bench.rows import EvaluationSet, add_row_arguments, check_sizes, evaluation_sets, make_rows
from hdscale.bench.step import matmul_peak, timed
from hdscale.bench.variants import as_released, hyperdecoder_settings, released_encode
from hdscale.data.batches import Row, collate
from hdscale.evaluation.generation import global_batches
from hdscale.modeling import build_model
from hdscale.modeling.model import AdaptedModel
from hdscale.ops.precision import DTYPES

CHECKED_TOKENS = 3
Jobs = list[tuple[list[list[Row]], int, int]]
"""What one side decodes: batches, most tokens, least tokens."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", default="t5-v1_1-small", help="built-in size of the base")
    parser.add_argument("--dtypes", nargs="+", choices=sorted(DTYPES), default=["fp32", "bf16"], help="of both sides")
    parser.add_argument("--batch-size", type=int, default=32, help="of both sides")
    parser.add_argument("--tokens", type=int, default=16, help="new tokens of each mixed row")
    parser.add_argument("--mixed-batches", type=int, default=4, help="batches of mixed rows")
    parser.add_argument(
        "--rows", type=int, metavar="N", help="only the first rows of each validation set; default: all"
    )
    parser.add_argument(
        "--every", type=int, default=8, help="of a validation set's batches, sorted or not, one in so many is decoded"
    )
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    add_row_arguments(parser)
    add_report_arguments(parser)


def run(args: argparse.Namespace) -> int:
    check_sizes(
        args, "batch_size", "tokens", "mixed_batches", "turns", "every", *(["rows"] if args.rows is not None else [])
    )
    # random weights are what is asked for here
    logging.getLogger("hdscale.bases.base").setLevel(logging.ERROR)
    device = torch.device(args.device)
    mixed, sets = make_rows(args, args.batch_size * args.mixed_batches), evaluation_sets(args, args.rows)
    sides = {}
    for dtype in args.dtypes:
        sides[f"hdscale-{dtype}"] = build_model(hyperdecoder_settings(args.size), DTYPES[dtype], device).eval()
        # the very same weights, in the released manner
        released = build_model(
            hyperdecoder_settings(args.size, attention="eager", backend="torch"), DTYPES[dtype], device
        ).eval()
        sides[f"released-{dtype}"] = as_released(released)
        if dtype == "fp32":
            check_same_tokens(*list(sides.values())[-2:], mixed[: args.batch_size], device)
    rows = []
    for name, ours, theirs in comparisons(args, mixed, sets):
        progress(f"{name}: {args.turns} turns of {', '.join(sides)}")
        rows += compare(name, args.turns, device, sides, ours, theirs)
    evaluated = dict(zip(("hdscale", "released"), comparisons(args, mixed, sets)[-1][1:], strict=True))
    peaks = {dtype: matmul_peak(DTYPES[dtype], device) for dtype in args.dtypes}
    publish(
        f"decoding, {args.size}, batches of {args.batch_size}, {args.lengths} lengths, {device.type}",
        rows,
        args,
        device,
        validation_rows={one.task: len(one.rows) for one in sets},
        mean_source_tokens={"whole": mean_tokens([one.rows for one in sets])}
        | {name: mean_tokens([batch for batches, *_ in jobs for batch in batches]) for name, jobs in evaluated.items()},
        padding={
            name: padding_share([batch for batches, *_ in jobs for batch in batches])
            for name, jobs in evaluated.items()
        },
        seconds_of_the_encoder_at_the_matmul_peak={
            dtype: encoder_flops(sides[f"hdscale-{dtype}"], evaluated["hdscale"]) / peak
            for dtype, peak in peaks.items()
        },
    )
    return 0


def comparisons(args: argparse.Namespace, mixed: list[Row], sets: list[EvaluationSet]) -> list[tuple[str, Jobs, Jobs]]:
    """(name, what this code decodes, what the released manner decodes)."""
    size, tokens = args.batch_size, args.tokens
    one = [mixed[:size]]
    return [
        (f"{len(mixed)} mixed rows, {tokens} tokens",
         [(sorted_batches(mixed, size), tokens, tokens)], [(plain_batches(mixed, size), tokens, tokens)]),
        (f"one batch, {tokens} tokens", [(one, tokens, tokens)], [(one, tokens, tokens)]),
        ("evaluation",
         [(one_in(args.every, sorted_batches(one.rows, size)), one.most_tokens, 0) for one in sets],
         [(one_in(args.every, plain_batches(one.rows, size)), one.most_tokens, 0) for one in sets]),
    ]  # fmt: skip


def one_in(every: int, batches: list[list[Row]]) -> list[list[Row]]:
    """A whole set's batches thinned out evenly, so that a fraction of the time stands for all of it."""
    return batches[min(every // 2, len(batches) - 1) :: every]


def compare(
    name: str, turns: int, device: torch.device, sides: dict[str, AdaptedModel], ours: Jobs, theirs: Jobs
) -> list[dict[str, Any]]:
    """One row a side; all take turns. `x_<side>` is how many times as many rows a second as that side: the median over turns."""

    def work(side: str) -> Callable[[], None]:
        released = side.startswith("released")
        return lambda: decode_jobs(sides[side], theirs if released else ours, device, released)

    for side, model in sides.items():
        released = side.startswith("released")
        decode_jobs(
            model,
            [(batches[:1], *lengths) for batches, *lengths in (theirs if released else ours)][:1],
            device,
            released,
        )
    seconds = {side: [] for side in sides}
    for _ in range(turns):
        for side in sides:
            seconds[side].append(timed(work(side), device))
    released = [side for side in sides if side.startswith("released")]
    counts = {side: count_rows(theirs if side in released else ours) for side in sides}
    return [
        {
            "what": name,
            "side": side,
            "seconds": statistics.median(taken),
            "rows": counts[side],
            "rows/s": counts[side] / statistics.median(taken),
            **{
                f"x_{other}": counts[side] / counts[other] * statistics.median(b / a for a, b in zip(taken, seconds[other], strict=True))
                for other in released
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


def encoder_flops(model: AdaptedModel, jobs: Jobs) -> float:
    """Operations of the base encoder's linears for the real source tokens of what is decoded: a floor of any way to decode it."""
    weights = sum(module.weight.numel() for module in model.base.encoder.modules() if isinstance(module, nn.Linear))
    return 2.0 * weights * sum(len(row.input_ids) for batches, *_ in jobs for batch in batches for row in batch)


def decode_jobs(model: AdaptedModel, jobs: Jobs, device: torch.device, released: bool) -> None:
    """Decode everything, one batch after the other."""
    for batches, most, least in jobs:
        decode_batches(model, batches, most, least, device, released)


@torch.inference_mode()
def decode_batches(
    model: AdaptedModel, batches: list[list[Row]], most: int, least: int, device: torch.device, released: bool
) -> list[torch.Tensor]:
    """Greedy tokens of each batch."""
    found = []
    for rows in batches:
        batch = {name: tensor.to(device) for name, tensor in collate(rows, 0).items()}
        ids, mask = batch["input_ids"], batch["attention_mask"]
        if not released:
            found.append(model.generate(ids, mask, max_new_tokens=most, min_new_tokens=least).cpu())
            continue
        encoded = released_encode(model, ids, mask)
        found.append(
            model.base.generate(
                encoder_outputs=BaseModelOutput(last_hidden_state=encoded.hidden),
                attention_mask=mask,
                # not `for_generation()`: the heads run again at each token
                adaptation=encoded.adaptation,
                max_new_tokens=most,
                min_new_tokens=least,
                do_sample=False,
            ).cpu()
        )
    return found


def check_same_tokens(ours: AdaptedModel, theirs: AdaptedModel, rows: list[Row], device: torch.device) -> None:
    """Both ways must decode the same in float32 before either is timed."""
    a, b = (
        decode_batches(model, [rows], CHECKED_TOKENS, CHECKED_TOKENS, device, released)[0]
        for model, released in ((ours, False), (theirs, True))
    )
    if not torch.equal(a, b):
        raise RuntimeError("the two ways decode different tokens: nothing was timed")
