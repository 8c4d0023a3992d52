"""The speed of all-reduce within nodes and across them, and whether the sums are right."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist

from hdscale.errors import one_line

MIB = 2**20
GPU_SIZES = (1 * MIB, 16 * MIB, 128 * MIB, 1024 * MIB)
CPU_SIZES = (MIB // 16, 1 * MIB, 8 * MIB)
TIMEOUT = timedelta(minutes=2)
SECONDS = 0.5
"""Spent on a size, about; a size that takes longer is measured once."""
MOST_REPEATS = 20
TOO_SLOW = 5.0
"""Seconds of one all-reduce, after which larger ones are not tried."""


@dataclass
class Speed:
    """All-reduce within one group of processes.

    Attributes:
        where: the node's name, or "all nodes". processes: number of them.
        bandwidths: size in bytes to bus bandwidth in GB/s (10^9 bytes): what each link carries, so that it can be
            compared with the link's speed whatever the number of processes.
        fault: why it failed, or gave other sums.
    """

    where: str
    processes: int
    bandwidths: dict[int, float] = field(default_factory=dict)
    fault: str = ""

    @property
    def best(self) -> float:
        """The highest bandwidth of any size."""
        return max(self.bandwidths.values(), default=0.0)


def measure(groups: Mapping[str, Sequence[int]], rank: int, device: torch.device, most_bytes: float) -> Speed | None:
    """All-reduce in several groups of processes at the same time. To be called by every process.

    Args:
        groups: name of each group to its ranks; no process is in two of them.
        rank: of this process.
        device: CPU (gloo) or this process's GPU (NCCL).
        most_bytes: that may be taken for one tensor.

    Returns:
        What this process has measured in its group; a group of one has nothing to measure.
    """
    found = None
    if device.type == "cuda":
        # what fails raises after `TIMEOUT`, instead of ending the process
        os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")
    backend, sizes = ("nccl", GPU_SIZES) if device.type == "cuda" else ("gloo", CPU_SIZES)
    # each process makes all groups: torch tells them apart by how many were made before
    made = {name: dist.new_group(list(members), timeout=TIMEOUT, backend=backend) for name, members in groups.items()}
    for name, members in groups.items():
        if rank not in members:
            continue
        found = Speed(name, len(members))
        if len(members) > 1:
            try:
                fitting = [size for size in sizes if size <= most_bytes]
                run_sizes(found, fitting, members.index(rank), device, made[name])
            except RuntimeError as error:
                found.fault = one_line(error)[:300]
    return found


def run_sizes(speed: Speed, sizes: Sequence[int], index: int, device: torch.device, group: dist.ProcessGroup) -> None:
    """Measure each size, until one takes too long."""
    expected = speed.processes * (speed.processes + 1) / 2
    for size in sizes:
        tensor = torch.full((size // 4,), index + 1.0, device=device)
        seconds_of(tensor, 1, group)
        if not bool((tensor == expected).all()):
            speed.fault = f"a sum over {speed.processes} processes is wrong"
            return
        once = agreed(seconds_of(tensor.zero_(), 1, group), device, group)
        repeats = max(1, min(MOST_REPEATS, int(SECONDS / once)))
        seconds = agreed(seconds_of(tensor, repeats, group) / repeats, device, group)
        speed.bandwidths[size] = 2 * (speed.processes - 1) / speed.processes * size / seconds / 1e9
        if seconds > TOO_SLOW:
            return


def seconds_of(tensor: torch.Tensor, repeats: int, group: dist.ProcessGroup) -> float:
    """The time of some all-reduces."""
    if tensor.is_cuda:
        torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(repeats):
        dist.all_reduce(tensor, group=group)
    if tensor.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - began


def agreed(seconds: float, device: torch.device, group: dist.ProcessGroup) -> float:
    """The longest time of any process, so that all of them go on alike."""
    longest = torch.tensor([seconds], dtype=torch.float32, device=device)
    dist.all_reduce(longest, op=dist.ReduceOp.MAX, group=group)
    return max(float(longest.item()), 1e-9)


def slow_nodes(speeds: Sequence[Speed]) -> list[str]:
    """One line for each node within which the same all-reduce has less than half of the best node's bandwidth."""
    best = max(speeds, key=lambda speed: speed.best, default=None)
    if best is None:
        return []
    return [
        f"{speed.where}: all-reduce within the node has {speed.best:.3g} GB/s, within {best.where} {best.best:.3g} GB/s"
        for speed in speeds
        if speed.processes == best.processes and not speed.fault and speed.best < best.best / 2
    ]
