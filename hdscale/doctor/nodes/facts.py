"""What each process knows of its node and of its GPU, and in what the nodes differ that should not."""

from __future__ import annotations

import hashlib
import os
import platform
import socket
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist

from hdscale import __version__
from hdscale.bases.gpu import prepare_cuda
from hdscale.engine.devices import gpu_identity
from hdscale.engine.environment import Launch
from hdscale.engine.ranks import choose_device
from hdscale.errors import UserError, one_line
from hdscale.files import package_root
from hdscale.runs.provenance import version

GIB = 2**30
PACKAGES = ("deepspeed", "transformers", "datasets")
SOURCES = (".py", ".cpp", ".cu", ".h", ".cuh", ".inc")
DRIVER = Path("/sys/module/nvidia/version")
MOST_IN_USE = 0.1
"""Of a GPU's memory, before anything has been computed: more means that something else uses it."""


@dataclass(frozen=True)
class Facts:
    """One process's place and surroundings.

    Attributes:
        rank, local_rank: of all processes, and on its node. node: its name.
        versions: of what must be equal on all nodes.
        cores: that this process may use. memory: free on the node, in GiB.
        gpu: its name; empty without one. gpu_id: tells it from all others. gpu_free, gpu_total: in GiB.
        fault: why this process cannot use a GPU although its node has one.
    """

    rank: int
    local_rank: int
    node: str
    versions: dict[str, str] = field(default_factory=dict)
    cores: int = 0
    memory: float = 0.0
    gpu: str = ""
    gpu_id: str = ""
    gpu_free: float = 0.0
    gpu_total: float = 0.0
    fault: str = ""


def node_name(environ: Mapping[str, str] = os.environ) -> str:
    """SLURM's name of this node, or the host's."""
    return environ.get("SLURMD_NODENAME") or socket.gethostname()


def own_facts(launch: Launch, node: str) -> Facts:
    """The facts of this process."""
    memory = psutil.virtual_memory().available / GIB
    cores = len(os.sched_getaffinity(0))
    return Facts(launch.rank, launch.local_rank, node, versions(), cores, memory, **own_gpu(launch.local_rank))


def own_gpu(local_rank: int, environ: Mapping[str, str] = os.environ) -> dict[str, Any]:
    """This process's GPU, or what keeps it from using one; empty on a node without GPUs."""
    if not torch.cuda.is_available():
        given = environ.get("SLURM_GPUS_ON_NODE", "0")
        if given in ("", "0"):
            return {}
        return {"fault": f"GPUs from SLURM: {given}, seen by torch {torch.__version__}: none"}
    prepare_cuda()
    try:
        device = choose_device("cuda", local_rank)
        free, total = torch.cuda.mem_get_info(device)
        return {
            "gpu": torch.cuda.get_device_name(device),
            "gpu_id": gpu_identity(device),
            "gpu_free": free / GIB,
            "gpu_total": total / GIB,
        }
    except (UserError, RuntimeError) as error:
        return {"fault": one_line(error)}


def versions() -> dict[str, str]:
    """What must be equal on all nodes: packages, hdscale's own code, CUDA, NCCL and the driver."""
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if dist.is_nccl_available() else "none"
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "CUDA of torch": str(torch.version.cuda or torch.version.hip or "none"),
        "NCCL": nccl,
        "driver": DRIVER.read_text().strip() if DRIVER.is_file() else "none",
        "hdscale": f"{__version__} (code {code_of(package_root() / 'hdscale')})",
        **{name: version(name) or "none" for name in PACKAGES},
    }


def code_of(package: Path) -> str:
    """Eight characters that differ where a package's sources do."""
    digest = hashlib.sha256()
    for path in sorted(path for path in package.rglob("*") if path.suffix in SOURCES):
        digest.update(str(path.relative_to(package)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:8]


def nodes_of(facts: Sequence[Facts]) -> dict[str, list[Facts]]:
    """The processes of each node, in order of rank."""
    found: dict[str, list[Facts]] = {}
    for one in facts:
        found.setdefault(one.node, []).append(one)
    return found


def differences(facts: Sequence[Facts]) -> list[str]:
    """One line for each version that is not the same on all nodes; where most nodes agree, it names the others."""
    by_node = {node: processes[0] for node, processes in nodes_of(facts).items()}
    found = []
    for name in facts[0].versions:
        values = {node: one.versions[name] for node, one in by_node.items()}
        if len(set(values.values())) == 1:
            continue
        usual, times = Counter(values.values()).most_common(1)[0]
        if 2 * times > len(values):
            others = ", ".join(f"{node} has {value}" for node, value in values.items() if value != usual)
            found.append(f"{name}: {others}, the other nodes {usual}")
        else:
            found.append(f"{name}: " + ", ".join(f"{node} has {value}" for node, value in values.items()))
    return found


def gpu_faults(facts: Sequence[Facts]) -> list[str]:
    """One line for each node or GPU on which a run would fail or slow down all others."""
    found = list(dict.fromkeys(f"{one.node}: {one.fault}" for one in facts if one.fault))
    if not any(one.gpu or one.fault for one in facts):
        return found
    for node, processes in nodes_of(facts).items():
        if not any(one.gpu or one.fault for one in processes):
            found.append(f"{node}: no GPU is visible, other nodes have some")
    models = {node: processes[0].gpu for node, processes in nodes_of(facts).items() if processes[0].gpu}
    if len(set(models.values())) > 1:
        found.append("GPUs of different models: " + ", ".join(f"{node} has {gpu}" for node, gpu in models.items()))
    owners: dict[tuple[str, str], Facts] = {}
    for one in facts:
        if not one.gpu:
            continue
        first = owners.setdefault((one.node, one.gpu_id), one)
        if first is not one:
            found.append(f"{one.node}: processes {first.rank} and {one.rank} share one GPU")
        elif one.gpu_free < (1 - MOST_IN_USE) * one.gpu_total:
            found.append(
                f"{one.node}: of GPU {one.local_rank} only {one.gpu_free:.1f} of {one.gpu_total:.1f} GiB are free; "
                "something else uses it"
            )
    return found
