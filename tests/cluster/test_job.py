"""How a rank is run: as a process that gets signals and ends with its parent, or in this process for debugging."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from hdscale.cluster import job
from hdscale.commands import cli
from tests.helpers.places import ROOT
from tests.helpers.slurm_cluster.cluster import wait_until

RUN = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job starts with it ignored
from hdscale.cluster.job import run_with_signals
sys.exit(run_with_signals([sys.executable, *sys.argv[1:]]))
"""
RANK = """
import os, signal, sys, time
signal.signal(signal.SIGUSR2, lambda number, frame: sys.exit(75))
print(os.getpid(), flush=True)
time.sleep(60)
"""


@pytest.fixture
def running() -> Iterator[tuple[subprocess.Popen[str], int]]:
    """(a process that runs a rank, the rank's process id)."""
    with subprocess.Popen(
        [sys.executable, "-c", RUN, "-c", RANK], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as parent:
        assert parent.stdout is not None
        yield parent, int(parent.stdout.readline())
        parent.kill()


def alive(process: int) -> bool:
    """Whether a process is there and has not ended."""
    try:
        return "Z" not in Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False


def test_a_signal_reaches_the_rank_and_its_exit_code_comes_back(running: tuple[subprocess.Popen[str], int]) -> None:
    parent, _ = running
    parent.send_signal(signal.SIGUSR2)
    assert parent.wait(30) == 75


def test_a_killed_rank_has_the_exit_code_of_a_shell(running: tuple[subprocess.Popen[str], int]) -> None:
    parent, rank = running
    os.kill(rank, signal.SIGKILL)
    assert parent.wait(30) == 128 + signal.SIGKILL


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_cancelled_launch_leaves_no_rank_behind(number: int, running: tuple[subprocess.Popen[str], int]) -> None:
    """submitit's local executor interrupts the process that it has started, and kills it a second later."""
    parent, rank = running
    parent.send_signal(number)
    assert parent.wait(30) == -number
    wait_until(lambda: not alive(rank), 10, "the rank is still there")


def test_the_debug_executor_runs_in_this_process(capsys: pytest.CaptureFixture[str]) -> None:
    before = sys.argv
    assert job.run_in_process(["python", "-P", "-m", "hdscale", "train", "--config", "/no/such/file"]) == 2
    assert "/no/such/file" in capsys.readouterr().err
    assert sys.argv is before


def test_the_debug_executor_leaves_exceptions_to_the_debugger(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> int:
        raise RuntimeError(" ".join(sys.argv))

    monkeypatch.setattr(cli, "main", broken)
    with pytest.raises(RuntimeError, match="hdscale train --config x"):
        job.run_in_process(["python", "-P", "-m", "hdscale", "train", "--config", "x"])
