"""The local runner with a stand-in for training: order, resume, retries, kills at any time, changed files."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hdscale.errors import UserError
from hdscale.study.runner import LocalRunner
from hdscale.study.spec import load_study
from hdscale.study.store import Store
from tests.helpers.study_files import write_study

SEEDS = {"run.seed": [1, 2, 3]}

# It trains one step each tenth of a second, checkpoints every step, resumes, and stops at SIGTERM with 75; `mood` makes
# it fail.
TRAINER = """
import json, os, pathlib, signal, sys, time, yaml
config = yaml.safe_load(pathlib.Path(sys.argv[1]).read_text())
run = pathlib.Path(config["run"]["dir"]) / config["run"]["name"]
run.mkdir(parents=True, exist_ok=True)
mood_file = run.parent / "mood"
mood = mood_file.read_text() if mood_file.exists() else ""
with (run / "starts").open("a") as file:
    file.write("x")
starts = len((run / "starts").read_text())
stop = []
signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
if mood == "user error":
    print("hdscale: error: no such thing; choose another", file=sys.stderr)
    sys.exit(2)
if mood == "crash once" and starts == 1 or mood == "crash":
    raise RuntimeError("out of luck")
done = len(list(run.glob("checkpoints/step_*")))
for step in range(done + 1, config["train"]["max_steps"] + 1):
    time.sleep(float(os.environ.get("STEP_SECONDS", "0.01")))
    (run / "checkpoints" / f"step_{step:08d}").mkdir(parents=True)
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"kind": "train", "step": step, "loss": 1.0 / step, "seconds": step}) + "\\n")
    if stop:
        sys.exit(75)
