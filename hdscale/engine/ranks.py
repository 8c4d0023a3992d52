"""The ranks of a run: process group, device, threads, and the few collectives that the rest of hdscale needs."""

from __future__ import annotations

import os
import socket
import warnings
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import psutil
import torch
import torch.distributed as dist

from hdscale.bases.gpu import prepare_cuda
from hdscale.engine.devices import check_own_gpu, gpu_identity
from hdscale.engine.environment import Launch, read_environment
from hdscale.engine.rendezvous import meet
from hdscale.errors import UserError
from hdscale.runs.machine import processor_name
from hdscale.runs.provenance import Computation

T = TypeVar("T")

DEFAULT_TIMEOUT_MINUTES = 60.0
DEFAULT_RENDEZVOUS_SECONDS = 600.0


class Ranks:
    """This process's place among the ranks, and how it talks to the others.

    Values that decide what the program does next (flags, counts, paths) travel over gloo on the host; tensors of the
    training step over NCCL on CUDA and gloo on the CPU. With one process every collective is a no-op.

    Attributes:
        rank, world_size, local_rank: as the launcher says.
        device: torch.device of this rank's tensors.
        launcher: "slurm", "torchrun", "deepspeed", "environment" or "none".
        threads: CPU threads of this rank.
    """

    def __init__(self, launch: Launch, device: torch.device, threads: int, host_group: Any = None) -> None:
        self.launch = launch
        self.rank = launch.rank
        self.world_size = launch.world_size
        self.local_rank = launch.local_rank
        self.launcher = launch.launcher
        self.device = device
        self.threads = threads
        self._host_group = host_group

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes the files."""
        return self.rank == 0

    @classmethod
    def start(
        cls,
        launch: Launch | None = None,
        threads: int | None = None,
        timeout_minutes: float = DEFAULT_TIMEOUT_MINUTES,
        device: str | None = None,
        rendezvous_seconds: float = DEFAULT_RENDEZVOUS_SECONDS,
    ) -> Ranks:
        """Join the process group.

        Args:
            launch: this process's place; default: read from the environment.
            threads: CPU threads; default: OMP_NUM_THREADS, else this rank's share of the node's cores.
            timeout_minutes: how long a collective waits for the slowest rank before the run fails.
            device: "cpu" or "cuda"; default: CUDA where there is one.
            rendezvous_seconds: how long to wait for every rank to appear.

        Raises:
            UserError: if there is no GPU for this rank, or two ranks have the same one.
            RendezvousError: naming the ranks that have not appeared.
        """
        launch = launch or read_environment(os.environ)
        device_type = device or ("cuda" if torch.cuda.is_available() else "cpu")
        threads = set_threads(threads, launch.local_world_size)
        if device_type == "cuda":
            prepare_cuda()
        place = choose_device(device_type, launch.local_rank)
        address, port = launch.master_addr, launch.master_port or free_port()
        # DeepSpeed reads these even where the process group exists already
        os.environ.update(
            RANK=str(launch.rank),
            WORLD_SIZE=str(launch.world_size),
            LOCAL_RANK=str(place.index if place.index is not None else launch.local_rank),
            MASTER_ADDR=address,
            MASTER_PORT=str(port),
        )
        os.environ.setdefault("DS_ACCELERATOR", device_type)
        timeout = timedelta(minutes=timeout_minutes)
        if device_type == "cuda":
            torch.cuda.set_device(place)
        store = dist.HashStore() if launch.world_size == 1 else meet(launch, rendezvous_seconds)
        store.set_timeout(timeout)
        if device_type == "cuda":
            check_own_gpu(store, launch.rank, launch.world_size, f"{socket.gethostname()}: {gpu_identity(place)}")
        group: dict[str, Any] = {
            "rank": launch.rank,
            "world_size": launch.world_size,
            "timeout": timeout,
            "store": store,
        }
        if device_type == "cuda":
            dist.init_process_group("nccl", device_id=place if launch.world_size > 1 else None, **group)
        else:
            dist.init_process_group("gloo", **group)
        host_group = dist.new_group(backend="gloo", timeout=timeout) if device_type == "cuda" else None
        attach_deepspeed()
        return cls(launch, place, threads, host_group)

    @property
    def computation(self) -> Computation:
        """What this run is computed on, for its results."""
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else processor_name()
        return Computation(name, self.launcher, self.world_size, self.threads)

    def memory_gb(self) -> float:
        """Peak memory allocated on the GPU, or this process's resident memory on a CPU, in GB (10^9 bytes)."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 1e9
        return psutil.Process().memory_info().rss / 1e9

    def barrier(self) -> None:
        """Wait for every rank."""
        self.max_int(0)

    def any_true(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""
        return bool(self.max_int(int(flag)))

    def all_true(self, flag: bool) -> bool:
        """Whether the flag is set on every rank."""
        return not self.any_true(not flag)

    def max_int(self, value: int) -> int:
        """The largest value of any rank."""
        if self.world_size == 1:
            return value
        tensor = torch.tensor([value], dtype=torch.int64)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self._host_group)
        return int(tensor.item())

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum a tensor of this rank's device over the ranks, in place, without waiting for the device."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def broadcast_object(self, value: T, source: int = 0) -> T:
        """Rank `source`'s value, on every rank."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=source, group=self._host_group, device=torch.device("cpu"))
        return box[0]

    def gather_objects(self, value: T) -> list[T]:
        """Every rank's value, in order of rank, on every rank."""
        if self.world_size == 1:
            return [value]
        boxes: list[Any] = [None] * self.world_size
        dist.all_gather_object(boxes, value, group=self._host_group)
        return boxes

    def on_main(self, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """Call `function` on rank 0 and hand its result to every rank.

        What it raises is raised on every rank, so that none is left waiting: a UserError as itself, anything else as
        itself on rank 0 and as a RuntimeError elsewhere.
        """
        result, failure = None, None
        error: Exception | None = None
        if self.is_main:
            try:
                result = function(*args, **kwargs)
            except Exception as caught:
                error = caught
                failure = (isinstance(caught, UserError), f"{caught}")
        result, failure = self.broadcast_object((result, failure))
        if failure is not None:
            if error is not None:
                raise error
            is_user_error, message = failure
            raise UserError(message) if is_user_error else RuntimeError(f"rank 0 failed: {message}")
        return result  # type: ignore[return-value]

    def close(self) -> None:
        """Leave the process group, at the end of the process: DeepSpeed cannot join a second one."""
        if dist.is_initialized():
            dist.destroy_process_group()


def set_threads(threads: int | None, local_world_size: int) -> int:
    """Set and return the CPU threads of this rank.

    Threads change the bits of a matrix product: a run resumes bit for bit only with the same number.
    """
    if threads is None and "OMP_NUM_THREADS" not in os.environ:
        threads = max(1, len(os.sched_getaffinity(0)) // max(1, local_world_size))
    if threads is not None:
        torch.set_num_threads(threads)
    return torch.get_num_threads()


def choose_device(device_type: str, local_rank: int) -> torch.device:
    """This rank's device: its own GPU of the node, or the one GPU that the cluster lets it see."""
    if device_type == "cpu":
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if count == 0:
        raise UserError("no GPU is visible; run on the CPU, or ask the cluster for GPUs (--gpus-per-node)")
    if local_rank < count:
        return torch.device("cuda", local_rank)
    if count == 1:
        return torch.device("cuda", 0)
    raise UserError(
        f"local rank {local_rank} has no GPU: this node shows {count}; start at most {count} ranks per node"
    )


def free_port() -> int:
    """A TCP port that is free at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def attach_deepspeed() -> None:
    """Let DeepSpeed use the process group that exists.

    Its shared-memory communication op is switched off first: it would be compiled on each machine, and the lock that
    a killed build leaves behind would block that compilation forever.
    """
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel("WARNING")
    # DeepSpeed 0.19 calls collectives by names that torch 2.13 warns about, at every step
    warnings.filterwarnings("ignore", message="`torch.distributed.*is deprecated", category=FutureWarning)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # a single-process job on a cluster with MPI must not be sent looking for mpi4py
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
