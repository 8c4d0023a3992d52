"""`sbatch slurm/doctor.sh` on a real SLURM of two nodes, one of which differs from the other."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.helpers.places import ROOT
from tests.helpers.slurm_cluster.cluster import SlurmCluster, wait_until

pytestmark = pytest.mark.slow

TWO_NODES = ["--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=0", "--cpus-per-task=1", "--mem=3G", "--time=10"]
ELSEWHERE = """#!/bin/sh
# the python of the nodes: another one on n2
[ "$SLURMD_NODENAME" = n2 ] || exec {python} "$@"
{on_n2}
"""
AHEAD = "import time\nreal = time.time\ntime.time = lambda: real() + 5\n"


class Job:
    """Runs the script on two nodes; `planted` is what n2 does in place of starting python."""

    def __init__(self, slurm: SlurmCluster, place: Path) -> None:
        self.slurm, self.place = slurm, place
        self.runs = place / "runs"
        self.runs.mkdir(exist_ok=True)

    def __call__(self, name: str, planted: str = "", *settings: str, sbatch: tuple[str, ...] = ()) -> tuple[int, str]:
        """(exit code of the job, what it printed)."""
        log, folder = self.place / f"{name}.out", self.place / name
        folder.mkdir()
        python = folder / "python"
        python.write_text(ELSEWHERE.format(python=sys.executable, on_n2=planted or f'exec {sys.executable} "$@"'))
        python.chmod(0o755)
        env = self.slurm.env | {"PATH": f"{folder}:{self.slurm.env['PATH']}"}
        done = self.slurm.run(
            "sbatch", "--parsable", *TWO_NODES, "--nodelist=n1,n2", *sbatch, f"--output={log}", "slurm/doctor.sh",
            f"run.dir={self.runs}", f"data.cache={self.place / 'cache'}", *settings, cwd=ROOT, env=env,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        job = done.stdout.strip()
        ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")
        wait_until(lambda: self.slurm.field(job, "JobState") in ended, 200, f"{name} does not end", every=0.5)
        return int(self.slurm.field(job, "ExitCode").split(":")[0]), log.read_text()


@pytest.fixture(scope="module")
def job(slurm: SlurmCluster, place: Path) -> Job:
    return Job(slurm, place)


def last_line(text: str) -> str:
    return text.splitlines()[-1]


def test_two_nodes_are_ready(job: Job) -> None:
    code, text = job("ready")
    assert code == 0
    assert re.fullmatch(
        r"ready: 2 nodes, 2 processes, no GPUs, all-reduce \(gloo\) [\d.e+-]+ GB/s across nodes", last_line(text)
    )
    for line in ("n1: 1 process, ", "n2: 1 process, ", f"run folder {job.runs}: seen by all nodes, ", "clocks: n2 "):
        assert any(found.startswith(line) for found in text.splitlines()), text
    assert list(job.runs.iterdir()) == []


def test_a_node_with_another_version_another_time_and_without_the_folder(job: Job, place: Path) -> None:
    planted = place / "planted"
    (planted / "datasets-0.0.1.dist-info").mkdir(parents=True)
    (planted / "datasets-0.0.1.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: datasets\nVersion: 0.0.1\n"
    )
    (planted / "sitecustomize.py").write_text(AHEAD)
    hides = subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode == 0
    mount = f"unshare --mount sh -c 'mount -t tmpfs none {job.runs} && exec \"$@\"' sh" if hides else ""
    code, text = job("differs", f'PYTHONPATH={planted}:$PYTHONPATH exec {mount} {sys.executable} "$@"')
    verdict = last_line(text)
    assert code == 1 and verdict.startswith("not ready: "), text
    assert re.search(r"datasets: n1 has \S+, n2 has 0.0.1", verdict)
    assert "n2: its clock is 5.0 s ahead of n1's" in verdict
    if hides:
        assert f"n2: does not see the run folder {job.runs} of n1" in verdict
    assert verdict.count("; ") == 1 + hides


def test_a_node_that_does_not_start_is_named(job: Job) -> None:
    code, text = job("absent", "exit 127", "cluster.rendezvous_timeout=20")
    assert code == 127
    assert re.fullmatch(r"not ready: after 20 s at n1:\d+, rank 1 of 2 is missing \(on n2\)", last_line(text)), text


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPUs of this SLURM are pretended, and torch sees real ones")
def test_gpus_that_torch_does_not_see(job: Job) -> None:
    """A build of torch for CPUs on every node is no reason to be ready without GPUs."""
    code, text = job("unseen", sbatch=("--gpus-per-node=1",))
    assert code == 1
    assert re.fullmatch(r"not ready: (n[12]: GPUs from SLURM: 1, seen by torch \S+: none(; )?){2}", last_line(text)), (
        text
    )


def test_a_mistake_is_one_line(job: Job) -> None:
    code, text = job("mistake", "", "run.dri=x")
    assert code == 2
    assert text.count("hdscale: error: ") == 1 and "did you mean 'run.dir'?" in text
    assert last_line(text).startswith("not ready: ")


def test_the_script_as_it_is(slurm: SlurmCluster) -> None:
    done = slurm.run("sbatch", "--test-only", "slurm/doctor.sh", cwd=ROOT)
    assert done.returncode == 0 and "using 64 processors" in done.stderr, done.stderr