(run / "results.json").write_text(json.dumps({"average": 50.0, "steps": step, "seconds": 1.0}))
"""


@pytest.fixture
def trainer(tmp_path):
    path = tmp_path / "trainer.py"
    path.write_text(TRAINER)
    return lambda config: [sys.executable, str(path), str(config)]


def opened(folder: Path, **changes):
    study = load_study(write_study(folder, axes=SEEDS, **changes))
    store = Store(study.folder)
    store.open(study)
    return study, store


def starts_of(study, store) -> list[int]:
    return [len((store.run_folder(run.name) / "starts").read_text()) for run in study.runs]


def test_every_run_is_done_once_and_never_again(tmp_path, trainer):
    study, store = opened(tmp_path)
    lines: list[str] = []
    assert LocalRunner(study, store, 2, lines.append, command=trainer).run() == 0
    assert starts_of(study, store) == [1, 1, 1]
    assert any(line.startswith("done") for line in lines) and not any("failed" in line for line in lines)
    assert LocalRunner(study, store, 2, lines.append, command=trainer).run() == 0
    assert starts_of(study, store) == [1, 1, 1]
    assert all(store.status(run.name, 4).state == "done" for run in study.runs)


def test_a_crash_is_tried_again_and_a_users_mistake_is_not(tmp_path, trainer):
    study, store = opened(tmp_path, limits={"retries": 1})
    (store.folder / "mood").write_text("crash once")
    assert LocalRunner(study, store, 3, lambda _: None, command=trainer).run() == 0
    assert starts_of(study, store) == [2, 2, 2]

    (tmp_path / "two").mkdir()
    study, store = opened(tmp_path / "two", limits={"retries": 5})
    (store.folder / "mood").write_text("user error")
    assert LocalRunner(study, store, 3, lambda _: None, command=trainer).run() == 1
    assert starts_of(study, store) == [1, 1, 1]
    status = store.status(study.runs[0].name, 4)
    assert status.state == "failed" and status.note == "exit code 2: no such thing; choose another"


def test_a_run_is_given_up_after_its_retries(tmp_path, trainer):
    study, store = opened(tmp_path, limits={"retries": 2})
    (store.folder / "mood").write_text("crash")
    lines: list[str] = []
    assert LocalRunner(study, store, 3, lines.append, command=trainer).run() == 1
    assert starts_of(study, store) == [3, 3, 3]
    assert "RuntimeError: out of luck" in store.status(study.runs[0].name, 4).note
    # asked for again, they get their attempts anew
    for run in study.runs:
        store.note(run.name, "retry")
    (store.folder / "mood").write_text("")
    assert LocalRunner(study, store, 3, lines.append, command=trainer).run() == 0


def test_a_run_that_takes_too_long_is_stopped(tmp_path, trainer, monkeypatch):
    monkeypatch.setenv("STEP_SECONDS", "0.2")
    study, store = opened(
        tmp_path,
        limits={"retries": 0, "minutes": 0.005},
        set={"data": {"tasks": ["quickstart"]}, "train.max_steps": 500},
    )
    assert LocalRunner(study, store, 3, lambda _: None, command=trainer).run() == 1
    assert "limits.minutes" in store.status(study.runs[0].name, 500).note


RUNNER = """
import sys
from pathlib import Path
from hdscale.study.runner import LocalRunner
from hdscale.study.spec import load_study
from hdscale.study.store import Store
study = load_study(sys.argv[1])
store = Store(study.folder)
store.open(study)
command = lambda config: [sys.executable, sys.argv[2], str(config)]
sys.exit(LocalRunner(study, store, 2, lambda text: print(text, flush=True), command=command).run())
"""


@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_killed_at_any_time_nothing_is_lost(tmp_path, trainer, kill):
    study, store = opened(tmp_path, set={"data": {"tasks": ["quickstart"]}, "train.max_steps": 12})
    environment = {**os.environ, "STEP_SECONDS": "0.15"}
    command = [sys.executable, "-c", RUNNER, str(study.file), str(tmp_path / "trainer.py")]

    def start():
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)

    first = start()
    wait_for(lambda: list(store.folder.glob("*/checkpoints/step_00000002")))
    first.send_signal(kill)
    first.communicate(timeout=60)
    assert first.returncode == (-signal.SIGKILL if kill == signal.SIGKILL else 75)
    second = start()
    output, _ = second.communicate(timeout=120)
    assert second.returncode == 0, output
    for run in study.runs:
        lines = [json.loads(line) for line in (store.run_folder(run.name) / "metrics.jsonl").read_text().splitlines()]
        # every step once: a run that outlived its runner was waited for, not started a second time beside itself
        assert [line["step"] for line in lines] == list(range(1, 13)), run.name


def test_two_runners_of_one_study_are_one_too_many(tmp_path, trainer):
    study, store = opened(tmp_path)
    lock = store.hold("study")
    try:
        with pytest.raises(UserError, match="being run by another process"):
            LocalRunner(study, store, 1, command=trainer).run()
    finally:
        os.close(lock)


def test_a_changed_file_is_refused_and_the_difference_shown(tmp_path, trainer):
    study, store = opened(tmp_path)
    assert LocalRunner(study, store, 3, lambda _: None, command=trainer).run() == 0
    changed = load_study(
        write_study(tmp_path, axes=SEEDS, set={"data": {"tasks": ["quickstart"]}, "train.max_steps": 9})
    )
    with pytest.raises(UserError, match=r"3 of 3 runs are done.*seed1: train.max_steps \(4 -> 9\)"):
        store.open(changed)
    fewer = load_study(write_study(tmp_path, axes={"run.seed": [1, 2]}))
    with pytest.raises(UserError, match="run seed3 is gone"):
        store.open(fewer, extend=True)
    more = load_study(write_study(tmp_path, axes={"run.seed": [1, 2, 3, 4]}))
    with pytest.raises(UserError, match="run seed4 is new; --extend adds the new runs"):
        store.open(more)
    store.open(more, extend=True)
    assert LocalRunner(more, store, 3, lambda _: None, command=trainer).run() == 0
    assert starts_of(more, store) == [1, 1, 1, 1]


def test_the_state_of_a_run_is_read_from_what_lies_there(tmp_path):
    study, store = opened(tmp_path)
    name = study.runs[0].name
    assert store.status(name, 4).state == "waiting"
    lock = store.hold(name)
    assert store.status(name, 4).state == "running"
    os.close(lock)
    store.note(name, "start", pid=1)
    assert store.status(name, 4).state == "interrupted"
    with store.attempts(name).open("a") as file:
        file.write('{"event": "end", "co')  # cut off by a kill
    store.note(name, "end", code=1, note="it broke")
    assert (store.status(name, 4).state, store.status(name, 4).note) == ("failed", "it broke")


def test_the_status_table_names_every_run(tmp_path, trainer, capsys):
    from hdscale.study.status import show_status

    study, store = opened(tmp_path)
    LocalRunner(study, store, 3, lambda _: None, command=trainer).run()
    assert show_status(store) == 0
    printed = capsys.readouterr().out
    assert all(run.name in printed for run in study.runs)
    assert "3 runs: 3 done" in printed and "4/4" in printed and "50.0" in printed


def wait_for(condition, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.02)
