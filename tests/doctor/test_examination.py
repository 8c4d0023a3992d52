"""`hdscale doctor --gpu`: stages that hang, crash or fail, and what the report says of them. Stand-ins play the stages;
on a GPU the real ones run as well."""

import functools
import importlib
import json
import os
import time
from pathlib import Path

import psutil
import pytest

from hdscale.commands import doctor
from hdscale.commands.cli import main
from hdscale.doctor.gpu import examination
from hdscale.doctor.gpu.report import default_folder
from hdscale.doctor.gpu.runner import within
from hdscale.doctor.gpu.stages import MOST_SECONDS, STAGES, Stage, choose
from hdscale.errors import UserError
from tests.helpers.doctor_stages import command


@pytest.fixture
def examined(monkeypatch, tmp_path, capfd):
    """Runs the verb with stand-ins: (exit code, what it printed, the report's JSON, its Markdown)."""

    def call(*names: str, limit: int = 30, options: tuple[str, ...] = ()):
        stages = [Stage(name, f"Title of {name}", limit) for name in names]
        monkeypatch.setenv("DOCTOR_TEST_FOLDER", str(tmp_path))
        monkeypatch.setattr(doctor, "find_gpus", lambda: ["Card X"])
        monkeypatch.setattr(doctor, "choose", lambda names: stages)
        monkeypatch.setattr(doctor, "examine_gpus", functools.partial(examination.examine, command=command))
        code = main(["doctor", "--gpu", "--out", str(tmp_path / "report"), *options])
        printed = capfd.readouterr().out
        report = json.loads((tmp_path / "report" / "report.json").read_text())
        return code, printed, report, (tmp_path / "report" / "report.md").read_text()

    return call


def states(report: dict) -> dict[str, str]:
    return {line["name"]: line["state"] for stage in report["stages"] for line in stage["lines"]}


def test_a_stage_that_sleeps_is_cut_off_and_the_others_go_on(examined, tmp_path):
    began = time.monotonic()
    code, printed, report, page = examined("sleeps", "after", limit=4)
    assert time.monotonic() - began < 30
    assert states(report) == {
        "sleeps: first": "passed",
        "the check that sleeps": "not finished",
        "after: first": "passed",
    }
    assert code == 1 and not report["healthy"]
    assert "cut off after 4 s" in page and "not finished: the check that sleeps: cut off after 4 s" in printed
    assert gone(tmp_path / "child")


def gone(file: Path) -> bool:
    """Whether the process that a stand-in had started has ended."""
    child = int(file.read_text())
    return not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE


def test_a_stage_that_crashes_leaves_the_others(examined, tmp_path):
    code, printed, report, page = examined("crashes", "silent", "after")
    crashed, silent, after = report["stages"]
    assert [line["state"] for line in crashed["lines"]] == ["passed", "failed"]
    assert crashed["lines"][1]["name"] == "the check that crashes"
    assert crashed["lines"][1]["detail"].startswith("killed by SIGABRT")
    assert "an illegal access" in "\n".join(crashed["last_words"]) and "an illegal access" in page
    assert [line["state"] for line in silent["lines"]] == ["failed"]
    assert [line["state"] for line in after["lines"]] == ["passed"]
    assert code == 1 and gone(tmp_path / "child")


def test_what_fails_is_said_with_its_reason(examined):
    code, printed, report, page = examined("fails", "after")
    assert code == 1
    assert states(report) == {
        "fails: first": "passed",
        "what is wrong": "failed",
        "what breaks": "failed",
        "what a CPU cannot": "not possible here",
        "after: first": "passed",
    }
    assert report["verdict"] == ("2 passed, 2 failed, 1 not possible here: fails (what is wrong), fails (what breaks)")
    lines = {line["name"]: line for line in report["stages"][0]["lines"]}
    assert lines["what breaks"]["detail"] == "ValueError: on two lines"
    assert lines["what is wrong"]["values"]["output"] == ["the run's", "last lines"]
    # the page and the terminal have every line, and the table
    for name, line in lines.items():
        assert f"| {name} | {line['state']} | " in page and f"{line['state']}: {name}" in printed
    assert "this \\| is seen" in page and "| size | ms per step |" in page and "| base | 1.25 |" in page
    assert "last lines" in page
    assert f"{report['verdict']}\nreport: " in printed


def test_nothing_failed(examined):
    code, _, report, page = examined("one", "two")
    assert code == 0 and report["healthy"]
    assert report["verdict"] == "2 passed: nothing failed" and "2 passed: nothing failed." in page


def test_json_is_all_that_is_printed(examined):
    _, printed, report, _ = examined("one", options=("--json",))
    assert json.loads(printed) == report and report["stages"][0]["lines"][0]["name"] == "one: first"


def test_limits_add_up_to_less_than_ten_minutes():
    assert sum(stage.seconds for stage in STAGES) <= MOST_SECONDS < 600
    assert sum(stage.seconds for stage in within(STAGES, 3)) <= 180
    # of some stages, all the minutes
    (alone,) = within(choose("step"), 2)
    assert alone.seconds == 120


def test_every_stage_has_its_checks():
    assert len({stage.name for stage in STAGES}) == len(STAGES)
    for stage in STAGES:
        assert callable(importlib.import_module(f"hdscale.doctor.gpu.{stage.module}").examine)


def test_chosen_stages_keep_their_order():
    assert [stage.name for stage in choose("op, machine")] == ["machine", "op"]
    with pytest.raises(UserError, match="did you mean 'machine'"):
        choose("machin")
    with pytest.raises(UserError, match="names no stage"):
        choose(",")


def test_without_a_gpu(monkeypatch, capfd):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert main(["doctor", "--gpu"]) == 2
    printed, said = capfd.readouterr()
    assert printed == "" and len(said.splitlines()) == 1
    assert "no GPU is visible" in said and "srun --gpus-per-node=1 hdscale doctor --gpu" in said


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--out", "folder"], "belongs to --gpu"),
        (["--gpu", "--stages", "machin"], "did you mean 'machine'"),
        (["--gpu", "--minutes", "0"], "must be above 0"),
        (["--gpu", "--build"], "leave --build out"),
    ],
)
def test_wrong_arguments(arguments, words, capfd):
    assert main(["doctor", *arguments]) == 2
    assert words in capfd.readouterr().err


def test_a_folder_that_cannot_be_written(monkeypatch, tmp_path, capfd):
    monkeypatch.setattr(doctor, "find_gpus", lambda: ["Card X"])
    (tmp_path / "file").write_text("")
    assert main(["doctor", "--gpu", "--out", str(tmp_path / "file")]) == 2
    assert "choose another folder" in capfd.readouterr().err


def test_the_default_folder_is_a_new_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = default_folder("NVIDIA H100 80GB HBM3")
    assert first.name.startswith("hdscale-doctor_NVIDIA-H100-80GB-HBM3_20")
    os.mkdir(first)
    assert default_folder("NVIDIA H100 80GB HBM3") == Path(f"{first}_2")


@pytest.mark.gpu
def test_on_a_gpu(tmp_path):
    stages = "machine,extension,decode"
    assert main(["doctor", "--gpu", "--stages", stages, "--out", str(tmp_path)]) == 0
