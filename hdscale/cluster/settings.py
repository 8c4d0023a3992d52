"""Settings of the cluster (`cluster.*`)."""

import re
from dataclasses import dataclass
from typing import Any, Literal, Optional

from hdscale.errors import UserError
from hdscale.settings import Settings, setting


@dataclass
class ClusterSettings(Settings):
    """How `hdscale launch` asks SLURM for machines, and how the ranks find each other.

    Nothing here changes what a run computes: a run may resume with other values.
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

    def validate(self, prefix: str = "cluster.") -> None:
        """Also check the time limit, and the executors that have one machine or one process."""
        super().validate(prefix)
        seconds = 60 * minutes_of(self.time)
        if self.executor == "slurm" and seconds <= self.signal_delay:
            raise UserError(
                f"{prefix}time={self.time} is not longer than {prefix}signal_delay={self.signal_delay} s, "
                "so the job would be told to stop as soon as it starts"
            )

    def check_executor(self, prefix: str = "cluster.") -> None:
        """Raise UserError if `executor` cannot start that many nodes or ranks (asked by `hdscale launch`)."""
        if self.executor == "local" and self.nodes > 1:
            raise UserError(f"{prefix}executor=local uses this machine only: set {prefix}nodes=1 (not {self.nodes})")
        if self.executor == "debug" and self.nodes * self.ranks_per_node > 1:
            raise UserError(f"{prefix}executor=debug is one process: set {prefix}nodes=1 {prefix}tasks_per_node=1")

    @property
    def ranks_per_node(self) -> int:
        """Ranks per node: one per GPU unless stated otherwise."""
        return self.tasks_per_node or self.gpus_per_node or 1

    @property
    def minutes(self) -> int:
        """The time limit in minutes, rounded up."""
        return minutes_of(self.time)


def minutes_of(time: str) -> int:
    """A time limit as SLURM writes it, in minutes, rounded up.

    `90`, `90:00` (minutes:seconds), `1:30:00`, `1-12`, `1-12:30`, `1-12:30:00`.
    """
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", str(time).strip())
    if not match:
        raise UserError(f"cluster.time={time!r} is not a time limit; write minutes, or [days-]hours:minutes:seconds")
    days, first, second, third = (int(part) if part else 0 for part in match.groups())
    if match[1]:
        seconds = ((days * 24 + first) * 60 + second) * 60 + third
    elif match[4]:
        seconds = (first * 60 + second) * 60 + third
    else:
        seconds = first * 60 + second
    if seconds == 0:
        raise UserError(f"cluster.time={time!r}: must be longer than 0")
    return -(-seconds // 60)
