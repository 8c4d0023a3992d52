"""Ranks under the real `deepspeed` launcher: exit codes, and its death."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hdscale.engine.checkpoint import newest_whole_checkpoint
from tests.helpers.places import TESTS

pytestmark = [pytest.mark.slow, pytest.mark.landing]

HELPERS = TESTS / "helpers"
DEADLINE = 240.0


def wait_for(what, deadline=DEADLINE):
    """Until `what()` is true."""
    end = time.monotonic() + deadline
    while not what():
        assert time.monotonic() < end, f"gave up after {deadline:.0f} s"
        time.sleep(0.1)


def runs(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture
def launched(tmp_path):
    """The launcher, with two ranks that are training, and their process ids."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    script = str(HELPERS / "launched_by_deepspeed.py")
    command = [sys.executable, str(Path(sys.executable).parent / "deepspeed"), "--num_accelerators", "2"]
    launcher = subprocess.Popen(
        [*command, script, str(tmp_path)],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    metrics = tmp_path / "metrics.jsonl"
    ranks: list[int] = []
    try:
        wait_for(lambda: (metrics.exists() and metrics.stat().st_size) or launcher.poll() is not None)
        assert launcher.poll() is None, launcher.stdout.read().decode()
        ranks = [int((tmp_path / f"rank{rank}.pid").read_text()) for rank in range(2)]
        yield launcher, ranks, tmp_path
    finally:
        for pid in [launcher.pid, *ranks]:
            if runs(pid):
                os.kill(pid, signal.SIGKILL)
        launcher.stdout.close()
        launcher.wait()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_ranks_save_and_leave_when_the_launcher_dies(launched, number):
    launcher, ranks, folder = launched
    launcher.send_signal(number)
    # its output pipe goes too, as a terminal would
    launcher.stdout.close()
    launcher.wait(60)
    wait_for(lambda: not any(runs(pid) for pid in ranks), 60)
    assert newest_whole_checkpoint(folder) is not None
    assert "stopped by" in (folder / "train.log").read_text()


def test_exit_code_75_comes_through_the_launcher(launched):
    launcher, ranks, folder = launched
    os.kill(ranks[1], signal.SIGTERM)
    output, _ = launcher.communicate(timeout=120)
    assert launcher.returncode == 75, output.decode()
    assert newest_whole_checkpoint(folder) is not None
    assert (folder / "rank0.left").exists() and (folder / "rank1.left").exists()
