"""What a run measures on its machine and keeps: tokens per pass, torch.compile, the backend of generated adapters."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Sequence
from typing import Protocol, cast

import torch

from hdscale.bases.interface import Base
from hdscale.data.batches import Row, collate
from hdscale.data.micro_batches import deal, padded_tokens
from hdscale.engine.deepspeed_engine import Batch, Engine, loss_of
from hdscale.engine.settings import TrainSettings
from hdscale.errors import UserError
from hdscale.modeling.model import AdaptedModel
from hdscale.ops.backend import availability
from hdscale.runs.ranks import RankGroup
from hdscale.runs.settled import Settled

SMALLEST = 512
"""The first number of tokens per pass that is tried; each one after it is twice as large."""
TRIED_PASSES = 4
"""Micro-batches that are timed for each number of tokens, spread over all lengths."""
LEAST_GAIN = 1.05
"""More tokens per pass must be this many times faster: they need memory, and timings on a CPU are noisy."""
TIMED = 3
"""Passes that are timed, before and after compiling."""


class Log(Protocol):
    """Where these functions say what they found."""

    def info(self, text: str) -> None:
        """A line."""

    def warning(self, text: str) -> None:
        """A line that stands out."""


def fits(attempt: Callable[[int], object], size: int) -> bool:
    """Whether `attempt(size)` runs in the device's memory."""
    try:
        attempt(size)
        return True
    except torch.OutOfMemoryError:
        pass
    # outside of the handler: the error's traceback holds the tensors of the attempt
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return False


def largest_that_fits(attempt: Callable[[int], object], ranks: RankGroup, largest: int) -> int:
    """The largest of `largest`, `largest`/2, ..., 1 that fits into the memory of every rank's device. Collective.

    Args:
        attempt: does the work with this size; raises `torch.OutOfMemoryError` where it is too large.
        ranks: every rank tries, and all get the same answer.

    Returns:
        the size; 0 if not even 1 fits.
    """
    size = largest
    while size >= 1:
        if ranks.all_true(fits(attempt, size)):
            return size
        size //= 2
    return 0


def one_pass(engine: Engine, batch: Batch) -> None:
    """Forward and backward; the gradients are thrown away before anyone sees them. ZeRO stages 1 and 2."""
    engine.module.train()
    moved = {name: tensor.to(engine.ranks.device) for name, tensor in batch.items()}
    # not `backward`: it would set off DeepSpeed's reductions
    torch.autograd.grad(loss_of(engine.module(**moved)), list(engine.parameters.values()), allow_unused=True)


def seconds_of_passes(engine: Engine, batches: Sequence[Batch]) -> float:
    """Seconds of one pass over each, all ranks at once and the device's work included."""
    engine.ranks.barrier()
    synchronize(engine)
    start = time.perf_counter()
    for batch in batches:
        one_pass(engine, batch)
    synchronize(engine)
    return time.perf_counter() - start


def synchronize(engine: Engine) -> None:
    """Wait for the device."""
    if engine.ranks.device.type == "cuda":
        torch.cuda.synchronize()


def find_token_budget(
    engine: Engine, rows: Sequence[Row], pad_id: int, train: TrainSettings, longest: tuple[int, int], log: Log
) -> int:
    """The most tokens per pass at which a step over `rows` is fastest, among those that fit into memory. Collective.

    Passes are forward and backward without touching gradients, weights or optimizer.

    Args:
        engine: built, under ZeRO stage 1 or 2.
        rows: a global batch. pad_id: the tokenizer's.
        train: `train.*`.
        longest: most source and target tokens of a row.
        log: with `info(text)`.

    Returns:
        tokens of a micro-batch, padding included; the same on every rank.

    Raises:
        UserError: if not even the smallest fits.
    """
    ranks = engine.ranks
    whole = max(padded_tokens(part) for parts in deal(rows, ranks.world_size) for part in parts)
    found: list[tuple[int, float]] = []
    budget, before = SMALLEST, None
    while True:
        parts = deal(rows, ranks.world_size, train.micro_batch_size, train.sort_by_length, budget)[ranks.rank]
        if parts != before:
            if not ranks.all_true(pass_fits(engine, budget, longest)):
                break
            slowest = max(ranks.gather_objects(step_seconds(engine, parts, pad_id)))
            found.append((budget, slowest))
            log.info(f"train.tokens_per_micro_batch=auto: {budget:,} tokens, {slowest:.3g} s per step")
        before = parts
        if budget >= whole:
            break
        budget *= 2
    if not found:
        raise UserError(
            f"not even {SMALLEST} tokens fit into this device's memory; use model.activation_checkpointing=all or a "
            "smaller base"
        )
    best = found[0]
    for candidate in found[1:]:
        if candidate[1] * LEAST_GAIN < best[1]:
            best = candidate
    log.info(f"train.tokens_per_micro_batch={best[0]}, kept for this run")
    return best[0]


