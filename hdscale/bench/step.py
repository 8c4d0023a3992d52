"""`hdscale bench step`: training steps of hdscale, the released code, a plain adapter and full fine-tuning.

The variants alternate on the same global batches; a ratio is the median of the paired ratios.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from hdscale.bench.allocations import mark, track_cpu
from hdscale.bench.engine_step import plain_adapters
from hdscale.bench.options import StepOptions
from hdscale.bench.report import progress, publish
from hdscale.bench.rows import check_size, make_rows
from hdscale.bench.timing import device_of, matmul_peak, timed
from hdscale.bench.variants import GlobalBatch, Variant, build_variants, static_bytes
from hdscale.data.batches import Row
from hdscale.engine.settings import TrainSettings
from hdscale.errors import UserError


def run(options: StepOptions) -> None:
    """Time the variants in turns, and compare."""
    check_size(options.size)
    device = device_of(options.device)
    dtype = options.dtype or ("bf16" if device.type == "cuda" else "fp32")
    rows = make_rows(options, options.global_batch_size * options.steps, options.size)
    batches = [
        rows[start : start + options.global_batch_size] for start in range(0, len(rows), options.global_batch_size)
    ]
    variants = build_variants(
        options.size,
        dtype,
        options.micro_batch_size or options.global_batch_size,
        options.global_batch_size,
        device,
        options.variants,
        token_budget(options, device),
    )
    measured = take_turns(variants, batches, device, options.compile)
    peaks = {kind: matmul_peak(kind, device) for kind in {variant.dtype for variant in variants}}
    publish(
        f"training step, {options.size}, batch {options.global_batch_size}, {options.lengths} lengths, {device.type}",
        table(variants, measured, batches, peaks),
        options,
        device,
        mean_source_tokens=statistics.fmean(len(row.input_ids) for row in rows),
        matmul_peak_tflops={str(kind).removeprefix("torch."): round(peak / 1e12, 4) for kind, peak in peaks.items()},
        share_of_time={variant.name: rounded(share_of_parts(variant, batches[0])) for variant in variants},
    )


def token_budget(options: StepOptions, device: torch.device) -> int | None:
    """Most tokens per pass: as given, or as a training run on this device takes them; None: a number of rows."""
    if options.micro_batch_size:
        return None
    return options.tokens_per_micro_batch or TrainSettings().default_token_budget(device.type)


def take_turns(
    variants: list[Variant], batches: list[list[Row]], device: torch.device, compile: str
) -> dict[str, dict[str, Any]]:
    """{variant: seconds of each batch, loss of the first, operations, peak memory in bytes}; `compile` as in
    training."""
    measured: dict[str, dict[str, Any]] = {variant.name: {"seconds": []} for variant in variants}
    for variant in variants:
        progress(f"{variant.name}: first steps")
        # the first step pays for kernels, caches and the optimizer's state
        first = variant.prepare(batches[0])
        measured[variant.name]["flops"], measured[variant.name]["loss"] = counted(variant, first)
        compile_steps(variant, first, compile)
        variant.step(first)
        measured[variant.name]["peak"] = static_bytes(variant) + step_bytes(variant, first)
    for turn, batch in enumerate(batches, 1):
        progress(f"turn {turn} of {len(batches)}")
        for variant in variants:
            measured[variant.name]["seconds"].append(timed(partial(variant.step, variant.prepare(batch)), device))
    return measured


def compile_steps(variant: Variant, batch: GlobalBatch, choice: str) -> None:
    """Compile what training compiles, by the same rule; the released code is not compiled.

    Raises:
        UserError: if compiling was asked for and fails.
    """
    if variant.released is not None or choice == "off" or (choice == "auto" and variant.device.type == "cpu"):
        return
    once = partial(variant.step, batch)
    plain = timed(once, variant.device) if choice == "auto" else math.inf
    variant.model.base.compile_steps()
    try:
        variant.step(batch)
        if choice == "auto" and timed(once, variant.device) >= plain:
            progress(f"{variant.name}: not compiled, which is faster here")
            variant.model.base.compile_steps(on=False)
    except Exception as error:
        reason = str(error).strip().splitlines()[0]
        if choice == "on":
            raise UserError(f"--compile on: the compiler failed ({reason})") from error
        progress(f"{variant.name}: not compiled, the compiler failed ({reason})")
        variant.model.base.compile_steps(on=False)
        for parameter in (*variant.trained, *variant.masters):
            parameter.grad = None


def step_bytes(variant: Variant, batch: GlobalBatch) -> int:
    """Most bytes of tensors that a step has allocated at any moment, beside what was there before it."""
    if variant.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        variant.step(batch)
        return torch.cuda.max_memory_allocated() - before

    def work() -> None:
        with mark("step"):
            pass
        variant.step(batch)

    return track_cpu(work).peaks["step"]


def counted(variant: Variant, batch: GlobalBatch) -> tuple[int, float]:
    """(floating-point operations of a step's matrix products, its loss), counted by torch while it runs.

    The counter knows torch's own products only, so generated adapters are computed by the plain definition meanwhile.
    """
    with plain_adapters(variant.model), FlopCounterMode(display=False) as counter:
        loss = float(variant.step(batch))
    return counter.get_total_flops(), loss


def share_of_parts(variant: Variant, batch: list[Row]) -> dict[str, float]:
    """{part: share of a step's time}: encoder, decoder with head and loss, backward, optimizer."""
    spent = dict.fromkeys(("encoder_forward", "decoder_forward", "backward", "optimizer"), 0.0)
    box: dict[str, Any] = {}

    def run(part: str, function: Callable[[], Any]) -> Any:
        spent[part] += timed(lambda: box.update(value=function()), variant.device)
        return box["value"]

    def one_pass(tensors: dict[str, torch.Tensor]) -> None:
        mask, labels = tensors["attention_mask"], tensors["labels"]
        encoded = run("encoder_forward", lambda: variant.encode(tensors["input_ids"], mask))
        loss = run("decoder_forward", lambda: variant.loss_of(encoded, mask, labels))
        run("backward", loss.backward)
        variant.add_gradients()

    for tensors in variant.on_device(variant.prepare(batch)):
        one_pass(tensors)
    run("optimizer", variant.update)
    total = sum(spent.values())
    return {part: seconds / total for part, seconds in spent.items()}


def rounded(shares: dict[str, float]) -> dict[str, float]:
    """Shares with three decimals."""
    return {part: round(share, 3) for part, share in shares.items()}


def table(
    variants: list[Variant],
    measured: dict[str, dict[str, Any]],
    batches: list[list[Row]],
    peaks: dict[torch.dtype, float],
) -> list[dict[str, Any]]:
    """One row per variant; tokens are real ones, not padding.

    `times_<first>` is its time as a multiple of the first variant's; `mfu` is the share of the measured matrix-product
    peak that the step's products reach; `peak_gb` is weights, masters, moments and the most that a step needs beside
    them.
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
