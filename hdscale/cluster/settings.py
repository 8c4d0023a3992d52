"""Settings of the cluster (`cluster.*`)."""

from dataclasses import dataclass
from typing import Any, Literal, Optional

from hdscale.settings import Settings, setting


@dataclass
class ClusterSettings(Settings):
    """How `hdscale launch` asks SLURM for machines, and how the ranks find each other.

    Nothing here changes what a run computes: a run may go on with other values.
    """

    executor: Literal["slurm", "local", "debug"] = setting(
        "slurm", "where `hdscale launch` runs: slurm, local (this machine) or debug (this process)"
    )
    nodes: int = setting(1, "number of nodes", at_least=1)
    gpus_per_node: int = setting(8, "GPUs per node, one rank each (0: CPU ranks)", at_least=0)
    tasks_per_node: Optional[int] = setting(None, "ranks per node; default: one per GPU, or 1 without GPUs", at_least=1)
    cpus_per_task: int = setting(8, "CPU cores per rank", at_least=1)
    mem: Optional[str] = setting(None, "memory per node, such as 400G; default: the cluster's")
    time: str = setting("24:00:00", "time limit: minutes, or SLURM's [days-]hours:minutes:seconds")
    partition: Optional[str] = setting(None, "partition; default: the cluster's")
    account: Optional[str] = setting(None, "account that is charged")
    qos: Optional[str] = setting(None, "quality of service")
    constraint: Optional[str] = setting(None, "node features, such as a100")
    container: Optional[str] = setting(
        None, "image to run in: a .sif file (apptainer), else one for srun --container-image"
    )
    setup: list[str] = setting([], "shell lines before the ranks start: modules, environments")
    sbatch: dict[str, Any] = setting({}, "any other sbatch option, such as {mail-type: FAIL}")
    srun: list[str] = setting([], "further options of srun")
    array_parallelism: int = setting(8, "most jobs of a sweep that run at once", at_least=1)
    max_requeues: int = setting(3, "restarts without a newer checkpoint before a job gives up", at_least=0)
    signal_delay: int = setting(180, "seconds before the time limit at which the ranks are told to save", at_least=1)
    snapshot: bool = setting(False, "run from a copy of the code, so that later edits do not change queued jobs")
    interface: Optional[str] = setting(None, "network interface of NCCL and GLOO, such as ib0; default: theirs")
    rendezvous_timeout: int = setting(600, "seconds that ranks wait for each other at the start", at_least=1)
