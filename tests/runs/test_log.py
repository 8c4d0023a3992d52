"""The run's log: metrics.jsonl that reads as if the run had never stopped, and what optional loggers need."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from hdscale.errors import UserError
from hdscale.runs import log as progress
from hdscale.runs.log import RunLog, StepResult, cut_back, duration
from hdscale.runs.provenance import Computation, git_commit, provenance
from hdscale.runs.settings import RunSettings


def open_log(folder: Path, main: bool = True, **run: Any) -> RunLog:
    return RunLog(folder, RunSettings(**run), 2, active=main, memory=lambda: 1.5)


def log_steps(folder, first, last, start=None, main=True):
    with open_log(folder, main) as log:
        log.start(first - 1 if start is None else start, 8)
        for step in range(first, last + 1):
            result = StepResult(step, 1.0 / step, 10, 0.5, 0.1)
            log.step(result, samples=32 * step, tokens=500 * step, seconds=0.25 * step)
            if step % 4 == 0:
                log.evaluation(
                    step, "validation", {"cola": {"matthews": step * 1.0}}, {"average": step * 1.0}, step * 1.0
                )
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_lines_are_flat_and_rates_are_those_of_training(tmp_path):
    lines = log_steps(tmp_path, 1, 8)
    trained = [line for line in lines if line["kind"] == "train"]
    assert [line["step"] for line in trained] == [1, 2, 4, 6, 8]
    assert all(not isinstance(value, dict | list) for line in lines for value in line.values())
    assert trained[-1]["loss"] == 1 / 8 and trained[-1]["target_tokens"] == 10 and trained[-1]["memory_gb"] > 0
    assert trained[-1]["samples_per_second"] == 128.0 and trained[-1]["tokens_per_second"] == 2000.0
    (first, _) = [line for line in lines if line["kind"] == "evaluation"]
    assert first["cola/matthews"] == 4.0 and first["average"] == 4.0 and first["split"] == "validation"
    text = (tmp_path / "train.log").read_text()
    assert "step 8/8  loss 0.1250  128.0 samples/s  2000 tokens/s" in text and "cola 8.00" in text


def test_resume_cuts_back_and_goes_on(tmp_path):
    whole = log_steps(tmp_path / "whole", 1, 8)
    log_steps(tmp_path / "cut", 1, 7)
    with (tmp_path / "cut" / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 8, "los')
    resumed = log_steps(tmp_path / "cut", 5, 8)

    def plain(lines):
        timing = ("samples_per_second", "tokens_per_second", "memory_gb")
        return [{key: value for key, value in line.items() if key not in timing} for line in lines]

    assert plain(resumed) == plain(whole)


def test_an_evaluation_that_is_done_again_is_not_written_twice(tmp_path):
    log_steps(tmp_path, 1, 4)
    with open_log(tmp_path) as log:
        log.start(4, 8)
        log.evaluation(4, "validation", {}, {"average": 4.0})
        log.evaluation(4, "test", {}, {"average": 5.0})
    splits = [json.loads(line).get("split") for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert splits == [None, None, None, "validation", "test"]


def test_lines_that_are_not_metrics_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"kind": "train", "step": 1}\n\xff\xfe\n[]\n{"step": 2}\n{"kind": "train", "step": 1}\n')
    assert cut_back(path, 5) == {("train", 1, "")}
    assert path.read_text() == '{"kind": "train", "step": 1}\n'


def test_other_ranks_write_nothing(tmp_path):
    assert log_steps(tmp_path, 1, 4, main=False) == []
    assert list(tmp_path.iterdir()) == []


def test_an_error_is_in_the_log(tmp_path):
    with pytest.raises(UserError), open_log(tmp_path) as log:
        log.warning("one")
        raise UserError("the disk is full")
    text = (tmp_path / "train.log").read_text()
    assert "warning: one" in text and "UserError: the disk is full" in text


def test_a_full_disk_does_not_stop_one_rank_alone(tmp_path, capsys):
    class Broken:
        def write(self, text):
            raise OSError(28, "No space left on device")

        def close(self):
            pass

    with open_log(tmp_path) as log:
        log.start(0, 8)
        log._files["metrics.jsonl"] = Broken()
        log.step(StepResult(1, 1.0, 10, 0.5, 0.1), samples=1, tokens=1, seconds=1.0)
        log.step(StepResult(2, 1.0, 10, 0.5, 0.1), samples=2, tokens=2, seconds=2.0)
    printed = capsys.readouterr().out
    assert printed.count("metrics.jsonl cannot be written (No space left on device)") == 1


def test_a_lost_console_does_not_stop_a_run(tmp_path):
    """The pipe that stdout goes to is closed before the first line."""
    script = (
        "import sys; from hdscale.runs.log import RunLog; from hdscale.runs.settings import RunSettings\n"
        "log = RunLog(sys.argv[1], RunSettings(), 1, active=True, memory=float)\n"
        "sys.stdin.readline()\n"
        "[log.info('x' * 5000) for _ in range(50)]\n"
        "log.info('still here'); log.close()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    process.stdout.close()
    process.communicate(b"go\n")
    assert process.returncode == 0
    assert "still here" in (tmp_path / "train.log").read_text()


@pytest.mark.parametrize("run", [{"tensorboard": True}, {"wandb": "project"}])
def test_missing_loggers_are_named(tmp_path, monkeypatch, run):
    monkeypatch.setattr(progress.importlib.util, "find_spec", lambda name: None)
    for main in (True, False):
        with pytest.raises(UserError, match="pip install (tensorboard|wandb)"):
            open_log(tmp_path, main, **run)


def test_tensorboard_events(tmp_path):
    pytest.importorskip("tensorboard")
    with open_log(tmp_path, tensorboard=True) as log:
        log.start(0, 8)
        log.step(StepResult(1, 2.5, 10, 0.5, 0.1), samples=1, tokens=1, seconds=1.0)
        log.evaluation(1, "validation", {"cola": {"matthews": 3.0}}, {"average": 4.0})
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Scalars("train/loss")[0].value == 2.5
    assert events.Scalars("validation/cola/matthews")[0].step == 1


def test_duration():
    assert duration(0) == "0:00:00" and duration(7509.9) == "2:05:09"


def test_provenance(tmp_path):
    computation = Computation("a processor", "none", 1, 1)
    found = json.loads(json.dumps(provenance(computation, 5, "bf16")))
    assert found["seed"] == 5 and found["versions"]["torch"] == torch.__version__ and found["device"]
    assert git_commit(tmp_path) is None
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    author = ["-c", "user.name=n", "-c", "user.email=e@example.org"]
    (tmp_path / "file").write_text("1")
    subprocess.run(["git", "-C", str(tmp_path), "add", "file"], check=True)
    subprocess.run(["git", "-C", str(tmp_path), *author, "commit", "-q", "-m", "one"], check=True)
    commit = git_commit(tmp_path)
    assert len(commit) == 40
    (tmp_path / "file").write_text("2")
    assert git_commit(tmp_path) == f"{commit}-dirty"
