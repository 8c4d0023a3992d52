"""`hdscale bench step`: training steps of this code, of the released manner, of a plain adapter and of full fine-tuning.

The contenders take turns on the same global batches; a ratio is the median over turns of the paired ratios.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from hdscale.bench.allocations import mark, track_cpu
from hdscale.bench.report import add_report_arguments, progress, publish
from hdscale.bench.rows import add_row_arguments, check_sizes, make_rows
from hdscale.bench.variants import Variant, build_variants, released_encode, static_bytes
from hdscale.data.batches import Row, collate
from hdscale.errors import UserError, nearest
from hdscale.modeling.model import AdaptedModel

VARIANTS = ("hdscale", "released-fp32", "released-bf16", "adapter", "full")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", default="t5-v1_1-small", help="built-in size of the base")
    parser.add_argument(
        "--dtype", choices=("bf16", "fp32"), default=None, help="of this code; default: fp32 on CPU, bf16 on CUDA"
    )
    parser.add_argument("--global-batch-size", type=int, default=64)
    parser.add_argument(
        "--micro-batch-size", type=int, default=16, help="of this code; the released manner takes the batch whole"
    )
    parser.add_argument(
        "--tokens-per-micro-batch",
        type=int,
        metavar="N",
        help="of this code: micro-batches of so many tokens, not rows",
    )
    parser.add_argument("--steps", type=int, default=5, help="turns")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), metavar="NAME", help=", ".join(VARIANTS))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    add_row_arguments(parser)
    add_report_arguments(parser)


def run(args: argparse.Namespace) -> int:
    check(args)
    device = torch.device(args.device)
    dtype = args.dtype or ("bf16" if device.type == "cuda" else "fp32")
    rows = make_rows(args, args.global_batch_size * args.steps)
    batches = [rows[start : start + args.global_batch_size] for start in range(0, len(rows), args.global_batch_size)]
    variants = build_variants(
        args.size,
        dtype,
        args.micro_batch_size,
        args.global_batch_size,
        device,
        args.variants,
        args.tokens_per_micro_batch,
    )
    measured = take_turns(variants, batches, device)
    peaks = {kind: matmul_peak(kind, device) for kind in {variant.dtype for variant in variants}}
    publish(
        f"training step, {args.size}, batch {args.global_batch_size}, {args.lengths} lengths, {device.type}",
        table(variants, measured, batches, peaks),
        args,
        device,
        mean_source_tokens=statistics.fmean(len(row.input_ids) for row in rows),
        matmul_peak_tflops={str(kind).removeprefix("torch."): round(peak / 1e12, 4) for kind, peak in peaks.items()},
        share_of_time={variant.name: rounded(share_of_parts(variant, batches[0], device)) for variant in variants},
    )
    return 0


def check(args: argparse.Namespace) -> None:
    """Raise UserError for sizes and names that cannot be."""
    check_sizes(args, "global_batch_size", "micro_batch_size", "steps")
    for name in args.variants:
        if name not in VARIANTS:
            raise UserError(f"--variants {name}{nearest(name, VARIANTS)}")
    if args.tokens_per_micro_batch is not None and args.tokens_per_micro_batch < 1:
        raise UserError(f"--tokens-per-micro-batch {args.tokens_per_micro_batch} must be at least 1")


def take_turns(variants: list[Variant], batches: list[list[Row]], device: torch.device) -> dict[str, dict[str, Any]]:
    """{variant: seconds of each batch, loss of the first, operations, peak memory in bytes}."""
    measured: dict[str, dict[str, Any]] = {variant.name: {"seconds": []} for variant in variants}
    for variant in variants:
        progress(f"{variant.name}: first steps")
        # the first step pays for kernels, caches and the optimizer's state
        measured[variant.name]["flops"], measured[variant.name]["loss"] = counted(variant, batches[0], device)
        variant.step(batches[0], device)
        measured[variant.name]["peak"] = static_bytes(variant) + step_bytes(variant, batches[0], device)
    for turn, batch in enumerate(batches, 1):
        progress(f"turn {turn} of {len(batches)}")
        for variant in variants:
            measured[variant.name]["seconds"].append(
                timed(lambda variant=variant, batch=batch: variant.step(batch, device), device)
            )
    return measured


def step_bytes(variant: Variant, batch: list[Row], device: torch.device) -> int:
    """Most bytes of tensors that a step has live at any moment, beside what was there before it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        variant.step(batch, device)
        return torch.cuda.max_memory_allocated() - before

    def work() -> None:
        with mark("step"):
            pass
        variant.step(batch, device)

    return track_cpu(work).peaks["step"]


