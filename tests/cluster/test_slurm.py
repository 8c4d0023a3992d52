"""hdscale on a real SLURM: batch scripts, launches, and everything that may happen to a job on the way.

One cluster of fictitious size serves all tests. The jobs train a tiny T5 on real GLUE text, all with one
configuration, so that every one of them must come to the losses of the run that nothing disturbed.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

# imported before the first test: submitit sets up logging, which closes existing handlers, and absl's closes the file
# into which pytest captures stderr
import submitit  # noqa: F401

from hdscale.cluster.records import launch_folder, read_launch, read_state
from hdscale.cluster.settings import minutes_of
from hdscale.commands.cli import main
from hdscale.config import load_config
from hdscale.engine.checkpoint import find_fault
from hdscale.modeling import build_model
from hdscale.resolve import resolve_model
from tests.helpers.places import HUB, ROOT, T5_TOKENIZER, needs_real_text
from tests.helpers.slurm_cluster.cluster import SlurmCluster, free_ports, wait_until
from tests.helpers.tiny import save_tiny_t5

pytestmark = [pytest.mark.slow, needs_real_text]

SCRIPTS = sorted(path.name for path in (ROOT / "slurm").glob("*_*.sh"))
STEPS, STRIKE = 40, 8
"""Steps of a run, and the step after which it is disturbed."""
TWO_NODES = [
    "--nodes=2",
    "--ntasks-per-node=1",
    "--gpus-per-node=0",
    "--cpus-per-task=1",
    "--mem=3G",
    "--time=30",
]
ON_CLUSTER = ["cluster.gpus_per_node=0", "cluster.cpus_per_task=1", "cluster.mem=3G", "cluster.time=30"]
JOB_SECONDS = 400


@pytest.fixture
def on_slurm(slurm: SlurmCluster, monkeypatch: pytest.MonkeyPatch) -> SlurmCluster:
    """The cluster, for commands that run in this process."""
    for name in ("SLURM_CONF", "OMP_NUM_THREADS", "DS_ACCELERATOR", "PATH"):
        monkeypatch.setenv(name, slurm.env[name])
    monkeypatch.chdir(ROOT)
    return slurm


@pytest.fixture(scope="module")
def settings(place: Path) -> list[str]:
    """What all runs have in common."""
    return [
        f"model.name={save_tiny_t5(place / 't5')}",
        f"model.tokenizer={T5_TOKENIZER}",
        f"data.root={HUB}",
        f"data.cache={place / 'cache'}",
        "data.tasks=[cola,rte,stsb,mrpc]",
        "data.max_source_length=64",
        "method.backend=torch",  # the same bits whether or not an operator is built meanwhile
        "train.dtype=fp32",
        "deepspeed=ds_configs/zero2_fp32.json",
        f"train.max_steps={STEPS}",
        "train.warmup_steps=5",
        "train.global_batch_size=16",
        "train.checkpoint_every=5",
        "train.log_every=1",
        "eval.every=20",
        "eval.limit=8",
        "eval.test_limit=8",
        "eval.batch_size=8",
        f"run.dir={place / 'runs'}",
        "run.threads=1",
    ]


@dataclass
class Outcome:
    """A run on the cluster that has ended."""

    folder: Path
    job: str
    log: str
    restarts: int
    struck: object = None

    def losses(self) -> list[tuple[int, float]]:
        """(step, loss) of every line of the metrics, each step once."""
        return [(row["step"], row["loss"]) for row in rows(self.folder)]

    def results(self) -> dict:
        """What results.json says of the run itself."""
        tree = json.loads((self.folder / "results.json").read_text())
        return {key: tree[key] for key in ("tasks", "average", "validation", "best", "steps", "samples", "tokens")}


def rows(folder: Path) -> list[dict]:
    """The training lines of metrics.jsonl that are complete."""
    lines = []
    with contextlib.suppress(FileNotFoundError):
        for line in (folder / "metrics.jsonl").read_text().splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                row = json.loads(line)
                lines += [row] if row["kind"] == "train" else []
    return lines


def processes_of(job: str, rank: int | None = None) -> list[int]:
    """Processes that carry a job's id in their environment; of one rank, its python."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            variables = (folder / "environ").read_bytes().split(b"\0")
            if f"SLURM_JOB_ID={job}".encode() not in variables:
                continue
            if rank is None or (
                f"SLURM_PROCID={rank}".encode() in variables
                and b"SLURM_STEP_ID=0" in variables
                and b"train.py" in (folder / "cmdline").read_bytes()
            ):
                found.append(int(folder.name))
    return found


