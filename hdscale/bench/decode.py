"""`hdscale bench decode`: generation with the adapters generated once, against the released manner.

Two comparisons: a fixed number of tokens for one batch, and a whole evaluation of label rows (length-sorted batches here, batches in
the data's order there). The released manner runs transformers' greedy search with eager attention and generates every adapter anew at
each token.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from typing import Any

import torch
from transformers.modeling_outputs import BaseModelOutput

from hdscale.bench.report import add_report_arguments, publish
from hdscale.bench.rows import LABEL_TOKENS, add_row_arguments, make_rows
from hdscale.bench.step import timed
from hdscale.bench.variants import DTYPES, hyperdecoder_settings
from hdscale.data.batches import Row, collate
from hdscale.errors import UserError, nearest
from hdscale.evaluation.decode import global_batches
from hdscale.modeling import build_model
from hdscale.modeling.base import BUILT_IN
from hdscale.modeling.model import AdaptedModel


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", default="t5-v1_1-small", help="built-in size of the base")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default=None, help="default: fp32 on CPU, bf16 on CUDA")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=16, help="new tokens of each row of the batch")
    parser.add_argument("--rows", type=int, default=256, help="rows of the evaluation")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    add_row_arguments(parser)
    add_report_arguments(parser)


def run(args: argparse.Namespace) -> int:
    if args.size not in BUILT_IN:
        raise UserError(f"--size {args.size}{nearest(args.size, BUILT_IN)}")
    for key in ("batch_size", "tokens", "rows", "turns"):
        if getattr(args, key) < 1:
            raise UserError(f"--{key.replace('_', '-')} {getattr(args, key)} must be at least 1")
    device = torch.device(args.device)
    dtype = DTYPES[args.dtype or ("bf16" if device.type == "cuda" else "fp32")]
    rows = make_rows(args, args.rows)
    ours = build_model(hyperdecoder_settings(args.size), dtype, device).eval()
    # the very same weights, in the released manner
    theirs = build_model(hyperdecoder_settings(args.size, attention="eager", backend="torch"), dtype, device).eval()
    check_same_tokens(ours, theirs, rows[: args.batch_size], device)
    measured = [
        compare(f"one batch of {args.batch_size}, {args.tokens} tokens", args.turns, device,
                lambda: decode_batches(ours, [rows[: args.batch_size]], args.tokens, args.tokens, device, released=False),
                lambda: decode_batches(theirs, [rows[: args.batch_size]], args.tokens, args.tokens, device, released=True)),
        compare(f"evaluation of {len(rows)} label rows", args.turns, device,
                lambda: decode_batches(ours, sorted_batches(rows, args.batch_size), LABEL_TOKENS, 0, device, released=False),
                lambda: decode_batches(theirs, plain_batches(rows, args.batch_size), LABEL_TOKENS, 0, device, released=True)),
    ]  # fmt: skip
    publish(f"decoding, {args.size}, {args.lengths} lengths, {device.type}", measured, args, device)
    return 0


def compare(name: str, turns: int, device: torch.device, ours: Any, theirs: Any) -> dict[str, Any]:
    """Both in turns; the ratio is the median of the paired ones."""
    ours(), theirs()
    pairs = [(timed(ours, device), timed(theirs, device)) for _ in range(turns)]
    return {
        "what": name,
        "hdscale_seconds": statistics.median(a for a, _ in pairs),
        "released_seconds": statistics.median(b for _, b in pairs),
        "times_faster": statistics.median(b / a for a, b in pairs),
    }


def sorted_batches(rows: Sequence[Row], size: int) -> list[list[Row]]:
    """As `hdscale evaluate` forms them."""
    return [[rows[index] for index in batch] for batch in global_batches([len(row.input_ids) for row in rows], size)]


def plain_batches(rows: Sequence[Row], size: int) -> list[list[Row]]:
    """In the data's own order."""
    return [list(rows[start : start + size]) for start in range(0, len(rows), size)]


@torch.no_grad()
def decode_batches(
    model: AdaptedModel, batches: list[list[Row]], most: int, least: int, device: torch.device, released: bool
) -> list[torch.Tensor]:
    """Greedy tokens of each batch."""
    found = []
    for rows in batches:
        batch = {name: tensor.to(device) for name, tensor in collate(rows, 0).items()}
        ids, mask = batch["input_ids"], batch["attention_mask"]
        if not released:
            found.append(model.generate(ids, mask, max_new_tokens=most, min_new_tokens=least))
            continue
        encoded = model.encode(ids, mask)
        found.append(
            model.base.generate(
                encoder_outputs=BaseModelOutput(last_hidden_state=encoded.hidden),
                attention_mask=mask,
                # not `for_generation()`: the heads run again at each token
                adaptation=encoded.adaptation,
                max_new_tokens=most,
                min_new_tokens=least,
                do_sample=False,
            )
        )
    return found


def check_same_tokens(ours: AdaptedModel, theirs: AdaptedModel, rows: list[Row], device: torch.device) -> None:
    """Both ways must decode the same before either is timed (in float32; in bf16 ties may fall apart)."""
    a, b = (
        decode_batches(model, [rows], LABEL_TOKENS, LABEL_TOKENS, device, released)[0]
        for model, released in ((ours, False), (theirs, True))
    )
    if next(ours.parameters()).dtype == torch.float32 and not torch.equal(a, b):
        raise RuntimeError("the two ways decode different tokens: nothing was timed")
