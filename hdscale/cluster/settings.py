"""Settings of the cluster (`cluster.*`)."""

from dataclasses import dataclass
from typing import Any, Optional

from hdscale.settings import setting


@dataclass
class ClusterSettings:
    """How `hdscale launch` asks SLURM for machines, and how the ranks find each other.

    Nothing here changes what a run computes: a run may go on with other values.
    """

    executor: str = setting("slurm", "where `hdscale launch` runs: slurm, local (this machine) or debug (this process)")
    nodes: int = setting(1, "nodes")
    gpus_per_node: int = setting(8, "GPUs, and so ranks, of a node (0: CPU ranks)")
    tasks_per_node: Optional[int] = setting(None, "ranks of a node; default: one a GPU, or 1 without GPUs")
    cpus_per_task: int = setting(8, "CPU cores of a rank")
    mem: Optional[str] = setting(None, "memory of a node, such as 400G; default: the site's")
    time: str = setting("24:00:00", "time limit: minutes, or SLURM's [days-]hours:minutes:seconds")
    partition: Optional[str] = setting(None, "partition; default: the site's")
    account: Optional[str] = setting(None, "account that is charged")
    qos: Optional[str] = setting(None, "quality of service")
    constraint: Optional[str] = setting(None, "node features, such as a100")
    container: Optional[str] = setting(
        None, "image to run in: a .sif file (apptainer), else one for srun --container-image"
    )
    setup: list[str] = setting([], "shell lines before the ranks start: modules, environments")
    sbatch: dict[str, Any] = setting({}, "any other sbatch option, such as {mail-type: FAIL}")
    srun: list[str] = setting([], "further options of srun")
    array_parallelism: int = setting(8, "jobs of a sweep that run at a time")
    max_requeues: int = setting(3, "starts without a newer checkpoint before a job gives up")
    signal_delay: int = setting(180, "seconds before the time limit at which the ranks are told to save")
    snapshot: bool = setting(False, "run from a copy of the code, so that later edits do not change queued jobs")
    interface: Optional[str] = setting(None, "network interface of NCCL and GLOO, such as ib0; default: theirs")
    rendezvous_timeout: int = setting(600, "seconds that ranks wait for each other at the start")
