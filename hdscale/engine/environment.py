"""Which rank of how many this process is, read from what started it. Light: no torch.

In order: torchrun, the `deepspeed` launcher, submitit's local executor, srun, RANK and WORLD_SIZE set by
hand, nothing. A launcher that runs inside a SLURM step comes before SLURM, whose variables it leaves in place.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass

from hdscale.errors import UserError

PORT_BASE, PORT_JOBS, PORT_STEPS = 15000, 1024, 16
"""Ports 15000-31383: below those that Linux gives to outgoing connections (32768 and up)."""


LAUNCHERS = {
    "torchrun": "started by torchrun",
    "deepspeed": "started by the deepspeed launcher",
    "environment": "started by hand (RANK, WORLD_SIZE, MASTER_ADDR)",
    "submitit": "started by submitit's local executor",
    "slurm": "started by srun (SLURM)",
}


@dataclass(frozen=True)
class Launch:
    """Who this process is among the ranks, and where they meet.

    Attributes:
        launcher: torchrun, deepspeed, submitit, slurm, environment (RANK and its companions, set by hand) or
            none.
        rank, world_size: number of this rank, and of ranks.
        local_rank, local_world_size: number of this rank on its node (its GPU), and of the ranks there.
        master_addr, master_port: where rank 0 listens; port 0: any free one (a single process).
        job: what started it, for the log; such as "job 123 step 0, restart 2".
        nodes: the node of each rank, where that is known.
    """

    launcher: str
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    master_addr: str = "127.0.0.1"
    master_port: int = 0
    local_world_size: int = 1
    job: str = ""
    nodes: tuple[str, ...] = ()

    def __str__(self) -> str:
        job = f" {self.job}" if self.job else ""
        if self.launcher == "none":
            return f"no launcher{job}: one process"
        return (
            f"{LAUNCHERS[self.launcher]}{job}: rank {self.rank} of {self.world_size}, "
            f"local rank {self.local_rank} of {self.local_world_size}, "
            f"rendezvous at {self.master_addr}:{self.master_port}"
        )


def read_environment(environ: Mapping[str, str] = os.environ) -> Launch:
    """The launch that the environment describes.

    Raises:
        UserError: where the variables of a launcher are incomplete, not numbers, or contradict each other.
    """
    if "TORCHELASTIC_RUN_ID" in environ:
        launch = from_rank_variables(environ, "torchrun")
    elif "RANK" in environ and "CROSS_RANK" in environ:
        launch = from_rank_variables(environ, "deepspeed")
    elif "SUBMITIT_LOCAL_GLOBALID" in environ:
        job = number(environ, "SUBMITIT_LOCAL_JOB_ID")
        launch = Launch(
            "submitit",
            rank=number(environ, "SUBMITIT_LOCAL_GLOBALID"),
            world_size=number(environ, "SUBMITIT_LOCAL_NTASKS"),
            local_rank=number(environ, "SUBMITIT_LOCAL_LOCALID"),
            local_world_size=number(environ, "SUBMITIT_LOCAL_NTASKS"),
            master_port=port_of_job(job),
            job=f"process {job}",
        )
    elif "SLURM_STEP_ID" in environ and "SLURM_PROCID" in environ:
        launch = from_slurm(environ)
    elif "RANK" in environ and "WORLD_SIZE" in environ:
        # after SLURM: variables in the user's shell may be old
        launch = from_rank_variables(environ, "environment")
    else:
        # in a batch script or an salloc shell, without srun: one process, whatever the allocation's size
        allocation = environ.get("SLURM_JOB_ID", "")
        launch = Launch("none", job=f"(inside SLURM job {allocation}, but not by srun)" if allocation else "")
    if not 0 <= launch.rank < launch.world_size:
        raise UserError(f"rank {launch.rank} of {launch.world_size} is impossible; unset RANK and WORLD_SIZE")
    return launch


def from_rank_variables(environ: Mapping[str, str], launcher: str) -> Launch:
    """RANK and its companions, as torchrun and the deepspeed launcher set them."""
    return Launch(
        launcher,
        rank=number(environ, "RANK"),
        world_size=number(environ, "WORLD_SIZE"),
        local_rank=number(environ, "LOCAL_RANK", 0 if launcher == "environment" else None),
        local_world_size=number(environ, "LOCAL_WORLD_SIZE", number(environ, "LOCAL_SIZE", 1)),
        master_addr=environ.get("MASTER_ADDR", "127.0.0.1"),
        master_port=number(environ, "MASTER_PORT", 29500),
    )


def from_slurm(environ: Mapping[str, str]) -> Launch:
    """A task of an srun step.

    HDSCALE_MASTER_ADDR and HDSCALE_MASTER_PORT override the meeting place; MASTER_ADDR does not, since sbatch
    carries along whatever the user's shell had.
    """
    job, step = number(environ, "SLURM_JOB_ID"), number(environ, "SLURM_STEP_ID")
    nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST", "")
    hosts = host_names(nodes)
    restarts = environ.get("SLURM_RESTART_COUNT", "0")
    return Launch(
        "slurm",
        rank=number(environ, "SLURM_PROCID"),
        world_size=number(environ, "SLURM_STEP_NUM_TASKS", number(environ, "SLURM_NTASKS", 1)),
        local_rank=number(environ, "SLURM_LOCALID"),
        local_world_size=tasks_of_node(environ),
        master_addr=environ.get("HDSCALE_MASTER_ADDR") or (hosts or ["127.0.0.1"])[0],
        master_port=number(environ, "HDSCALE_MASTER_PORT", port_of_job(job, step)),
        job=f"job {job} step {step}" + (f", restart {restarts}" if restarts != "0" else "") + f" on {nodes}",
        nodes=nodes_of_ranks(environ, hosts),
    )


def tasks_of_node(environ: Mapping[str, str]) -> int:
    """This node's number of tasks."""
    counts = tasks_per_node(environ)
    node = number(environ, "SLURM_NODEID", 0)
    return counts[node] if node < len(counts) else 1


