"""`hdscale launch` without a SLURM: sweeps, checks, the script that it would submit, status."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from hdscale.cluster.checks import count_gpus
from hdscale.cluster.executors import build_executor, script_text, take_snapshot
from hdscale.cluster.job import TrainingJob
from hdscale.cluster.records import (
    LaunchRecord,
    RunEntry,
    RunState,
    error_file,
    launch_folder,
    write_launch,
    write_state,
)
from hdscale.cluster.settings import ClusterSettings, minutes_of
from hdscale.cluster.sweep import expand
from hdscale.commands.cli import main
from hdscale.errors import UserError

# ---- sweeps


def test_a_sweep_is_the_grid_of_all_combinations() -> None:
    runs = expand(["method.decoder.dim=32,64", "run.seed=1..3"])
    assert len(runs) == 6
    assert runs[0] == ("decoder.dim=32,seed=1", ["method.decoder.dim=32", "run.seed=1"])
    assert runs[-1] == ("decoder.dim=64,seed=3", ["method.decoder.dim=64", "run.seed=3"])


def test_commas_in_brackets_do_not_separate() -> None:
    runs = expand(["data.tasks=[cola,sst2],[rte]"])
    assert [overrides for _, overrides in runs] == [["data.tasks=[cola,sst2]"], ["data.tasks=[rte]"]]
    assert [name for name, _ in runs] == ["data.tasks=_cola,sst2", "data.tasks=_rte"]


def test_ranges_and_values_mix() -> None:
    assert [name for name, _ in expand(["run.seed=1..3,10"])] == ["seed=1", "seed=2", "seed=3", "seed=10"]


@pytest.mark.parametrize(
    ("axes", "words"),
    [
        (["run.seed"], "is not key=value"),
        (["run.seed="], "is not key=value"),
        (["run.seed=5..1"], "is empty"),
        (["run.seed=1", "run.seed=2"], "twice"),
        (["run.seed=1,1"], "two runs called seed=1"),
        (["run.name=a,b"], "cannot set run.name"),
        (["cluster.nodes=1,2"], "cannot set cluster.nodes"),
    ],
)
def test_bad_sweeps_are_one_line(axes: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        expand(axes)


# ---- the script


def script(runs: int = 1, **settings: object) -> list[str]:
    cluster = ClusterSettings(**settings)  # type: ignore[arg-type]
    executor = build_executor(cluster, Path("/shared/runs/launches/x"), "x", Path("/shared/code"), dry_run=True)
    return script_text(executor, runs).splitlines()


def test_the_script_asks_for_what_is_set() -> None:
    lines = script(
        nodes=4, partition="gpu", account="lab", qos="long", constraint="a100", mem="400G", time="1-12",
        signal_delay=300,
        sbatch={"mail-type": "FAIL"}, setup=["module load cuda"], srun=["--mpi=none"],
    )  # fmt: skip
    for option in (
        "nodes=4", "gpus-per-node=8", "ntasks-per-node=8", "cpus-per-task=8", "partition=gpu", "account=lab",
        "qos=long", "constraint=a100", "mem=400G", "time=2160", "signal=USR2@300", "requeue",
        "open-mode=append", "mail-type=FAIL", "job-name=x",
    ):  # fmt: skip
        assert f"#SBATCH --{option}" in lines
    [srun] = [line for line in lines if line.startswith("srun ")]
    assert "--cpu-bind=none --kill-on-bad-exit=1 --open-mode=append --mpi=none" in srun
    assert lines.index("module load cuda") < lines.index("source /shared/code/hdscale/cluster/batch.sh")
    assert lines.index("hdscale_begin --launch /shared/runs/launches/x") < lines.index(srun)
    assert lines[-1] == "hdscale_end $? --launch /shared/runs/launches/x"
    assert not any("wckey" in line for line in lines)


def test_what_is_not_set_is_left_to_the_site() -> None:
    text = "\n".join(script(gpus_per_node=0))
    for word in ("partition", "account", "qos", "constraint", "mem", "gpus", "array"):
        assert f"--{word}" not in text
    assert "#SBATCH --ntasks-per-node=1" in text


def test_many_runs_are_one_array() -> None:
    assert "#SBATCH --array=0-24%4" in script(runs=25, array_parallelism=4)
    assert "#SBATCH --output=/shared/runs/launches/x/%A_%a_0_log.out" in script(runs=25)


def test_a_script_is_valid_bash() -> None:
    for text in (script(), script(runs=3, container="/i.sif"), script(container="site+image")):
        subprocess.run(["bash", "-n"], input="\n".join(text), text=True, check=True)


def test_containers() -> None:
    apptainer = "\n".join(script(container="/images/h.sif"))
    assert "apptainer exec --nv /images/h.sif python -u -m submitit.core._submit" in apptainer
    pyxis = "\n".join(script(container="site+h:1"))
    assert "--container-image=site+h:1 python -u -m submitit" in pyxis
    assert "HDSCALE_PYTHON='srun --nodes=1 --ntasks=1 --overlap --container-image=site+h:1 python'" in pyxis


@pytest.mark.parametrize(
    ("time", "expected"),
    [
        ("90", 90),
        ("90:00", 90),
        ("1:30:00", 90),
        ("1-12", 2160),
        ("1-0:30", 1470),
        ("0:00:59", 1),
        ("2-0:0:1", 2881),
    ],
)
def test_times(time: str, expected: int) -> None:
    assert minutes_of(time) == expected


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"executor": "slrum"}, "did you mean 'slurm'"),
        ({"nodes": 0}, "cluster.nodes=0: must be at least 1"),
        ({"gpus_per_node": -1}, "cluster.gpus_per_node=-1"),
        ({"time": "tomorrow"}, "is not a time limit"),
        ({"time": "0"}, "must be longer than 0"),
        ({"time": "3"}, "is not longer than cluster.signal_delay"),
        ({"executor": "local", "nodes": 2}, "this machine only"),
        ({"executor": "debug"}, "one process"),
    ],
)
def test_settings_that_cannot_be_meant(settings: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        cluster = ClusterSettings(**settings)
        cluster.validate()
        cluster.check_executor()


@pytest.mark.parametrize(
    ("gres", "count"),
    [
        ("gpu:8", 8),
        ("gpu:a100:4(S:0-1)", 4),
        ("gpu:a100:4(S:0-1),nvme:1,gpu:h100:2", 6),
        ("(null)", 0),
        ("lustre:1", 0),
    ],
)
def test_count_gpus(gres: str, count: int) -> None:
    assert count_gpus(gres) == count


# ---- the command


def test_dry_run_prints_the_script_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # no SLURM
    command = ["launch", *small_config(tmp_path), "--dry-run", "--sweep", "run.seed=1..3"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "#SBATCH --array=0-2%3" in printed
    assert not (tmp_path / "runs").exists()


def test_without_sbatch_it_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["launch", *small_config(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "sbatch is not on the path" in error and "cluster.executor=local" in error and error.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_nothing_to_launch(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["launch"]) == 2
    assert "--config FILE" in capsys.readouterr().err


def small_config(folder: Path) -> list[str]:
    """A configuration that passes every check."""
    (folder / "small.yaml").write_text(
        "model: {name: t5-v1_1-small}\ndata: {tasks: [quickstart]}\ntrain: {max_steps: 10, dtype: fp32}\n"
        f"run: {{name: small, dir: {folder / 'runs'}}}\ncluster: {{gpus_per_node: 0}}\n"
    )
    return ["--config", str(folder / "small.yaml")]


# ---- records, status, snapshot


@pytest.fixture
def recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a launch of four runs in different states, on a cluster that has forgotten it."""
    monkeypatch.setenv("PATH", str(tmp_path))  # no squeue
    folder = launch_folder(tmp_path, "grid")
    runs = [RunEntry(f"seed={seed}", str(tmp_path / "grid" / f"seed={seed}"), "") for seed in range(4)]
    write_launch(folder, LaunchRecord("grid", "slurm", runs, "7", "2026-01-01 00:00:00"))
    write_state(folder, 0, RunState(job="7_0", starts=2, step=40, outcome="done"))
    write_state(folder, 1, RunState(job="7_1", starts=1, outcome="failed", reason="a mistake"))
    stalled = RunState(job="7_2", starts=4, stalled=4, outcome="stalled", reason="exit code 1; not requeued")
    write_state(folder, 2, stalled)
    error_file(folder, 1).write_text("rte has no test split; choose another task\n")
    log = "Traceback (most recent call last):\n  ...\ntorch.OutOfMemoryError: CUDA out of memory\n"
    log += "srun: error: Exited\n"
    (folder / "7_2_0_log.out").write_text(log)
    (folder / "7_2_10_log.out").write_text("later\n")
    (tmp_path / "grid" / "seed=0" / "checkpoints" / "step_00000040").mkdir(parents=True)
    return tmp_path


