"""Submit a study's runs to SLURM: one job array of `hdscale launch` for each set of cluster settings."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from hdscale.cluster.records import LAUNCHES, launch_folder, read_launch, read_state
from hdscale.cluster.status import live_jobs
from hdscale.errors import EXIT_DONE
from hdscale.launch import check_runs
from hdscale.launch import submit as submit_launch
from hdscale.study.spec import Run, Study
from hdscale.study.store import Store, given_up, max_steps_of


def check_study(study: Study, local: bool) -> None:
    """What `hdscale train` would refuse, before the first run starts: data, model and engine of every run.

    Args:
        local: one process per run, whatever `cluster` says.

    Raises:
        UserError: for the first run that would be refused.
    """
    configs = [one.config for one in study.runs]
    if local:
        configs = [
            dataclasses.replace(
                config, cluster=dataclasses.replace(config.cluster, nodes=1, gpus_per_node=0, tasks_per_node=1)
            )
            for config in configs
        ]
    check_runs(configs)


def submit(study: Study, store: Store, dry_run: bool = False) -> int:
    """Submit the runs that are not done, queued, running or failed for good.

    Pre-empted jobs requeue themselves. A run that failed is submitted again at the next start of the study, at most
    `limits.retries` times.

    Returns:
        exit code.
    """
    queued = live_runs(store)
    fresh = [run for run in study.runs if run.name not in queued and not is_over(study, store, run)]
    if not fresh:
        print(f"nothing to submit: {len(queued)} runs are queued or running")
        return EXIT_DONE
    for number, group in enumerate(by_cluster(fresh)):
        config = group[0].config
        name = free_name(store, study.name, number)
        own = dataclasses.replace(config, run=dataclasses.replace(config.run, name=name, dir=str(store.folder)))
        code = submit_launch(own, [(run.config, points(run)) for run in group], dry_run=dry_run)
        if code != EXIT_DONE or dry_run:
            continue
        for run in group:
            store.note(run.name, "start", launch=name)
    return EXIT_DONE


def is_over(study: Study, store: Store, run: Run) -> bool:
    """Whether a run is done, or has failed too often."""
    note_ends(store, run.name)
    status = store.status(run.name, max_steps_of(run))
    return status.state == "done" or given_up(status, study.limits.retries)


def points(run: Run) -> list[str]:
    """What the launch's record says of a run."""
    return [f"{axis}={point}" for axis, point in run.point.items()]


def by_cluster(runs: list[Run]) -> list[list[Run]]:
    """Runs grouped by their cluster settings: the jobs of an array are alike."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        key = json.dumps(dataclasses.asdict(run.config.cluster), sort_keys=True, default=str)
        groups.setdefault(key, []).append(run)
    return list(groups.values())


def free_name(store: Store, name: str, number: int) -> str:
    """A name for a launch that no earlier start of the study has used: its record must stay for `--status`."""
    index = number + 1
    while (launch_folder(store.folder, f"{name}-{index}") / "launch.json").exists():
        index += 1
    return f"{name}-{index}"


def launches(store: Store) -> list[Path]:
    """Folders of the study's launches, oldest first."""
    found = (store.folder / LAUNCHES).glob("*/launch.json")
    return [path.parent for path in sorted(found, key=lambda path: path.stat().st_mtime)]


def live_runs(store: Store) -> dict[str, str]:
    """{run: queued or running} of the study's runs under SLURM."""
    found = {}
    for folder in launches(store):
        record = read_launch(folder)
        live = live_jobs(record)
        for index, entry in enumerate(record.runs):
            job = record.job_of(index)
            # pending jobs of an array are listed as one
            state = live.get(job) or live.get(f"{record.job}_*")
            if state:
                found[entry.name] = "running" if state == "RUNNING" else "queued"
    return found


def note_ends(store: Store, run: str) -> None:
    """Write down how a run's newest SLURM job ended, once, so that failures are counted as local ones are."""
    for folder in reversed(launches(store)):
        record = read_launch(folder)
        for index, entry in enumerate(record.runs):
            if entry.name != run:
                continue
            state = read_state(folder, index)
            key = f"{record.name}:{index}"
            known = {line.get("key") for line in store.lines(run)}
            if state.outcome in ("failed", "stalled") and key not in known:
                code = 1 if state.code in (None, 0) else state.code
                store.note(run, "end", code=code, note=f"exit code {code}: {state.reason}", key=key)
            return
