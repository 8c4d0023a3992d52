"""submitit's executors from `cluster.*`, and the batch script that they write."""

from __future__ import annotations

import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import submitit
from submitit.core.utils import FailedJobError, FailedSubmissionError
from submitit.slurm.slurm import SlurmExecutor

from hdscale.cluster.settings import ClusterSettings
from hdscale.errors import UserError, one_line
from hdscale.files import package_root


def build_executor(
    cluster: ClusterSettings, folder: Path, name: str, code: Path, dry_run: bool = False
) -> submitit.Executor:
    """The executor that `cluster.executor` names, with the resources that `cluster` asks for.

    Args:
        folder: of the launch: logs, pickles and records; must be visible from the compute nodes.
        name: of the job.
        code: folder that holds the package `hdscale` that the job runs.
        dry_run: only the script is wanted, so SLURM need not be here.
    """
    if cluster.executor == "debug":
        return submitit.DebugExecutor(folder)
    if cluster.executor == "local":
        executor: submitit.Executor = submitit.LocalExecutor(folder)
        executor.update_parameters(
            nodes=cluster.nodes,
            tasks_per_node=cluster.ranks_per_node,
            gpus_per_node=cluster.gpus_per_node,
            timeout_min=cluster.minutes,
            signal_delay_s=cluster.signal_delay,
            stderr_to_stdout=True,
        )
        return executor
    executor_class = ScriptWriter if dry_run else SlurmExecutor
    executor = executor_class(folder, python=shlex.join(rank_python(cluster)))
    executor.update_parameters(**slurm_parameters(cluster, folder, name, code))
    return executor


class ScriptWriter(SlurmExecutor):
    """Writes scripts where there is no SLURM."""

    @classmethod
    def affinity(cls) -> int:
        return 1


def script_text(executor: SlurmExecutor, runs: int) -> str:
    """The sbatch script that the executor submits for so many runs."""
    if runs > 1:
        executor.parameters["map_count"] = runs
    try:
        return executor._make_submission_file_text(executor._submitit_command_str, "")
    finally:
        executor.parameters.pop("map_count", None)


def slurm_parameters(cluster: ClusterSettings, folder: Path, name: str, code: Path) -> dict[str, Any]:
    """submitit's parameters for SLURM."""
    launch = f"--launch {shlex.quote(str(folder))}"
    setup = [
        *cluster.setup,
        f"export PYTHONPATH={shlex.quote(str(code))}${{PYTHONPATH:+:$PYTHONPATH}}",
        # the package of the line above, not one in the folder that the job is submitted from
        "export PYTHONSAFEPATH=1",
        f"export HDSCALE_MAX_REQUEUES={cluster.max_requeues}",
        f"HDSCALE_PYTHON={shlex.quote(shlex.join(batch_python(cluster)))}",
        f"source {shlex.quote(str(code / 'hdscale/cluster/batch.sh'))}",
        f"hdscale_begin {launch}",
    ]
    srun = ["--cpu-bind=none", "--kill-on-bad-exit=1", "--open-mode=append", *cluster.srun]
    if in_pyxis(cluster.container):
        srun.append(f"--container-image={cluster.container}")
    optional = {
        "partition": cluster.partition,
        "account": cluster.account,
        "qos": cluster.qos,
        "constraint": cluster.constraint,
        "mem": cluster.mem,
        "gpus_per_node": cluster.gpus_per_node or None,
    }
    return {
        "job_name": name,
        "nodes": cluster.nodes,
        "ntasks_per_node": cluster.ranks_per_node,
        "cpus_per_task": cluster.cpus_per_task,
        "time": cluster.minutes,
        "signal_delay_s": cluster.signal_delay,
        "array_parallelism": cluster.array_parallelism,
        "stderr_to_stdout": True,
        "setup": setup,
        "teardown": [f"hdscale_end $? {launch}"],
        "srun_args": srun,
        "wckey": None,  # submitit would set its own name, which sites that know wckeys refuse
        "additional_parameters": {"requeue": True, **cluster.sbatch},
        **{key: value for key, value in optional.items() if value is not None},
    }


def in_pyxis(container: str | None) -> bool:
    """Whether srun itself starts the container (pyxis)."""
    return bool(container) and not str(container).endswith(".sif")


def rank_python(cluster: ClusterSettings) -> list[str]:
    """The command that is Python for a rank: this interpreter, or the container's."""
    if not cluster.container:
        return [sys.executable]
    if in_pyxis(cluster.container):
        return ["python"]
    return ["apptainer", "exec", "--nv", str(cluster.container), "python"]


def batch_python(cluster: ClusterSettings) -> list[str]:
    """The command that is Python for the batch shell, which pyxis leaves outside of the container."""
    if in_pyxis(cluster.container):
        step = ["srun", "--nodes=1", "--ntasks=1", "--overlap", f"--container-image={cluster.container}"]
        return [*step, "python"]
    return rank_python(cluster)


def take_snapshot(folder: Path) -> Path:
    """Copy the package, and the checkout's configurations, into the launch's folder; returns the copy's root.

    Compiled extensions come along, caches do not.
    """
    root, copy = package_root(), folder / "code"
    ignore = shutil.ignore_patterns("__pycache__", "*.tmp")
    for name in ("hdscale", "configs", "ds_configs"):
        if name == "hdscale" or (root / "hdscale").parent.joinpath("pyproject.toml").exists():
            if (root / name).is_dir():
                shutil.copytree(root / name, copy / name, ignore=ignore, dirs_exist_ok=True)
    return copy


def submission_error(error: FailedJobError | FailedSubmissionError) -> UserError:
    """sbatch's refusal in one line."""
    lines = [line.strip() for line in str(error).splitlines() if "error:" in line]
    words = "; ".join(line.split("error:", 1)[1].strip() for line in lines) or one_line(error)
    return UserError(f"sbatch refuses the job: {words}")
