"""Submit the run of `hdscale train`, or a sweep of them, by submitit: on SLURM or on this machine."""

from __future__ import annotations

import dataclasses
import shutil
import time
from pathlib import Path

import submitit
import yaml
from submitit.core.utils import FailedJobError, FailedSubmissionError
from submitit.slurm.slurm import SlurmExecutor

from hdscale.cluster.checks import check_script, has_slurm
from hdscale.cluster.executors import (
    build_executor,
    script_text,
    submission_error,
    take_snapshot,
)
from hdscale.cluster.job import TrainingJob
from hdscale.cluster.records import (
    LAUNCHES,
    LaunchRecord,
    RunEntry,
    launch_folder,
    now,
    read_launch,
    read_state,
    write_launch,
)
from hdscale.cluster.status import live_jobs, show_status
from hdscale.cluster.sweep import expand
from hdscale.config import Config, load_config, to_dict
from hdscale.errors import EXIT_BROKEN, EXIT_DONE, EXIT_PREEMPTED, EXIT_USER_ERROR, UserError
from hdscale.files import package_root


def plan_runs(path: str, overrides: list[str], sweep: list[str]) -> tuple[Config, list[tuple[Config, list[str]]]]:
    """(the launch's own configuration, [(configuration, swept settings) of each run])."""
    config = load_config(path, overrides)
    if config.run.name == LAUNCHES:
        raise UserError(f"run.name={LAUNCHES} is taken: the folder of that name has the records of launches")
    if not sweep:
        return config, [(config, [])]
    # the runs of a sweep share a folder that is called after the launch
    shared = f"run.dir={Path(config.run.dir) / config.run.name}"
    return config, [
        (load_config(path, [*overrides, *swept, shared, f"run.name={name}"]), swept) for name, swept in expand(sweep)
    ]


def check_runs(configs: list[Config]) -> None:
    """What `hdscale train` checks first, and every model built without memory (meta device).

    Raises:
        UserError: for whatever a compute node would refuse, as far as it can be known here.
    """
    # torch and transformers: `hdscale launch --help` and --status start without them
    from hdscale.data.sources import check_splits
    from hdscale.modeling import build_model
    from hdscale.resolve import resolve

    seen = []
    for config in configs:
        # runs that differ in seed or place alone need one check
        one = dataclasses.replace(config, run=dataclasses.replace(config.run, seed=0, name="", dir=""))
        if one not in seen:
            seen.append(one)
            resolved = resolve(config, config.cluster.nodes * config.cluster.ranks_per_node)
            check_splits(resolved.tasks.all, config.data)
            build_model(resolved.model, device="meta")


def submit(config: Config, runs: list[tuple[Config, list[str]]], fresh: bool = False, dry_run: bool = False) -> int:
    """Submit the runs as one job, or as one array; with the executors local and debug, wait for them.

    Args:
        config: of the launch itself: its name, folder and `cluster` settings.
        runs: (configuration, swept settings) of each run.
        fresh: start anew; an earlier run of the name is moved aside.
        dry_run: print the script, submit nothing.

    Returns:
        exit code.
    """
    cluster = config.cluster
    folder = launch_folder(config.run.dir, config.run.name).absolute()
    code = folder / "code" if cluster.snapshot else package_root()
    executor = build_executor(cluster, folder, config.run.name, code, dry_run)
    script = ""
    if isinstance(executor, SlurmExecutor):
        script = script_text(executor, len(runs))
        if has_slurm():
            check_script(script)
    if dry_run:
        print(script or f"{len(runs)} runs with the {cluster.executor} executor; it needs no script")
        return EXIT_DONE
    refuse_live(folder)
    record = write_files(config, runs, folder)
    if cluster.snapshot:
        take_snapshot(folder)
    functions = [TrainingJob(str(folder), index, fresh) for index in range(len(runs))]
    if cluster.executor != "slurm":
        return run_here(executor, functions, record, folder, cluster.array_parallelism)
    try:
        jobs = executor.map_array(TrainingJob.__call__, functions)
    except (FailedJobError, FailedSubmissionError) as error:
        raise submission_error(error) from error
    record.job = jobs[0].job_id.split("_")[0]
    write_launch(folder, record)
    print(f"submitted {record.name} as job {record.job} ({len(runs)} {'run' if len(runs) == 1 else 'runs'})")
    where = "" if config.run.dir == "runs" else f" --dir {config.run.dir}"
    print(f"hdscale launch --status {record.name}{where}    # or --logs, --cancel")
    return EXIT_DONE


def refuse_live(folder: Path) -> None:
    """Raise where jobs of a launch of this name are queued or running: two would write to the same folder."""
    if not (folder / "launch.json").exists():
        return
    record = read_launch(folder)
    if live_jobs(record):
        raise UserError(
            f"{record.name} is still queued or running (job {record.job}); "
            f"hdscale launch --cancel {record.name}, or choose another run.name"
        )


def write_files(config: Config, runs: list[tuple[Config, list[str]]], folder: Path) -> LaunchRecord:
    """Write the record, and the resolved configuration of every run: later edits change no queued job."""
    entries = []
    for index, (one, swept) in enumerate(runs):
        path = folder / "configs" / f"{index}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        if one.cluster.snapshot and one.deepspeed:
            one = dataclasses.replace(one, deepspeed=keep_copy(one.deepspeed, path.parent))
        path.write_text(yaml.safe_dump(to_dict(one), sort_keys=False, allow_unicode=True))
        entries.append(RunEntry(one.run.name, str((Path(one.run.dir) / one.run.name).absolute()), str(path), swept))
    for stale in [*folder.glob("state.*.json"), *folder.glob("error.*.txt")]:
        stale.unlink()
    record = LaunchRecord(config.run.name, config.cluster.executor, entries, "", now(), config.cluster.max_requeues)
    write_launch(folder, record)
    return record


def keep_copy(name: str, folder: Path) -> str:
    """Copy a DeepSpeed configuration to where no edit of the checkout reaches it."""
    source = next(path for path in (Path(name), package_root() / name) if path.is_file())
    copy = folder.absolute() / source.name
    shutil.copyfile(source, copy)
    return str(copy)


def run_here(
    executor: submitit.Executor,
    functions: list[TrainingJob],
    record: LaunchRecord,
    folder: Path,
    parallel: int,
) -> int:
    """Run on this machine, so many at a time, and wait; the exit code is that of the worst run."""
    waiting, started = list(functions), []
    running: list[submitit.Job[int]] = []
    try:
        while waiting or running:
            while waiting and len(running) < parallel:
                job = executor.submit(waiting.pop(0))
                running.append(job)
                started.append(job.job_id)
                record.job = ",".join(started)
                write_launch(folder, record)
                print(f"started {record.runs[len(started) - 1].name}: {job.paths.stdout}", flush=True)
            # the debug executor runs its job when it is asked whether it is done
            running = [job for job in running if not job.done()]
            time.sleep(0.2 if running else 0)
    except KeyboardInterrupt:
        for job in running:
            job.cancel()
        raise
    show_status(str(folder.parents[1]), record.name)
    states = [read_state(folder, index) for index in range(len(functions))]
    return max((code for state in states if (code := worst(state.code))), default=EXIT_DONE)


def worst(code: int | None) -> int:
    """A run's exit code as one of hdscale's: a run without any was killed."""
    return code if code in (EXIT_DONE, EXIT_USER_ERROR, EXIT_PREEMPTED) else EXIT_BROKEN
