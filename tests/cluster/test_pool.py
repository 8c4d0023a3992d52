"""The pool of local processes: how many at a time, what each is given, time limits, the stop."""

from __future__ import annotations

import os
import signal
import sys
import time

import pytest

from hdscale.cluster import pool as pool_module
from hdscale.cluster.pool import Pool, how_it_ended, last_words


def python(script: str) -> list[str]:
    return [sys.executable, "-c", script]


def wait_for_end(pool: Pool, seconds: float = 30.0) -> list:
    ended, end = [], time.monotonic() + seconds
    while pool.jobs:
        assert time.monotonic() < end, "they never ended"
        pool.stop_overdue()
        ended += pool.ended()
        time.sleep(0.02)
    return ended


@pytest.fixture
def gpus(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)


def test_jobs_share_gpus_and_cores_and_append_to_their_logs(tmp_path, gpus):
    pool, log = Pool(2), tmp_path / "log"
    log.write_text("before\n")
    show = "import os; print(os.environ['CUDA_VISIBLE_DEVICES'], os.environ['OMP_NUM_THREADS'])"
    pool.start("one", python(show), log)
    pool.start("two", python(show), tmp_path / "other")
    jobs = wait_for_end(pool)
    assert sorted((job.name, job.code) for job in jobs) == [("one", 0), ("two", 0)]
    threads = max(1, (os.cpu_count() or 1) // 2)
    assert log.read_text() == f"before\n3 {threads}\n"
    assert (tmp_path / "other").read_text() == f"5 {threads}\n"


def test_a_job_past_its_deadline_is_told_to_stop_and_then_killed(tmp_path, monkeypatch):
    pool = Pool(2)
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('on', flush=True); time.sleep(60)"
    pool.start("deaf", python(deaf), tmp_path / "deaf", minutes=1e-3)
    pool.start("quick", python("pass"), tmp_path / "quick", minutes=1.0)
    while "on" not in (tmp_path / "deaf").read_text():
        time.sleep(0.02)
    monkeypatch.setattr(pool_module, "GRACE_SECONDS", 0.5)
    found = {job.name: job for job in wait_for_end(pool)}
    assert found["deaf"].overdue and found["deaf"].code == -signal.SIGKILL
    assert not found["quick"].overdue and found["quick"].code == 0


def test_a_stop_waits_for_every_job(tmp_path):
    pool = Pool(2)
    saving = (
        "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(75)); "
        "print('on', flush=True); time.sleep(60)"
    )
    for name in ("one", "two"):
        pool.start(name, python(saving), tmp_path / name)
    while not all("on" in (tmp_path / name).read_text() for name in ("one", "two")):
        time.sleep(0.02)
    assert [(job.name, job.code) for job in pool.stop()] == [("one", 75), ("two", 75)]
    assert not pool.jobs


def test_the_last_words_are_the_error_line_where_there_is_one(tmp_path):
    log = tmp_path / "log"
    assert last_words(log) == "no output"
    log.write_text("one\ntwo\n\n")
    assert last_words(log) == "two"
    log.write_text("hdscale: error: no such thing\nsomething else\n")
    assert last_words(log) == "no such thing"
    assert how_it_ended(-9) == "killed by SIGKILL" and how_it_ended(2) == "exit code 2"
