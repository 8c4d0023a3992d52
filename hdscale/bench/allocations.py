"""Bytes that PyTorch allocates: the peak of a piece of work, from the allocator itself.

On a GPU the caching allocator counts. On a CPU nothing does, but PyTorch's profiler is told of every allocation and
every release of the CPU allocator (tensors, gradients, temporaries inside operators, DeepSpeed's buffers); their
running sum is what is live. Not seen: the interpreter, libraries, oneDNN's scratch memory, files mapped into memory.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch

MARK = "hdscale:mark:"


@dataclass
class Allocations:
    """What was live over time.

    Attributes:
        live: {mark: bytes live when it was passed}.
        peaks: {mark: most bytes live from it to the next mark}.
    """

    live: dict[str, int] = field(default_factory=dict)
    peaks: dict[str, int] = field(default_factory=dict)


def mark(name: str) -> AbstractContextManager:
    """Begin a phase, inside `track_cpu`: `with mark("step"): pass`."""
    return torch.profiler.record_function(MARK + name)


def track_cpu(work: Callable[[], None]) -> Allocations:
    """Run `work`, which passes marks, and add up the CPU allocator's events."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as profiler:
        work()
    events: list[tuple[int, str, int]] = []
    for event in profiler.profiler.kineto_results.events():
        name = event.name()
        if name == "[memory]":
            events.append((event.start_ns(), "", event.nbytes()))
        elif name.startswith(MARK):
            events.append((event.start_ns(), name.removeprefix(MARK), 0))
    events.sort(key=lambda one: one[0])
    found = Allocations()
    live, phase = 0, ""
    for _, name, size in events:
        if name:
            phase = name
            found.live[phase] = found.peaks[phase] = live
            continue
        live += size
        if phase:
            found.peaks[phase] = max(found.peaks[phase], live)
    return found