class Cluster:
    """Submits runs of the one configuration, disturbs them, waits for their end; several at a time."""

    def __init__(self, slurm: SlurmCluster, place: Path, settings: list[str]) -> None:
        self.slurm, self.place, self.settings = slurm, place, settings
        self.pool = ThreadPoolExecutor(12)

    def start(
        self,
        name: str,
        strike: Callable[[str], object] | None = None,
        sbatch: list[str] | None = None,
        settings: list[str] | None = None,
    ) -> Future[Outcome]:
        """`sbatch slurm/glue_large.sh` in the background; `strike(job)` is called at the step STRIKE."""
        return self.pool.submit(self.run, name, strike, sbatch or [], settings or [])

    def run(self, name: str, strike: Callable | None, sbatch: list[str], settings: list[str]) -> Outcome:
        log = self.place / f"{name}.out"
        done = self.slurm.run(
            "sbatch", "--parsable", *TWO_NODES, f"--output={log}", *sbatch, "slurm/glue_large.sh",
            *self.settings, f"run.name={name}", *settings, cwd=ROOT,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        job, folder, struck = done.stdout.strip(), self.place / "runs" / name, None
        if strike is not None:
            wait_until(lambda: len(rows(folder)) >= STRIKE, JOB_SECONDS, f"{name} does not train", every=0.05)
            struck = strike(job)
        wait_until(lambda: self.ended(job), JOB_SECONDS, f"{name} does not end", log.read_text, every=0.5)
        return Outcome(folder, job, log.read_text(), int(self.slurm.field(job, "Restarts")), struck)

    def ended(self, job: str) -> bool:
        return self.slurm.field(job, "JobState") in (
            "COMPLETED",
            "FAILED",
            "CANCELLED",
            "TIMEOUT",
            "NODE_FAIL",
        )

    # ---- what may happen to a job

    def send_signal(self, job: str) -> None:
        self.slurm.run("scancel", "--signal=USR2", job)

    def requeue(self, job: str) -> None:
        assert self.slurm.run("scontrol", "requeue", job).returncode == 0

    def kill_a_rank(self, job: str) -> None:
        [pid] = processes_of(job, rank=1)
        os.kill(pid, signal.SIGKILL)

    def reach_the_time_limit(self, job: str) -> str:
        """The limit comes near: a minute is left, of which the last half is for saving (`--signal=USR2@30`).

        The ranks stand still until SLURM, which looks at limits every half minute, has signalled them. For
        what comes after the requeue the limit is as before.
        """
        pids = [pid for rank in (0, 1) for pid in processes_of(job, rank)]
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        elapsed = minutes_of(self.slurm.field(job, "RunTime"))
        assert self.slurm.run("scontrol", "update", f"JobId={job}", f"TimeLimit={elapsed + 1}").returncode == 0
        try:
            wait_until(lambda: all(map(was_signalled, pids)), 120, "no signal before the limit")
        finally:
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)
        wait_until(lambda: self.slurm.field(job, "JobState") == "PENDING", 60, "not requeued")
        assert self.slurm.run("scontrol", "update", f"JobId={job}", "TimeLimit=30").returncode == 0
        return f"{len(pids)} ranks signalled"

    def pre_empt(self, job: str) -> str:
        """A job of the higher partition takes the same nodes for a moment."""
        nodes = self.slurm.field(job, "NodeList")
        done = self.slurm.run(
            "sbatch", "--parsable", "--partition=high", "--exclusive", f"--nodelist={nodes}", "--mem=1G",
            "--time=5", "--output=/dev/null", "--wrap=sleep 1",
        )  # fmt: skip
        other = done.stdout.strip()
        wait_until(lambda: self.ended(other), 120, "the pre-empting job does not run")
        return self.slurm.field(other, "JobState")

    def shrink(self, job: str) -> None:
        """Back into the queue, and from there to a single node."""
        self.requeue(job)
        wait_until(lambda: self.slurm.field(job, "JobState") == "PENDING", 60, "not requeued")
        done = self.slurm.run("scontrol", "update", f"JobId={job}", "NumNodes=1-1", "NumTasks=1")
        assert done.returncode == 0, done.stderr

    def cancel(self, job: str) -> None:
        assert self.slurm.run("scancel", job).returncode == 0


