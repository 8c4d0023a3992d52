"""`train.tokens_per_micro_batch=auto`: how many tokens one pass should have, tried on the rows of the first step."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import Any

import torch

from hdscale.data.batches import Row, collate
from hdscale.data.micro_batches import deal, padded_tokens
from hdscale.engine.deepspeed_engine import Engine
from hdscale.engine.trial import one_pass, seconds_of_passes
from hdscale.errors import UserError

AUTO = "auto"
SMALLEST = 512
"""The budget that is tried first; each one after it is twice as large."""
TRIED_PASSES = 4
"""Micro-batches of a budget that are timed, spread over all lengths."""
WORTH = 1.05
"""A larger budget must be that many times faster: memory and, on a CPU, noise are not free."""


def parse_token_budget(value: str | None, stage: int) -> int | str | None:
    """`train.tokens_per_micro_batch` as a number, "auto", or None.

    Args:
        stage: of ZeRO.

    Raises:
        UserError: for anything else, and for "auto" under ZeRO-3, where one rank's pass is every rank's.
    """
    if value is None:
        return None
    if value == AUTO:
        if stage == 3:
            raise UserError(
                "train.tokens_per_micro_batch=auto is for ZeRO stages 1 and 2; give a number of tokens under stage 3"
            )
        return AUTO
    if not value.isdigit() or int(value) < 1:
        raise UserError(
            f"train.tokens_per_micro_batch={value}: must be a number of tokens of at least 1, auto, or null"
        )
    return int(value)


def find_token_budget(
    engine: Engine, rows: Sequence[Row], pad_id: int, train: Any, longest: tuple[int, int], log: Any
) -> int:
    """The budget at which a step over `rows` is fastest, among those whose largest pass fits into memory. Collective.

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
            if not ranks.all_true(fits(engine, budget, longest)):
                break
            slowest = max(ranks.gather_objects(step_seconds(engine, parts, pad_id)))
            found.append((budget, slowest))
            log.info(f"train.tokens_per_micro_batch=auto: {budget:,} tokens, {slowest:.3g} s a step")
        before = parts
        if budget >= whole:
            break
        budget *= 2
    if not found:
        raise UserError(
            f"not even {SMALLEST} tokens fit into this device's memory; use model.activation_checkpointing=all, or a smaller base"
        )
    best = found[0]
    for candidate in found[1:]:
        if candidate[1] * WORTH < best[1]:
            best = candidate
    log.info(f"train.tokens_per_micro_batch={best[0]}, kept for this run")
    return best[0]


def fits(engine: Engine, budget: int, longest: tuple[int, int]) -> bool:
    """Whether the largest pass that a budget allows fits beside what the optimizer will hold. A CPU is not asked."""
    device = engine.ranks.device
    if device.type != "cuda":
        return True
    source, target = longest
    row = Row([1] * source, [1] * target, 0, "longest", "")
    trainable = sum(parameter.numel() for parameter in engine.parameters.values())
    try:
        # gradients and AdamW's two moments in fp32 come with the first update
        later = torch.empty(4 * trainable + 8 * trainable // engine.ranks.world_size, dtype=torch.uint8, device=device)
        one_pass(engine, collate([row] * max(1, budget // (source + target)), 0))
        del later
        return True
    except torch.OutOfMemoryError:
        return False
    finally:
        gc.collect()
        torch.cuda.empty_cache()


def step_seconds(engine: Engine, parts: Sequence[list[Row]], pad_id: int) -> float:
    """Seconds of a step's passes, estimated from some of them."""
    count = min(TRIED_PASSES, len(parts))
    tried = [parts[index * (len(parts) - 1) // max(1, count - 1)] for index in range(count)]
    batches = [collate(part, pad_id) for part in tried]
    # the first pass of a shape pays for plans and caches
    one_pass(engine, batches[0])
    return seconds_of_passes(engine, batches) / count * len(parts)
