"""A study on SLURM, with the launcher's submission and squeue replaced: what is submitted, grouped, and left alone."""

from __future__ import annotations

import subprocess
import sys

import pytest

import hdscale.launch
import hdscale.study.submit
from hdscale.cluster.records import LaunchRecord, RunEntry, RunState, launch_folder, write_launch, write_state
from hdscale.study.spec import load_study
from hdscale.study.status import statuses
from hdscale.study.store import Store
from hdscale.study.submit import submit
from tests.helpers.places import ROOT
from tests.helpers.study_files import write_study


@pytest.fixture
def cluster(monkeypatch):
    """A stand-in for SLURM: `submitted` [[run names]], `live` {job: state}."""

    class Cluster:
        submitted: list[list[str]] = []
        live: dict[str, str] = {}

    state = Cluster()
    state.submitted = []

    def launch(config, runs, dry_run):
        assert not dry_run
        names = [one.run.name for one, _ in runs]
        assert all(one.cluster == config.cluster for one, _ in runs)
        state.submitted.append(names)
        job = str(100 + len(state.submitted))
        entries = [RunEntry(name, f"{config.run.dir}/{name}", "") for name in names]
        write_launch(
            launch_folder(config.run.dir, config.run.name), LaunchRecord(config.run.name, "slurm", entries, job)
        )
        return 0

    monkeypatch.setattr(hdscale.study.submit, "submit_launch", launch)
    monkeypatch.setattr(hdscale.study.submit, "live_jobs", lambda record: {
        job: word for job, word in state.live.items() if job.split("_")[0] == record.job
    })  # fmt: skip
    return state


def opened(tmp_path):
    axes = {
        "size": {
            "small": {"model.name": "tiny-1", "cluster.gpus_per_node": 1},
            "big": {"model.name": "tiny-4", "cluster.gpus_per_node": 8},
        },
        "run.seed": [1, 2],
    }
    study = load_study(write_study(tmp_path, axes=axes, limits={"retries": 1}))
    store = Store(study.folder)
    store.open(study)
    return study, store


def test_an_array_for_each_set_of_cluster_settings(tmp_path, cluster):
    study, store = opened(tmp_path)
    assert submit(study, store) == 0
    assert cluster.submitted == [["small_seed1", "small_seed2"], ["big_seed1", "big_seed2"]]


def test_only_what_is_neither_done_nor_live_is_submitted_again(tmp_path, cluster):
    study, store = opened(tmp_path)
    submit(study, store)
    cluster.live = {"101_1": "RUNNING", "102_*": "PENDING"}
    (store.run_folder("small_seed1")).mkdir()
    (store.run_folder("small_seed1") / "results.json").write_text('{"average": 50.0, "steps": 4}')
    states = {name: status.state for name, status in statuses(store).items()}
    assert states == {"small_seed1": "done", "small_seed2": "running", "big_seed1": "queued", "big_seed2": "queued"}
    submit(study, store)
    assert len(cluster.submitted) == 2
    cluster.live = {}
    submit(study, store)
    assert cluster.submitted[2:] == [["small_seed2"], ["big_seed1", "big_seed2"]]


def test_failures_are_counted_and_a_run_is_given_up(tmp_path, cluster):
    study, store = opened(tmp_path)
    for _ in range(4):
        submit(study, store)
        for folder in (store.folder / "launches").iterdir():
            write_state(folder, 0, RunState(outcome="failed", code=1, reason="it broke"))
    # the first of each array fails at its two starts (retries 1) and is not submitted again
    assert sum("small_seed1" in names for names in cluster.submitted) == 2
    assert statuses(store)["small_seed1"].state == "failed"
    assert "it broke" in statuses(store)["small_seed1"].note


@pytest.mark.slow
@pytest.mark.landing
def test_a_study_on_a_real_slurm(tmp_path, monkeypatch):
    """Two tiny trainings as one array; a second start submits nothing."""
    import os

    from tests.helpers.slurm_cluster.cluster import ClusterUnavailable, SlurmCluster, wait_until

    root = ROOT
    try:
        slurm = SlurmCluster(tmp_path / "slurm")
        slurm.start()
    except ClusterUnavailable as reason:
        pytest.skip(str(reason))
    try:
        file = write_study(
            tmp_path,
            axes={"run.seed": [1, 2]},
            set={
                "model.name": "tiny-1",
                "data": {"tasks": ["quickstart"], "max_source_length": 32, "max_target_length": 8, "fraction": 0.05},
                "data.cache": str(tmp_path / "cache"),
                "train": {"max_steps": 3, "global_batch_size": 8, "dtype": "fp32", "warmup_steps": 1},
                "eval": {"every": 0, "select": "last", "test_limit": 8, "batch_size": 8},
                "deepspeed": "ds_configs/zero2_fp32.json",
                "cluster": {"gpus_per_node": 0, "cpus_per_task": 1, "time": "15"},
            },
        )
        environment = {**os.environ, **slurm.env, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        command = [sys.executable, "-m", "hdscale", "study", str(file)]
        first = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=300)
        assert first.returncode == 0, first.stdout + first.stderr
        assert "2 runs" in first.stdout
        store = Store(tmp_path / "runs" / "trial")
        wait_until(
            lambda: all(store.results(name) for name in ("seed1", "seed2")),
            600,
            "the two runs are not done",
            slurm.logs,
        )
        wait_until(lambda: not slurm.output("squeue", "--noheader"), 120, "the queue is not empty", slurm.logs)
        again = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=300)
        assert again.returncode == 0 and "nothing to submit" in again.stdout, again.stdout + again.stderr
        shown = subprocess.run(
            [*command, "--status"], cwd=root, env=environment, capture_output=True, text=True, timeout=300
        )
        assert "2 runs: 2 done" in shown.stdout
    finally:
        slurm.stop()