def was_signalled(pid: int) -> bool:
    """Whether a stopped process has a SIGUSR2 waiting, or was sent on its way together with it."""
    try:
        fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    except OSError:
        return True
    pending = int(fields["ShdPnd"], 16) | int(fields["SigPnd"], 16)
    return bool(pending & 1 << (signal.SIGUSR2 - 1)) or "T" not in fields["State"].split()[0]


@pytest.fixture(scope="module")
def local(place: Path, settings: list[str]) -> Outcome:
    """The same run without SLURM: two ranks by the deepspeed launcher."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1"}
    env["PATH"] = f"{Path(sys.executable).parent}:{env['PATH']}"
    command = [
        "deepspeed",
        "--num_accelerators=2",
        f"--master_port={free_ports(1)[0]}",
        "hdscale/train.py",
        "--config",
        "configs/glue_large.yaml",
    ]
    done = subprocess.run(
        [*command, *settings, "run.name=local"],
        cwd=ROOT,
        env=env,
        text=True,
        capture_output=True,
        timeout=JOB_SECONDS,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return Outcome(place / "runs" / "local", "", done.stdout, 0)


@pytest.fixture(scope="module")
def drills(slurm: SlurmCluster, place: Path, settings: list[str], local: Outcome) -> dict[str, Future[Outcome]]:
    """All disturbed runs, under way at the same time; each on its two nodes, the pre-empted one apart."""
    cluster = Cluster(slurm, place, settings)
    apart = ["--nodelist=n3,n4"]
    beside = ["--exclude=n3,n4"]
    return {
        "undisturbed": cluster.start("undisturbed", sbatch=beside),
        "signal": cluster.start("signal", cluster.send_signal, beside),
        "requeue": cluster.start("requeue", cluster.requeue, beside),
        "kill": cluster.start("kill", cluster.kill_a_rank, beside),
        "limit": cluster.start("limit", cluster.reach_the_time_limit, [*beside, "--signal=USR2@30"]),
        "pre-emption": cluster.start("pre-emption", cluster.pre_empt, apart),
        "shrink": cluster.start("shrink", cluster.shrink, beside),
        "cancel": cluster.start("cancel", cluster.cancel, beside),
        "stalled": cluster.start(
            "stalled",
            sbatch=[*beside, "--export=ALL,HDSCALE_MASTER_ADDR=192.0.2.1"],
            settings=["cluster.max_requeues=1", "cluster.rendezvous_timeout=2"],
        ),
        "mistake": cluster.start("mistake", sbatch=beside, settings=["data.root=/nowhere"]),
    }


def test_a_batch_job_is_the_run_of_a_local_launch(drills: dict[str, Future[Outcome]], local: Outcome) -> None:
    outcome = drills["undisturbed"].result()
    assert len(outcome.losses()) == STEPS
    assert outcome.losses() == local.losses()
    assert outcome.results() == local.results()
    assert outcome.restarts == 0
    first = (outcome.folder / "train.log").read_text().splitlines()[0]
    assert f"started by srun (SLURM) job {outcome.job} step 0 on n[1-2]: rank 0 of 2" in first
    assert "started by the deepspeed launcher: rank 0 of 2" in (local.folder / "train.log").read_text().splitlines()[0]


@pytest.mark.parametrize("name", ["signal", "requeue", "kill", "limit", "pre-emption"])
def test_a_disturbed_run_ends_with_the_same_losses(
    name: str, drills: dict[str, Future[Outcome]], local: Outcome
) -> None:
    outcome = drills[name].result()
    assert outcome.restarts >= 1, outcome.log
    assert outcome.losses() == local.losses(), outcome.log
    assert outcome.results() == local.results()
    assert "incomplete or damaged" not in outcome.log


def test_the_pre_empting_job_got_its_nodes(drills: dict[str, Future[Outcome]]) -> None:
    assert drills["pre-emption"].result().struck == "COMPLETED"


def test_a_signal_costs_no_step(drills: dict[str, Future[Outcome]]) -> None:
    """The ranks save at once, and resume from there: no step is computed twice."""
    for name in ("signal", "limit", "pre-emption"):
        log = drills[name].result().log
        [stopped] = re.findall(r"step (\d+): asked to stop", log)
        assert f"requeued; its newest checkpoint is of step {stopped}" in log


def test_a_job_goes_on_with_another_number_of_nodes(drills: dict[str, Future[Outcome]], local: Outcome) -> None:
    outcome = drills["shrink"].result()
    log = (outcome.folder / "train.log").read_text()
    assert "rank 0 of 2" in log and "rank 0 of 1" in log
    ours, theirs = rows(outcome.folder), rows(local.folder)
    for key in ("step", "samples", "tokens", "target_tokens"):  # the same rows in the same order
        assert [row[key] for row in ours] == [row[key] for row in theirs]
    assert [row["loss"] for row in ours] == pytest.approx([row["loss"] for row in theirs], rel=0.15)


def test_a_cancelled_job_does_not_come_back(
    drills: dict[str, Future[Outcome]],
    on_slurm: SlurmCluster,
    place: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    outcome = drills["cancel"].result()
    assert on_slurm.field(outcome.job, "JobState") == "CANCELLED"
    assert outcome.restarts == 0
    assert not (outcome.folder / "results.json").exists()
    assert main(["launch", "--status", "cancel", "--dir", str(place / "runs")]) == 0
    assert "cancelled" in capsys.readouterr().out


def test_nothing_is_torn_and_nothing_is_left(drills: dict[str, Future[Outcome]]) -> None:
    for name, future in drills.items():
        outcome = future.result()
        checkpoints = list((outcome.folder / "checkpoints").glob("*"))
        assert checkpoints or name in ("stalled", "mistake"), name
        assert [find_fault(path) for path in checkpoints] == [None] * len(checkpoints), name
        wait_until(lambda job=outcome.job: not processes_of(job), 20, f"{name}: processes are left")


def test_a_job_without_progress_gives_up(drills: dict[str, Future[Outcome]], slurm: SlurmCluster, place: Path) -> None:
    """Its ranks cannot reach each other: the job comes back as often as it may, and says why it failed."""
    outcome = drills["stalled"].result()
    assert outcome.restarts == 1
    assert slurm.field(outcome.job, "JobState") == "FAILED"
    state = read_state(launch_folder(place / "runs", "stalled"), 0)
    assert (state.outcome, state.starts, state.stalled) == ("stalled", 2, 2)
    assert "not requeued after 2 ends without a newer checkpoint" in state.reason
    assert "rank 1 on" in outcome.log and "does not reach rank 0 at 192.0.2.1" in outcome.log
    assert "Traceback" not in outcome.log


def test_a_mistake_that_a_rank_finds_is_not_repeated(
    drills: dict[str, Future[Outcome]], slurm: SlurmCluster, place: Path
) -> None:
    outcome = drills["mistake"].result()
    assert outcome.restarts == 0
    assert slurm.field(outcome.job, "JobState") == "FAILED"
    assert slurm.field(outcome.job, "ExitCode") == "2:0"
    assert outcome.log.count("hdscale: error:") == 1 and "Traceback" not in outcome.log
    state = read_state(launch_folder(place / "runs", "mistake"), 0)
    assert state.outcome == "failed" and "/nowhere" in state.reason


# ---- hdscale launch


def test_a_sweep_is_an_array_with_bounded_parallelism(
    on_slurm: SlurmCluster,
    place: Path,
    settings: list[str],
    drills: dict[str, Future[Outcome]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Four runs, two at a time, of a snapshot of the code; one of them cannot succeed."""
    for future in drills.values():
        future.result()  # the two cores are busy enough
    runs, steps = str(place / "runs"), ["train.max_steps=12", "eval.every=0"]
    command = [
        "launch",
        "--config",
        "configs/glue_large.yaml",
        *settings,
        *steps,
        *ON_CLUSTER,
        "run.name=sweep",
    ]
    options = ["cluster.array_parallelism=2", "cluster.snapshot=true"]
    sweep = ["--sweep", "train.learning_rate=3e-4,1e30", "run.seed=1..2"]
    # 1e30 overflows with seed 1; with seed 2 the learning rate is never reached, since the run ends before
    assert main([*command, *options, "--dry-run", *sweep]) == 0
    script = capsys.readouterr().out
    assert not launch_folder(runs, "sweep").exists()
    assert main([*command, *options, *sweep]) == 0
    assert "--status sweep" in capsys.readouterr().out
    folder = launch_folder(runs, "sweep")
    record = read_launch(folder)
    assert (folder / f"{record.job}_submission.sh").read_text().strip() == script.strip()
    assert f"export PYTHONPATH={folder}/code" in script and "#SBATCH --array=0-3%2" in script
    assert load_config(folder / "configs/3.yaml").deepspeed == f"{folder}/configs/zero2_fp32.json"

    assert main([*command, *options, *sweep]) == 2
    assert "still queued or running" in capsys.readouterr().err

    together = []

    def running() -> int:
        return on_slurm.output("squeue", "-h", "-r", "-t", "R", "-j", record.job).count("\n")

    def all_ended() -> bool:
        together.append(running())
        return not on_slurm.output("squeue", "-h", "-j", record.job).strip()

    wait_until(all_ended, JOB_SECONDS, "the sweep does not end", every=0.3)
    assert max(together) == 2
    states = [read_state(folder, index) for index in range(4)]
    assert [state.outcome for state in states] == ["done", "done", "failed", "failed"]
    assert main(["launch", "--status", "sweep", "--dir", runs]) == 0
    shown = capsys.readouterr().out
    assert shown.count(" done ") == 2 and shown.count(" failed ") == 2
    assert "learning_rate=1e30,seed=1: " in shown and "loss" in shown
    for seed in (1, 2):
        results = json.loads(
            (place / "runs/sweep" / f"train.learning_rate=3e-4,seed={seed}" / "results.json").read_text()
        )
        assert results["steps"] == 12
    assert main(["launch", "--logs", "sweep", "--dir", runs, "--lines", "3"]) == 0
    assert capsys.readouterr().out.count("==>") == 4


