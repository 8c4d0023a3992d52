"""Rank processes for the tests: real process groups without the cost of launching Python.

A `deepspeed` launch costs over ten seconds, nearly all of it imports. Here one long-lived server imports torch and
DeepSpeed once, and each job's ranks are forked from it: they start in milliseconds, and nothing that a job leaves in
a module's variables reaches the next one.

    def my_check(ranks, size):              # in tests/<some module>.py: importable, at the module's top level
        ...
        return {"loss": 1.0}                # plain data or CPU tensors

    def test_something(rank_pool):
        results = rank_pool(2).run("tests.my_module:my_check", {"size": 3})     # one result per rank, in order

`ranks` is an `hdscale.engine.ranks.Ranks` with one thread: on the CPU, or with HDSCALE_TEST_DEVICE=cuda on GPUs, one a
rank.
"""

from __future__ import annotations

import gc
import importlib
import multiprocessing
import os
import pickle
import sys
import time
import traceback
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
DEVICE = os.environ.get("HDSCALE_TEST_DEVICE", "cpu")
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "DS_ACCELERATOR": DEVICE,
    "TOKENIZERS_PARALLELISM": "false",
    "TORCHINDUCTOR_COMPILE_THREADS": "1",
}
# inductor (and sympy with it) is what DeepSpeed imports at its first engine
PRELOAD = [
    "torch._inductor.compile_fx",
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.runtime.zero.stage3",
    "transformers.models.t5.modeling_t5",
    "safetensors.torch",
    "hdscale.engine.checkpoint",
    "hdscale.engine.deepspeed_engine",
    "hdscale.evaluation.evaluator",
]
JOB_SECONDS = 120.0


class RankFailure(AssertionError):
    """A job failed on some rank; the message holds that rank's traceback or how it died."""


class RankPool:
    """Starts ranks. `pool(2)` is a world of two."""

    def __init__(self) -> None:
        os.environ.update({name: os.environ.get(name, value) for name, value in ENVIRONMENT.items()})
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(PRELOAD)

    def __call__(self, world_size: int) -> World:
        return World(self.context, world_size)


class World:
    """A number of ranks."""

    def __init__(self, context: Any, world_size: int) -> None:
        self.context, self.world_size = context, world_size

    def run(
        self, target: str, kwargs: dict[str, Any] | None = None, timeout: float = JOB_SECONDS, may_die: bool = False
    ) -> list[Any]:
        """Run `module:function(ranks, **kwargs)` on every rank; the results in order of rank.

        Args:
            may_die: the job is meant to kill ranks: as soon as one has died or failed the rest are killed (SIGKILL),
                and the results are None for those that did not finish.

        Raises:
            RankFailure: if a rank raised, died, or did not answer in time.
        """
        from hdscale.engine.ranks import free_port

        port = free_port()
        workers = [self._start(target, kwargs or {}, rank, port) for rank in range(self.world_size)]
        results: dict[int, Any] = {}
        failure = None
        deadline = time.monotonic() + timeout
        while len(results) < self.world_size and failure is None:
            pending = {pipe: rank for rank, (_, pipe) in enumerate(workers) if rank not in results}
            ready = wait(list(pending), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                failure = f"ranks {sorted(pending.values())} did not answer within {timeout:.0f} s"
            for pipe in ready:
                rank = pending[pipe]
                succeeded, value = answer_of(*workers[rank])
                if succeeded:
                    results[rank] = value
                else:
                    failure = f"rank {rank} of {self.world_size} in {target}: {value}"
                    break
        for process, pipe in workers:
            if failure is not None:
                # the others may be waiting in a collective for the one that failed
                process.kill()
            process.join()
            pipe.close()
        if failure is not None and not may_die:
            raise RankFailure(failure)
        return [results.get(rank) for rank in range(self.world_size)]

    def _start(self, target: str, kwargs: dict[str, Any], rank: int, port: int) -> tuple[Any, Connection]:
        ours, theirs = self.context.Pipe(duplex=False)
        arguments = (theirs, str(REPOSITORY), target, kwargs, rank, self.world_size, port)
        process = self.context.Process(target=work, args=arguments, daemon=True)
        process.start()
        theirs.close()
        return process, ours


def answer_of(process: Any, pipe: Connection) -> tuple[bool, Any]:
    """(succeeded, result or what went wrong) of a rank whose pipe has something to say."""
    try:
        return pickle.loads(pipe.recv_bytes())
    except (EOFError, ConnectionResetError):
        process.join(5)
        return False, f"died with exit code {process.exitcode}"


def work(
    pipe: Connection, repository: str, target: str, kwargs: dict[str, Any], rank: int, world_size: int, port: int
) -> None:
    """One rank of one job: join the process group, run, answer."""
    # DeepSpeed collects garbage explicitly, and the server's imports are a million objects that are none
    gc.freeze()
    if repository not in sys.path:
        sys.path.insert(0, repository)
    from hdscale.engine.environment import Launch
    from hdscale.engine.ranks import Ranks

    try:
        launch = Launch("environment", rank, world_size, rank, "127.0.0.1", port, world_size)
        ranks = Ranks.start(launch, threads=1, timeout_minutes=JOB_SECONDS / 60, device=DEVICE)
        module, _, function = target.partition(":")
        result = getattr(importlib.import_module(module), function)(ranks, **kwargs)
        # a rank that leaves early would break collectives that its peers are still finishing
        ranks.barrier()
        answer = (True, result)
    except BaseException:
        answer = (False, traceback.format_exc())
    # plain pickle copies tensors; a connection's own way would share memory with a process that is about to end
    pipe.send_bytes(pickle.dumps(answer))
