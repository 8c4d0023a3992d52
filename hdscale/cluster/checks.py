"""What can be found wrong before a job is submitted: in the cluster's settings and in the run's own."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from hdscale.cluster.settings import ClusterSettings
from hdscale.errors import UserError, nearest, one_line


@dataclass
class Partition:
    """A partition as sinfo shows it: the largest of its nodes, and their number."""

    name: str
    default: bool
    nodes: int = 0
    gpus: int = 0
    cpus: int = 0


def has_slurm() -> bool:
    """Whether jobs can be submitted from here."""
    return shutil.which("sbatch") is not None


def check_slurm(cluster: ClusterSettings) -> None:
    """Compare what is asked for with what the partition has.

    Raises:
        UserError: no sbatch, no controller, an unknown partition; more nodes, GPUs or cores than there are.
    """
    if not has_slurm():
        raise UserError(
            "sbatch is not on the path; launch from a login node of the cluster, or set cluster.executor=local"
        )
    partitions = read_partitions()
    name = cluster.partition
    if name is None:
        partition = next((one for one in partitions.values() if one.default), None)
        if partition is None:
            return  # a site without a default partition routes jobs itself
    elif "," in name:
        return  # whichever starts first: sbatch checks
    elif name not in partitions:
        raise UserError(f"no partition '{name}' here{nearest(name, partitions)}")
    else:
        partition = partitions[name]
    wanted = {
        "nodes": (cluster.nodes, partition.nodes, f"partition {partition.name} has {partition.nodes} nodes"),
        "gpus_per_node": (
            cluster.gpus_per_node,
            partition.gpus,
            f"a node of partition {partition.name} has {partition.gpus} GPUs",
        ),
        "cpus_per_task": (
            cluster.cpus_per_task * cluster.ranks_per_node,
            partition.cpus,
            f"{cluster.ranks_per_node} ranks per node with {cluster.cpus_per_task} cores each are more than "
            f"the {partition.cpus} cores of a node of partition {partition.name}",
        ),
    }
    for key, (asked, available, words) in wanted.items():
        if asked > available:
            raise UserError(f"cluster.{key}={getattr(cluster, key)}: {words}; ask for less or name another partition")


def read_partitions() -> dict[str, Partition]:
    """The partitions that sinfo shows."""
    done = subprocess.run(["sinfo", "-h", "-o", "%P|%D|%G|%c"], capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"SLURM does not answer: {one_line(done.stderr)}; is its controller up?")
    partitions: dict[str, Partition] = {}
    for line in done.stdout.splitlines():
        name, nodes, gres, cpus = line.split("|")
        partition = partitions.setdefault(name.rstrip("*"), Partition(name.rstrip("*"), name.endswith("*")))
        partition.nodes += int(nodes)
        partition.gpus = max(partition.gpus, count_gpus(gres))
        partition.cpus = max(partition.cpus, int(cpus.rstrip("+")))
    return partitions


def count_gpus(gres: str) -> int:
    """GPUs in a list of generic resources: `gpu:a100:4(S:0-1),gpu:2` -> 6."""
    plain = re.sub(r"\([^)]*\)", "", gres)
    counts = [re.fullmatch(r"gpu(?::[^:]+)?:(\d+)", part) for part in plain.split(",")]
    return sum(int(match[1]) for match in counts if match)


def check_script(text: str) -> None:
    """Let sbatch itself check a script (`--test-only`): account, memory, constraint, limits of the partition.

    Raises:
        UserError: with sbatch's words.
    """
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "job.sh"
        script.write_text(text)
        done = subprocess.run(["sbatch", "--test-only", str(script)], capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"sbatch refuses the job: {one_line(done.stderr.replace('sbatch: error: ', ''))}")