def test_the_local_executor_comes_to_the_same(
    place: Path,
    settings: list[str],
    local: Outcome,
    on_slurm: SlurmCluster,
    capsys: pytest.CaptureFixture[str],
) -> None:
    executor = ["cluster.executor=local", "cluster.gpus_per_node=0", "cluster.tasks_per_node=2"]
    command = ["launch", "--config", "configs/glue_large.yaml", *settings, *executor, "run.name=here"]
    assert main(command) == 0
    assert "done" in capsys.readouterr().out
    outcome = Outcome(place / "runs" / "here", "", "", 0)
    assert outcome.losses() == local.losses()
    assert "started by submitit's local executor" in (outcome.folder / "train.log").read_text().splitlines()[0]


def test_launch_cancels(
    place: Path, settings: list[str], on_slurm: SlurmCluster, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = str(place / "runs")
    command = ["launch", "--config", "configs/glue_large.yaml", *settings, *ON_CLUSTER, "run.name=unwanted"]
    assert main([*command, "cluster.sbatch={begin: now+600}"]) == 0
    assert main(["launch", "--status", "unwanted", "--dir", runs]) == 0
    assert "pending" in capsys.readouterr().out
    assert main(["launch", "--cancel", "unwanted", "--dir", runs]) == 0
    job = read_launch(launch_folder(runs, "unwanted")).job
    wait_until(lambda: on_slurm.field(job, "JobState") == "CANCELLED", 20, "not cancelled")
    assert main(["launch", "--status", "unwanted", "--dir", runs]) == 0
    assert "cancelled" in capsys.readouterr().out


# ---- the scripts as they are, and what SLURM refuses


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_is_accepted_and_its_configuration_builds(script: str, on_slurm: SlurmCluster) -> None:
    done = on_slurm.run("sbatch", "--test-only", f"slurm/{script}", "run.seed=1", cwd=ROOT)
    assert done.returncode == 0 and "to start at" in done.stderr, done.stderr
    text = (ROOT / "slurm" / script).read_text()
    [call] = [line for line in text.splitlines() if line.startswith("hdscale_run ")]
    path, *overrides = call.removeprefix("hdscale_run ").removesuffix(' "$@"').split()
    config = load_config(ROOT / path, overrides)
    # the hub's checkpoint has the architecture of the built-in size
    config.model.name = re.sub(r"google/t5-(\w+)-lm-adapt", r"t5-v1_1-\1", config.model.name)
    model = build_model(resolve_model(config), device="meta")
    assert 0 < sum(p.numel() for p in model.parameters() if p.requires_grad)
    options = dict(
        line.removeprefix("#SBATCH --").split("=", 1)
        for line in text.splitlines()
        if "=" in line and line.startswith("#SBATCH")
    )
    if "run.name=" not in call:
        # the script and `hdscale launch` ask for the same machines
        assert int(options["nodes"]) == config.cluster.nodes
        assert int(options["gpus-per-node"]) == config.cluster.gpus_per_node
    assert options["ntasks-per-node"] == options["gpus-per-node"]
    assert options["job-name"] == config.run.name
    ranks = int(options["nodes"]) * int(options["ntasks-per-node"])
    assert config.train.global_batch_size % ranks == 0


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("cluster.partition=gpuu", "no partition 'gpuu' here"),
        ("cluster.gpus_per_node=16", "a node of partition main has 8 GPUs"),
        ("cluster.nodes=8", "partition main has 4 nodes"),
        ("cluster.cpus_per_task=65", "more than the 64 cores"),
        ("cluster.mem=4000G", "sbatch refuses the job"),
        ("cluster.time=soon", "cluster.time='soon' is not a time limit"),
        ("cluster.sbatch={no-such-option: 1}", "sbatch refuses the job"),
        ("cluster.nods=2", "did you mean 'cluster.nodes'?"),
        ("train.max_step=3", "did you mean 'train.max_steps'?"),
        ("method.name=hyperdecodr", "hyperdecoder"),
        ("data.tasks=[gleu]", "glue"),
        ("model.name=/no/such/folder", "/no/such/folder"),
    ],
)
def test_a_mistake_is_one_line_and_submits_nothing(
    override: str,
    words: str,
    on_slurm: SlurmCluster,
    settings: list[str],
    place: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    before = on_slurm.output("squeue", "-h", "-t", "all", "-o", "%i")
    command = [
        "launch",
        "--config",
        "configs/glue_large.yaml",
        *settings,
        *ON_CLUSTER,
        "run.name=wrong",
        override,
    ]
    assert main(command) == 2
    captured = capfd.readouterr()
    lines = [line for line in captured.err.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("hdscale: error: ") and words in lines[0], captured.err
    assert not launch_folder(place / "runs", "wrong").exists()
    assert on_slurm.output("squeue", "-h", "-t", "all", "-o", "%i") == before


def test_sbatch_refuses_a_script_outside_of_the_repository(slurm: SlurmCluster, place: Path) -> None:
    log = place / "astray.out"
    done = slurm.run(
        "sbatch", "--parsable", *TWO_NODES, f"--output={log}", str(ROOT / "slurm/glue_large.sh"), cwd=place
    )
    job = done.stdout.strip()
    cluster = Cluster(slurm, place, [])
    wait_until(lambda: cluster.ended(job), 60, "does not end")
    assert slurm.field(job, "ExitCode") == "2:0"
    assert "submit from its root, or set HDSCALE_ROOT" in log.read_text()
