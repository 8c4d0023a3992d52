"""How far the nodes' clocks are apart."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

ROUNDS = 10
MOST_SECONDS = 1.0
"""By which a clock may be off: files' times and the lines of logs are compared between nodes."""


def clock_offsets(
    rank: int, leaders: Sequence[int], clock: Callable[[], float] = time.time
) -> dict[int, tuple[float, float]]:
    """Ask the first process of each node for the time. To be called by all of them; others may call it too.

    Args:
        rank: of this process.
        leaders: the ranks that answer; the first of them asks.
        clock: this node's.

    Returns:
        On the first of the leaders, for each other one: seconds by which its clock is ahead, and the error of that,
        which is half of the shortest way there and back. Empty elsewhere.
    """
    message = torch.zeros(1, dtype=torch.float64)
    if rank in leaders[1:]:
        for _ in range(ROUNDS):
            dist.recv(message, src=leaders[0])
            dist.send(torch.tensor([clock()], dtype=torch.float64), dst=leaders[0])
    if rank != leaders[0]:
        return {}
    offsets = {}
    for other in leaders[1:]:
        rounds = []
        for _ in range(ROUNDS):
            asked = clock()
            dist.send(message, dst=other)
            dist.recv(message, src=other)
            answered = clock()
            rounds.append(((answered - asked) / 2, message.item() - (asked + answered) / 2))
        error, offset = min(rounds)
        offsets[other] = (offset, error)
    return offsets


def clock_faults(names: dict[int, str], offsets: dict[int, tuple[float, float]]) -> list[str]:
    """One line for each node whose clock is off by more than `MOST_SECONDS`.

    Args:
        names: the node of each leader; the first is compared with.
        offsets: of `clock_offsets`.
    """
    first = next(iter(names.values()))
    return [
        f"{names[rank]}: its clock is {abs(offset):.1f} s {'ahead of' if offset > 0 else 'behind'} {first}'s"
        for rank, (offset, error) in offsets.items()
        if abs(offset) - error > MOST_SECONDS
    ]
