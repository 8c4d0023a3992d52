"""`hdscale launch`: the run of `hdscale train`, by submitit, on SLURM or on this machine.

hdscale launch --config configs/glue_xl.yaml cluster.nodes=4 cluster.partition=gpu
hdscale launch --config configs/glue_base.yaml --sweep method.decoder.dim=32,64 run.seed=1..5
hdscale launch --status glue_base      # --logs, --cancel
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import time
from pathlib import Path

import submitit
import yaml
from submitit.core.utils import FailedJobError, FailedSubmissionError

from hdscale.cluster.checks import check_script, check_slurm, has_slurm
from hdscale.cluster.executors import (
    build_executor,
    package_root,
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
from hdscale.cluster.status import cancel, live_jobs, show_launches, show_logs, show_status
from hdscale.cluster.sweep import expand
from hdscale.config import Config, load_config, to_dict
from hdscale.errors import EXIT_DONE, EXIT_USER_ERROR, UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    from hdscale.commands.arguments import add_config_arguments

    add_config_arguments(parser, required=False)
    parser.add_argument("--sweep", nargs="+", metavar="key=a,b", default=[], help="one job array over all combinations")
    parser.add_argument("--dry-run", action="store_true", help="check, print the sbatch script, submit nothing")
    parser.add_argument("--fresh", action="store_true", help="start anew; an earlier run of this name is moved aside")
    which = parser.add_mutually_exclusive_group()
    # '' stands for all launches
    which.add_argument("--status", nargs="?", const="", metavar="NAME", help="state of a launch (no NAME: list them)")
    which.add_argument("--logs", metavar="NAME", help="last lines of each run's log")
    which.add_argument("--cancel", metavar="NAME", help="cancel what is queued or running")
    parser.add_argument("--lines", type=int, default=20, help="lines that --logs shows of a run (default: 20)")
    parser.add_argument("--dir", default="runs", help="run.dir of the launch that --status, --logs, --cancel mean")


def run(args: argparse.Namespace) -> int:
    """The verb."""
    if args.status is not None:
        return show_status(args.dir, args.status) if args.status else show_launches(args.dir)
    if args.logs:
        return show_logs(args.dir, args.logs, args.lines)
    if args.cancel:
        return cancel(args.dir, args.cancel)
    if not args.config:
        raise UserError("nothing to launch: name a configuration with --config FILE, or --status NAME")
    config, runs = plan_runs(args.config, args.overrides, args.sweep)
    config.cluster.check_executor()
    if config.cluster.executor == "slurm" and (has_slurm() or not args.dry_run):
        check_slurm(config.cluster)
    check_runs([one for one, _ in runs])
    return launch(config, runs, args.fresh, args.dry_run)


def plan_runs(path: str, overrides: list[str], sweep: list[str]) -> tuple[Config, list[tuple[Config, list[str]]]]:
    """(the launch's own configuration, [(configuration, swept settings) of each run])."""
    config = load_config(path, overrides)
    if config.run.name == LAUNCHES:
        raise UserError(f"run.name={LAUNCHES} is taken: the folder of that name holds the records of launches")
    if not sweep:
        runs = [(config, [])]
    else:
        # the runs of a sweep share a folder that is called after the launch
        shared = f"run.dir={Path(config.run.dir) / config.run.name}"
        runs = [
            (load_config(path, [*overrides, *swept, shared, f"run.name={name}"]), swept)
            for name, swept in expand(sweep)
        ]
    return config, runs


def check_runs(configs: list[Config]) -> None:
    """What `hdscale train` checks first, and every model built without memory (meta device).

    Raises:
        UserError: for whatever a compute node would refuse, as far as it can be known here.
    """
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


def launch(config: Config, runs: list[tuple[Config, list[str]]], fresh: bool, dry_run: bool) -> int:
    """Submit the runs as one job, or as one array; with the executors local and debug, wait for them."""
    cluster = config.cluster
    folder = launch_folder(config.run.dir, config.run.name).absolute()
    code = folder / "code" if cluster.snapshot else package_root()
    executor = build_executor(cluster, folder, config.run.name, code, dry_run)
    script = ""
    if cluster.executor == "slurm":
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
    record = LaunchRecord(config.run.name, config.cluster.executor, entries, "", now())
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
    waiting, running, started = list(functions), [], []
    try:
        while waiting or running:
            while waiting and len(running) < parallel:
                job = executor.submit(waiting.pop(0))
                running.append(job)
                started.append(job.job_id)
                record.job = ",".join(started)
                write_launch(folder, record)
                print(f"started {record.runs[len(started) - 1].name}: {job.paths.stdout}", flush=True)
            # the debug executor runs its job here and now, in this process, when it is asked
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
    """An exit code of a run as one of ours: a run without any was killed."""
    return 1 if code is None or code not in (EXIT_DONE, EXIT_USER_ERROR, 75) else code