def tasks_per_node(environ: Mapping[str, str]) -> list[int]:
    """Each node's number of tasks, from SLURM's list by node, such as `8(x3),4`."""
    counts: list[int] = []
    for tasks, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", environ.get("SLURM_STEP_TASKS_PER_NODE", "")):
        counts += [int(tasks)] * int(times or 1)
    return counts


def nodes_of_ranks(environ: Mapping[str, str], hosts: Sequence[str]) -> tuple[str, ...]:
    """Each task's node: SLURM fills one after the other (block), or deals tasks out in turn (cyclic, its way with a
    task per node); empty for any other distribution."""
    counts = tasks_per_node(environ)
    # block:cyclic and the like say how a node's own sockets are filled
    way = environ.get("SLURM_DISTRIBUTION", "block").split(":")[0].split(",")[0]
    if len(counts) != len(hosts) or way not in ("block", "cyclic"):
        return ()
    nodes = [(turn, host) for host, tasks in zip(hosts, counts, strict=True) for turn in range(tasks)]
    if way == "cyclic":
        nodes.sort(key=lambda one: one[0])  # stable: within a turn in the order of nodes
    return tuple(host for _, host in nodes)


def number(environ: Mapping[str, str], name: str, default: int | None = None) -> int:
    """An integer variable of the environment."""
    text = environ.get(name)
    if text is None or text == "":
        if default is not None:
            return default
        raise UserError(f"{name} is not set though its companions are; start with srun, torchrun or deepspeed")
    try:
        return int(text)
    except ValueError:
        raise UserError(
            f"{name}={text!r} is not a number; unset it or start with srun, torchrun or deepspeed"
        ) from None


def port_of_job(job: int, step: int = 0) -> int:
    """A port that no other step of this job, and none of the 1023 jobs before and after it, has."""
    return PORT_BASE + job % PORT_JOBS * PORT_STEPS + step % PORT_STEPS


def host_names(nodes: str) -> list[str]:
    """The hosts of a SLURM node list such as `gpu[01-03,7],login`, in order.

    `scontrol show hostnames` says; where a container has no scontrol, the list is expanded here.
    """
    if not nodes:
        return []
    if shutil.which("scontrol"):
        command = ["scontrol", "show", "hostnames", nodes]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
            return done.stdout.split()
        except (subprocess.SubprocessError, OSError):
            pass  # no reason to fail: the list itself has all that is needed
    return expand_node_list(nodes)


def expand_node_list(nodes: str) -> list[str]:
    """The hosts of a node list, without asking SLURM. Brackets may follow each other: `r[1-2]n[01-02]`."""
    names = []
    for group in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", nodes):
        partial = [""]
        for literal, ranges in re.findall(r"([^\[]+)|\[([^\]]*)\]", group):
            choices = [literal] if literal else [one for part in ranges.split(",") for one in expand_range(part)]
            partial = [start + choice for start in partial for choice in choices]
        names += partial
    return names


def expand_range(part: str) -> list[str]:
    """`03-05` -> 03, 04, 05 (leading zeros kept); `7` -> 7."""
    low, _, high = part.partition("-")
    return [str(value).zfill(len(low)) for value in range(int(low), int(high or low) + 1)]


def set_interface(interface: str | None, environ: MutableMapping[str, str] = os.environ) -> None:
    """Have NCCL and GLOO use one network interface, unless the environment already names theirs."""
    interface = interface or environ.get("HDSCALE_INTERFACE")
    if interface:
        environ.setdefault("NCCL_SOCKET_IFNAME", interface)
        environ.setdefault("GLOO_SOCKET_IFNAME", interface)