def counted(variant: Variant, batch: list[Row], device: torch.device) -> tuple[int, float]:
    """(floating-point operations of a step's matrix products, its loss), counted by torch while it runs.

    The counter knows torch's own products only, so generated adapters are computed by the plain definition meanwhile.
    """
    heads = [module for module in variant.model.modules() if hasattr(module, "backend")]
    before = [module.backend for module in heads]
    for module in heads:
        module.backend = "torch"
    with FlopCounterMode(display=False) as counter:
        loss = variant.step(batch, device)
    for module, backend in zip(heads, before, strict=True):
        module.backend = backend
    return counter.get_total_flops(), loss


def matmul_peak(dtype: torch.dtype, device: torch.device, size: int = 2048) -> float:
    """Floating-point operations a second of a large matrix product, on this device and in this run."""
    size = size if device.type == "cpu" else 4 * size
    a, b = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    a @ b
    return 2 * size**3 / min(timed(lambda: a @ b, device) for _ in range(3))


def share_of_parts(variant: Variant, batch: list[Row], device: torch.device) -> dict[str, float]:
    """{part: share of a step's time}: encoder, decoder with head and loss, backward, optimizer."""
    spent = dict.fromkeys(("encoder_forward", "decoder_forward", "backward", "optimizer"), 0.0)
    box: dict[str, Any] = {}

    def run(part: str, function: Callable[[], Any]) -> Any:
        spent[part] += timed(lambda: box.update(value=function()), device)
        return box["value"]

    model = variant.model
    encode = released_encode if variant.released else AdaptedModel.encode
    for part in variant.micro_batches(batch):
        tensors = {name: tensor.to(device) for name, tensor in collate(part, 0).items()}
        mask, labels = tensors["attention_mask"], tensors["labels"]
        encoded = run("encoder_forward", lambda: encode(model, tensors["input_ids"], mask))  # noqa: B023
        logits, targets = run("decoder_forward", lambda: model.decode(encoded, mask, labels))  # noqa: B023
        loss = run("decoder_forward", lambda: F.cross_entropy(logits.float(), targets))  # noqa: B023
        run("backward", loss.backward)
    run("optimizer", variant.update)
    total = sum(spent.values())
    return {part: seconds / total for part, seconds in spent.items()}


def timed(function: Callable[[], Any], device: torch.device) -> float:
    """Seconds that a call takes, the device's work included."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def rounded(shares: dict[str, float]) -> dict[str, float]:
    """Shares with three decimals."""
    return {part: round(share, 3) for part, share in shares.items()}


def table(
    variants: list[Variant],
    measured: dict[str, dict[str, Any]],
    batches: list[list[Row]],
    peaks: dict[torch.dtype, float],
) -> list[dict[str, Any]]:
    """One row a contender; tokens are real ones, not padding.

    `times_<first>` is how many times the first one's time it takes; `mfu` is the share of the measured matrix-product peak that
    the step's products reach; `peak_gb` is weights, masters, moments and the most that a step has live beside them.
    """
    ours = measured[variants[0].name]["seconds"]
    tokens = statistics.fmean(sum(len(row.input_ids) + len(row.labels) for row in batch) for batch in batches)
    rows = []
    for variant in variants:
        seconds = measured[variant.name]["seconds"]
        middle = statistics.median(seconds)
        rows.append(
            {
                "variant": variant.name,
                "dtype": str(variant.dtype).removeprefix("torch."),
                "trainable": sum(parameter.numel() for parameter in variant.trained),
                "seconds": middle,
                "samples/s": len(batches[0]) / middle,
                "tokens/s": tokens / middle,
                f"times_{variants[0].name}": statistics.median(s / o for s, o in zip(seconds, ours, strict=True)),
                "mfu": measured[variant.name]["flops"] / middle / peaks[variant.dtype],
                "peak_gb": measured[variant.name]["peak"] / 1e9,
                "first_loss": measured[variant.name]["loss"],
            }
        )
    return rows
