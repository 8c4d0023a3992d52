"""The batch shell's side: whether a job starts again, and how the scripts behave, with a pretended SLURM."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hdscale.cluster.batch import decide
from hdscale.cluster.records import RunState, launch_folder, newest_step, read_launch, read_state
from hdscale.commands.batch import main
from hdscale.errors import ERROR_FILE, UserError, report
from tests.helpers.places import ROOT


@pytest.mark.parametrize(
    ("code", "slurm_state", "step", "outcome"),
    [
        (0, "RUNNING", 100, "done"),
        (0, "COMPLETING", 100, "done"),
        (2, "RUNNING", 10, "failed"),
        (2, "COMPLETING", 10, "failed"),
        (75, "RUNNING", 12, "again"),
        (137, "RUNNING", 12, "again"),
        (1, "UNKNOWN", 12, "again"),
        (75, "COMPLETING", 12, "left"),  # scancel or scontrol requeue: SLURM has decided
        (143, "CANCELLED", 12, "left"),
    ],
)
def test_decisions(code: int, slurm_state: str, step: int, outcome: str) -> None:
    assert decide(RunState(step=10), code, slurm_state, step, limit=3).outcome == outcome


def test_only_ends_without_a_newer_checkpoint_count() -> None:
    state = RunState()
    seen = []
    for step in (-1, -1, 5, 5, 5, 7, 7, 7, 7):
        state = decide(state, 1, "RUNNING", step, limit=2)
        seen.append((state.outcome, state.stalled))
    assert seen == [
        ("again", 1), ("again", 2), ("again", 0), ("again", 1), ("again", 2), ("again", 0), ("again", 1),
        ("again", 2), ("stalled", 3),
    ]  # fmt: skip
    assert "not requeued after 3 ends without a newer checkpoint" in state.reason


def test_newest_step_ignores_what_is_being_written(tmp_path: Path) -> None:
    assert newest_step(tmp_path) == -1
    for name in ("step_00000005", "step_00000012", ".step_00000020.tmp", "step_00000030.tmp"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert newest_step(tmp_path) == 12


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A configuration and the variables of a SLURM job."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.delenv("SLURM_ARRAY_JOB_ID", raising=False)
    monkeypatch.delenv("SLURM_ARRAY_TASK_ID", raising=False)
    (tmp_path / "c.yaml").write_text("run: {name: night}\ncluster: {max_requeues: 1}\n")
    return tmp_path


def test_begin_and_end_write_down_what_happens(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = ["--config", "c.yaml", "train.max_steps=3"]
    assert main(["begin", "--log", "night.out", *run]) == 0
    error_path = capsys.readouterr().out.strip()
    folder = launch_folder("runs", "night")
    assert error_path == str(job / folder / "error.0.txt")
    record = read_launch(folder)
    assert (record.executor, record.job, record.runs[0].overrides) == ("sbatch", "12", ["train.max_steps=3"])
    assert main(["end", "--code", "1", "--state", "RUNNING", *run]) == 0  # again
    main(["begin", *run])
    assert main(["end", "--code", "1", "--state", "RUNNING", *run]) == 3  # not again
    state = read_state(folder, 0)
    assert (state.starts, state.outcome, state.log) == (2, "stalled", "night.out")


def test_a_new_job_of_the_run_counts_afresh(job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = ["--config", "c.yaml"]
    for _ in range(2):
        main(["begin", *run])
        main(["end", "--code", "1", "--state", "RUNNING", *run])
    monkeypatch.setenv("SLURM_JOB_ID", "13")
    main(["begin", *run])
    state = read_state(launch_folder("runs", "night"), 0)
    assert (state.starts, state.stalled, state.job) == (1, 0, "13")


def test_a_rank_s_mistake_outweighs_the_exit_code(
    job: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """srun shows 143, of the ranks that it killed because another ended with 2."""
    run = ["--config", "c.yaml"]
    main(["begin", *run])
    monkeypatch.setenv(ERROR_FILE, capsys.readouterr().out.strip())
    report(UserError("rte has no test split; choose another task"))
    assert main(["end", "--code", "143", "--state", "RUNNING", *run]) == 3
    state = read_state(launch_folder("runs", "night"), 0)
    assert (state.outcome, state.reason) == ("failed", "rte has no test split; choose another task")
    main(["begin", *run])  # the next start begins without it
    assert main(["end", "--code", "143", "--state", "RUNNING", *run]) == 0


def test_a_mistake_in_the_configuration_ends_the_job_at_once(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["begin", "--config", "c.yaml", "train.max_step=3"]) == 2
    assert "did you mean 'train.max_steps'?" in capsys.readouterr().err


# ---- the scripts, with programs that pretend to be SLURM's


@pytest.fixture
def pretended(tmp_path: Path) -> dict[str, str]:
    """An environment in which srun, scontrol and sbatch only write down how they were called."""
    programs = tmp_path / "bin"
    programs.mkdir()
    calls = tmp_path / "calls"
    bodies = {
        "srun": f'echo "srun $*" >>{calls}\nexit ${{SRUN_CODE:-0}}',
        "sbatch": f'echo "sbatch $*" >>{calls}\nenv | grep ^SBATCH_ >>{calls}; exit 0',
        "scontrol": f'echo "scontrol $*" >>{calls}\n'
        '[ "$1" = show ] && echo "JobId=12 JobState=RUNNING StdOut=/x.out"\nexit 0',
        "scancel": f'echo "scancel $*" >>{calls}',
        "apptainer": f'echo "apptainer $*" >>{calls}\nwhile [ "$1" != python ]; do shift; done\nexec "$@"',
    }
    for name, body in bodies.items():
        (programs / name).write_text(f"#!/bin/bash\n{body}\n")
        (programs / name).chmod(0o755)
    keep = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "SBATCH_", "HDSCALE_"))}
    path = f"{programs}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {**keep, "PATH": path, "CALLS": str(calls), "RUNS": str(tmp_path / "runs")}


IN_A_JOB = {
    "SLURM_JOB_ID": "12",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_NTASKS_PER_NODE": "8",
    "SLURM_GPUS_ON_NODE": "8",
    "SLURM_CPUS_PER_TASK": "6",
    "SLURM_SUBMIT_DIR": str(ROOT),
}


def run_script(
    env: dict[str, str], *arguments: str, script: str = "glue_large.sh", **more: str
) -> tuple[int, str, str]:
    """(exit code, what it printed, how SLURM's programs were called)."""
    done = subprocess.run(
        ["bash", f"slurm/{script}", f"run.dir={env['RUNS']}", *arguments],
        cwd=ROOT, env={**env, **more}, text=True, timeout=60,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    calls = Path(env["CALLS"])
    return done.returncode, done.stdout, calls.read_text() if calls.exists() else ""


def test_ranks_are_started_by_srun_one_a_gpu(pretended: dict[str, str]) -> None:
    code, output, calls = run_script(pretended, "run.seed=3", **IN_A_JOB)
    assert code == 0, output
    [srun] = [line for line in calls.splitlines() if line.startswith("srun ")]
    assert "--nodes=2 --ntasks=16 --ntasks-per-node=8 --cpu-bind=none --kill-on-bad-exit=1" in srun
    assert srun.endswith(f"--config configs/glue_large.yaml run.dir={pretended['RUNS']} run.seed=3")
    assert "scontrol requeue" not in calls


def test_fewer_gpus_mean_fewer_ranks(pretended: dict[str, str]) -> None:
    _, _, calls = run_script(pretended, **{**IN_A_JOB, "SLURM_GPUS_ON_NODE": "4"})
    assert "--ntasks=8 --ntasks-per-node=4" in calls


@pytest.mark.parametrize(("code", "requeued"), [("1", True), ("75", True), ("137", True), ("2", False), ("0", False)])
def test_which_exit_codes_requeue(code: str, requeued: bool, pretended: dict[str, str]) -> None:
    exit_code, output, calls = run_script(pretended, SRUN_CODE=code, **IN_A_JOB)
    assert exit_code == int(code)
    assert ("scontrol requeue 12" in calls) == requeued, output


def test_fresh_is_for_the_first_start_only(pretended: dict[str, str]) -> None:
    _, _, first = run_script(pretended, "--fresh", **IN_A_JOB)
    assert first.splitlines()[-2].endswith("--fresh")
    Path(pretended["CALLS"]).unlink()
    _, _, second = run_script(pretended, "--fresh", SLURM_RESTART_COUNT="1", **IN_A_JOB)
    assert "train.py" in second and "--fresh" not in second


def test_a_sick_node_does_not_end_the_run(pretended: dict[str, str]) -> None:
    """Where even the question cannot be asked at the end, the job goes back into the queue, a few times."""
    broken = {"SRUN_CODE": "1", **IN_A_JOB}
    end = "hdscale_end 1 --config configs/glue_large.yaml"
    script = f"source hdscale/cluster/batch.sh; hdscale_python=(false); {end}"
    for restarts, requeued in (("0", True), ("3", False)):
        Path(pretended["CALLS"]).unlink(missing_ok=True)
        env = {**pretended, **broken, "SLURM_RESTART_COUNT": restarts}
        done = subprocess.run(["bash", "-c", script], cwd=ROOT, env=env)
        assert done.returncode == 1
        assert ("scontrol requeue 12" in Path(pretended["CALLS"]).read_text()) == requeued


def test_containers(pretended: dict[str, str]) -> None:
    code, output, calls = run_script(pretended, HDSCALE_CONTAINER="/images/h.sif", **IN_A_JOB)
    assert code == 0, output
    assert "apptainer exec --nv /images/h.sif python -m hdscale.cluster.batch begin" in calls
    assert "apptainer exec --nv /images/h.sif python hdscale/train.py --config" in calls
    Path(pretended["CALLS"]).unlink()
    _, _, calls = run_script(pretended, HDSCALE_CONTAINER="site+hdscale:1", **IN_A_JOB)
    assert "--overlap --container-image=site+hdscale:1 python -m hdscale.cluster.batch begin" in calls


def test_started_with_bash_a_script_submits_itself(pretended: dict[str, str]) -> None:
    code, output, calls = run_script(pretended, "run.seed=2", SBATCH_ACCOUNT="lab")
    assert code == 0, output
    assert calls.splitlines()[0] == f"sbatch {ROOT}/slurm/glue_large.sh run.dir={pretended['RUNS']} run.seed=2"
    assert "SBATCH_ACCOUNT=lab" in calls


def test_without_sbatch_a_script_says_where_to_go(pretended: dict[str, str]) -> None:
    env = {**pretended, "PATH": "/usr/bin:/bin"}
    if any((Path(folder) / "sbatch").exists() for folder in ("/usr/bin", "/bin")):
        (hidden := Path(pretended["RUNS"]).parent / "few").mkdir()
        for name in ("bash", "dirname", "basename", "env"):
            (hidden / name).symlink_to(f"/usr/bin/{name}")
        env["PATH"] = str(hidden)
    code, output, _ = run_script(env)
    assert code == 2
    assert "sbatch is not on the path" in output and output.count("\n") == 1
