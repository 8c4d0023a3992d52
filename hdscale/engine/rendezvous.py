"""The ranks' first meeting: a store that all have reached, or an error that says who is missing."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterable
from datetime import timedelta

import torch.distributed as dist

from hdscale.engine.environment import Launch

GRACE_SECONDS = 5
"""How much longer than rank 0 the others wait for its verdict, and how long it stays to be read."""


class RendezvousError(RuntimeError):
    """The ranks did not come together. Not the user's mistake as a rule: a job is requeued for it.

    Attributes:
        shared: whether every rank that came raises this very error.
    """

    def __init__(self, message: str, shared: bool = False) -> None:
        super().__init__(message)
        self.shared = shared


def meet(launch: Launch, seconds: float) -> dist.Store:
    """Wait for every rank of a launch with more than one.

    torch's own rendezvous tells each rank only that its time is up. Here each rank signs in at rank 0, which
    tells all of them who has not.

    Args:
        launch: this rank's place.
        seconds: how long to wait.

    Returns:
        the store, for `init_process_group(store=…)`.

    Raises:
        RendezvousError: naming the missing ranks; or rank 0, where it cannot be reached.
    """
    end = time.monotonic() + seconds
    place = f"{launch.master_addr}:{launch.master_port}"
    try:
        server = dist.TCPStore(
            launch.master_addr,
            launch.master_port,
            # torchrun's agent may be listening there already
            is_master=launch.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True",
            timeout=timedelta(seconds=seconds),
            wait_for_workers=False,
        )
    except (dist.DistError, RuntimeError, ValueError) as error:
        detail = " ".join(str(error).split())[:200]
        if launch.rank == 0:
            raise RendezvousError(
                f"rank 0 on {socket.gethostname()} cannot listen at {place} ({detail}); {remedy(launch)}"
            ) from error
        raise RendezvousError(
            f"rank {launch.rank} on {socket.gethostname()} does not reach rank 0 at {place} within "
            f"{seconds:g} s ({detail}); rank 0 is missing, or cluster.interface / HDSCALE_MASTER_ADDR must "
            "name another network"
        ) from error
    # torchrun's store outlives ranks that it starts again: what the earlier ones left there is not for these
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = dist.PrefixStore(f"hdscale/attempt/{attempt}", server)
    ours = token(launch)
    if launch.rank == 0:
        store.set("hdscale/run", ours)
        store.set(key(0), ours)
        missing = wait_for_ranks(store, launch.world_size, end)
        verdict = f"after {seconds:g} s at {place}, {describe(missing, launch)}" if missing else ""
        store.set("hdscale/verdict", verdict)
        if verdict:
            time.sleep(GRACE_SECONDS)  # the store lives in this process: let the others read
            raise RendezvousError(verdict, shared=True)
        return store
    try:
        store.wait(["hdscale/run"], timedelta(seconds=max(1.0, end - time.monotonic())))
        theirs = store.get("hdscale/run").decode()
        if theirs != ours:
            raise RendezvousError(f"another run ({theirs}) listens at {place}, not this one ({ours}); {remedy(launch)}")
        store.set(key(launch.rank), ours)
        store.wait(["hdscale/verdict"], timedelta(seconds=max(1.0, end - time.monotonic()) + GRACE_SECONDS))
        verdict = store.get("hdscale/verdict").decode()
    except (dist.DistError, RuntimeError) as error:
        if isinstance(error, RendezvousError):
            raise
        raise RendezvousError(f"rank 0 at {place} has left before all ranks were there; see its log") from error
    if verdict:
        raise RendezvousError(verdict, shared=True)
    return store


def token(launch: Launch) -> str:
    """What all ranks of a run know and those of another run do not; empty where there is no such thing.

    Two runs that were given one port would otherwise exchange their ranks.
    """
    if launch.launcher == "deepspeed" and launch.world_size == launch.local_world_size:
        return f"launched by process {os.getppid()}"
    return launch.job


def remedy(launch: Launch) -> str:
    """How to choose another meeting place."""
    if launch.launcher in ("deepspeed", "torchrun"):
        return f"start with another port: {launch.launcher} --master_port=PORT"
    if launch.launcher == "environment":
        return "set another MASTER_PORT"
    return "set HDSCALE_MASTER_PORT to a free port, or HDSCALE_MASTER_ADDR to an address of rank 0's node"


def key(rank: int) -> str:
    """Where a rank signs in."""
    return f"hdscale/arrived/{rank}"


def wait_for_ranks(store: dist.Store, world_size: int, end: float) -> list[int]:
    """The ranks that have not signed in at time `end`; empty as soon as all have."""
    missing = list(range(world_size))
    while missing and time.monotonic() < end:
        # asked one by one: check() of several says only whether all are there
        missing = [rank for rank in missing if not store.check([key(rank)])]
        if missing:
            time.sleep(0.1)
    return missing


def describe(missing: list[int], launch: Launch) -> str:
    """`ranks 3, 5 of 8 are missing (on gpu02)`."""
    nodes = dict.fromkeys(launch.nodes[rank] for rank in missing) if launch.nodes else {}
    where = f" (on {listed(nodes)})" if nodes else ""
    if len(missing) == 1:
        return f"rank {missing[0]} of {launch.world_size} is missing{where}"
    return f"ranks {listed(missing)} of {launch.world_size} are missing{where}"


def listed(things: Iterable[object]) -> str:
    """The first 32, separated by commas, and how many more there are."""
    words = [str(thing) for thing in things]
    return ", ".join(words[:32]) + (f" and {len(words) - 32} more" if len(words) > 32 else "")