def test_status_shows_states_steps_and_errors(recorded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["launch", "--status", "grid", "--dir", str(recorded)]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "seed=0 7_0 done 40 2" in lines
    assert "seed=1 7_1 failed - 1" in lines
    assert "seed=2 7_2 not requeued - 4" in lines
    assert "seed=3 7_3 lost: cancelled, or its node died - -" in lines
    assert "seed=1: rte has no test split; choose another task" in lines
    assert "seed=2: torch.OutOfMemoryError: CUDA out of memory (exit code 1; not requeued)" in lines


def test_status_says_what_did_not_fit(recorded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The line of a run that ends without a traceback. Fails if only the names of exceptions are looked for."""
    log = launch_folder(recorded, "grid") / "7_2_0_log.out"
    log.write_text("step 2/9  loss 1.0\nhdscale: step 3: out of GPU memory; lower it\nsrun: error: Exited\n")
    assert main(["launch", "--status", "grid", "--dir", str(recorded)]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "seed=2: hdscale: step 3: out of GPU memory; lower it (exit code 1; not requeued)" in out


def test_status_without_a_name_lists_launches(recorded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["launch", "--status", "--dir", str(recorded)]) == 0
    assert "grid: slurm job 7, 4 runs" in capsys.readouterr().out
    assert main(["launch", "--status", "gird", "--dir", str(recorded)]) == 2
    assert "no launch is recorded" in capsys.readouterr().err


def test_logs_and_cancel_of_what_is_over(recorded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["launch", "--logs", "grid", "--dir", str(recorded), "--lines", "1"]) == 0
    out = capsys.readouterr().out
    assert "==> seed=0: no output yet" in out and "srun: error: Exited" in out and "Traceback" not in out
    assert main(["launch", "--cancel", "grid", "--dir", str(recorded)]) == 0
    assert "nothing of it is queued or running" in capsys.readouterr().out


def test_a_damaged_record_is_one_line(recorded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (launch_folder(recorded, "grid") / "launch.json").write_text('{"name": ')
    assert main(["launch", "--status", "grid", "--dir", str(recorded)]) == 2
    assert "is damaged" in capsys.readouterr().err


def test_a_snapshot_runs_by_itself(tmp_path: Path) -> None:
    code = take_snapshot(tmp_path)
    assert (code / "configs" / "glue_large.yaml").is_file() and (code / "hdscale" / "cluster" / "batch.sh").is_file()
    assert not list(code.rglob("__pycache__"))
    command = "import hdscale.config; print(hdscale.config.__file__)"

    done = subprocess.run(
        [sys.executable, "-c", command],
        env={"PYTHONPATH": str(code)},
        cwd=tmp_path,
        text=True,
        capture_output=True,
    )
    assert done.stdout.strip() == str(code / "hdscale" / "config.py"), done.stderr


def test_a_job_is_small_and_picklable() -> None:
    job = TrainingJob("/runs/launches/x", 3, fresh=True)
    assert pickle.loads(pickle.dumps(job)) == job


def test_records_are_plain_json(recorded: Path) -> None:
    folder = launch_folder(recorded, "grid")
    assert json.loads((folder / "launch.json").read_text())["job"] == "7"
    assert json.loads((folder / "state.0.json").read_text())["outcome"] == "done"