def pass_fits(engine: Engine, budget: int, longest: tuple[int, int]) -> bool:
    """Whether the largest pass of a budget fits in memory beside the optimizer's state; always true on a CPU."""
    device = engine.ranks.device
    if device.type != "cuda":
        return True
    source, target = longest
    row = Row([1] * source, [1] * target, 0, "longest", "")
    trainable = sum(parameter.numel() for parameter in engine.parameters.values())
    trial_batch = collate([row] * max(1, budget // (source + target)), 0)

    def attempt(size: int) -> None:
        # gradients and AdamW's two moments in fp32 come with the first update
        later = torch.empty(4 * trainable + 8 * trainable // engine.ranks.world_size, dtype=torch.uint8, device=device)
        one_pass(engine, trial_batch)
        del later

    found = fits(attempt, 1)
    gc.collect()
    torch.cuda.empty_cache()
    return found


def step_seconds(engine: Engine, parts: Sequence[list[Row]], pad_id: int) -> float:
    """Seconds of a step's passes, estimated from some of them."""
    count = min(TRIED_PASSES, len(parts))
    tried = [parts[index * (len(parts) - 1) // max(1, count - 1)] for index in range(count)]
    batches = [collate(part, pad_id) for part in tried]
    # the first pass of a shape pays for plans and caches
    one_pass(engine, batches[0])
    return seconds_of_passes(engine, batches) / count * len(parts)


def compile_for_training(engine: Engine, choice: str, sample: Sequence[Batch], settled: Settled, log: Log) -> None:
    """Compile encoder and decoder if asked to, on every rank. Collective.

    `auto` is off on a CPU, where compiling gains nothing, under ZeRO-3, and with `train.deterministic`, as measurements
    can come out differently each time; elsewhere it is on if a compiler is found and a compiled pass is the faster one.
    Later sessions of a run do what its first one did.

    Args:
        choice: `train.compile`. sample: this rank's micro-batches of a step, to compile for and to time.
        log: of the run.

    Raises:
        UserError: on every rank, if compiling was asked for and fails.
    """
    if choice == "auto" and (engine.ranks.device.type == "cpu" or engine.stage == 3 or engine.train.deterministic):
        return
    if choice == "off" or settled.values.get("compile") == "off":
        return
    middle = sample[len(sample) // 2]
    plain = timed(engine, middle)
    cast(Base, engine.module.get_submodule("base")).compile_steps()
    failure = None
    try:
        first = seconds_of_passes(engine, [sample[0], middle])
    except Exception as error:
        failure = str(error).strip().splitlines()[0]
    failures = [one for one in engine.ranks.gather_objects(failure) if one is not None]
    if failures:
        cast(Base, engine.module.get_submodule("base")).compile_steps(on=False)
        if choice == "on":
            raise UserError(f"train.compile=on: the compiler failed ({failures[0]}); use train.compile=off")
        if settled.once("compile", lambda: "off") == "on":
            log.warning(
                f"the run started compiled, but the compiler fails on this machine ({failures[0]}): losses will differ "
                "in their last bits"
            )
        else:
            log.warning(
                f"train.compile=auto: the compiler failed ({failures[0]}); "
                "this run is not compiled, now or when resumed"
            )
        return
    compiled = timed(engine, middle)
    log.info(compile_cost(plain, compiled, first, len(sample)))
    if settled.once("compile", lambda: "off" if choice == "auto" and compiled >= plain else "on") == "off":
        cast(Base, engine.module.get_submodule("base")).compile_steps(on=False)
        log.info("train.compile=auto: this run is not compiled")


def timed(engine: Engine, batch: Batch) -> float:
    """Seconds per pass; the first pass is not counted."""
    seconds_of_passes(engine, [batch])
    return seconds_of_passes(engine, [batch] * TIMED) / TIMED


def compile_cost(plain: float, compiled: float, first: float, passes: int) -> str:
    """What compiling cost and gained, in one line.

    Args:
        plain, compiled: seconds per pass. first: seconds of the first two passes, compilation included.
        passes: passes per step.
    """
    cost = max(0.0, first - 2 * compiled)
    text = (
        f"train.compile: {cost:.1f} s to compile; a forward and backward pass takes {compiled:.3g} s instead of "
        f"{plain:.3g} s"
    )
    if compiled >= plain:
        return f"{text}, so it does not pay off"
    return f"{text}, which pays off from step {math.ceil(cost / ((plain - compiled) * passes)):,} on"


def choose_backend(model: AdaptedModel, settled: Settled, log: Log) -> None:
    """Decide `method.backend=auto` in the run's first session and keep it: another backend gives other last bits."""
    if not model.generates_adapters or model.config.method.backend != "auto":
        return
    device = next(model.parameters()).device.type
    kernels = {"cpu": "cpp", "cuda": "cuda"}.get(device, "torch")
    chosen = settled.once("backend", lambda: kernels if availability(kernels).usable else "torch")
    log.info(f"backend of generated adapters: {chosen}")
    if chosen == "torch":
        model.use_backend(chosen)
    elif chosen != kernels or not availability(kernels).usable:
        log.warning(
            f"the run started with the {chosen} backend, which does not work on this machine: losses will differ in "
            "their last bits"
        )
