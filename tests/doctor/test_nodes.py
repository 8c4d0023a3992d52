"""`hdscale doctor --nodes`: each thing that may be wrong with a node is in the verdict, under the node's name."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from hdscale.commands import doctor
from hdscale.commands.cli import main
from hdscale.doctor.nodes.clocks import clock_faults
from hdscale.doctor.nodes.facts import Facts, code_of, differences, gpu_faults, node_name, own_gpu
from hdscale.doctor.nodes.network import CPU_SIZES, Speed, slow_nodes
from hdscale.doctor.nodes.report import Report
from tests.helpers.pretended_gpus import pretend_gpus

TITLES = ("run folder", "cache folder")


@pytest.fixture
def nodes(rank_pool, tmp_path):
    """Examines nodes of one rank each, or of those that `names` says; the answer of rank 0."""

    def call(names, folders=None, **planted):
        shared = [{title: str(tmp_path / title) for title in TITLES}] * len(names)
        answers = rank_pool(len(names)).run(
            "tests.helpers.nodes_jobs:examined", {"names": names, "folders": folders or shared, **planted}
        )
        # all processes leave with the same exit code
        assert len({answer["verdict"] for answer in answers}) == 1
        return answers[0]

    return call


def test_nodes_that_are_alike_are_ready(nodes, tmp_path):
    found = nodes(["n1", "n1", "n2"])
    assert found["ready"] and found["notes"] == []
    assert found["verdict"].startswith("ready: 2 nodes, 3 processes, no GPUs, all-reduce (gloo) ")
    assert found["within"] == [("n1", 2, sorted(CPU_SIZES)), ("n2", 1, [])] and found["across"] == sorted(CPU_SIZES)
    assert abs(found["clocks"]["n2"][0]) < 0.5
    page = "\n".join(found["said"])
    for words in ("n1: 2 processes", "n2: 1 process", "process 2: no GPU", "versions: python 3", "clocks: n2"):
        assert words in page
    for title in TITLES:
        assert f"{title} {tmp_path / title}: seen by all nodes" in page
        assert list((tmp_path / title).iterdir()) == []
    # every part may hang, and has a limit
    assert len(found["limits"]) == 3 + len(TITLES)


def test_everything_that_is_wrong_is_named(nodes, tmp_path):
    """Another version and a clock on n2, a folder that n3 does not see, a wrong sum from n2."""
    folders = [{"run folder": str(tmp_path / "runs")}] * 2 + [{"run folder": str(tmp_path / "elsewhere")}]
    found = nodes(
        ["n1", "n2", "n3"],
        folders,
        ahead=(0.0, -5.0, 0.2),
        versions=({}, {"torch": "1.0"}, {}),
        wrong_sums=1,
    )
    head, _, rest = found["verdict"].partition(": ")
    faults = rest.split("; ")
    assert head == "not ready" and not found["ready"]
    assert [fault for fault in faults if fault.startswith("torch: n2 has 1.0, the other nodes 2.")]
    assert "n2: its clock is 5.0 s behind n1's" in faults
    assert f"n3: does not see the run folder {tmp_path / 'runs'} of n1" in faults
    assert len([fault for fault in faults if "a sum over 3 processes is wrong" in fault]) == 3
    assert len(faults) == 6


def test_a_cache_may_be_each_nodes_own_and_locks_may_be_missing(nodes, tmp_path):
    folders = [{"run folder": str(tmp_path / "runs"), "cache folder": str(tmp_path / name)} for name in ("a", "b")]
    found = nodes(["n1", "n2"], folders, no_locks=1)
    assert found["ready"]
    assert [note.split(": ")[0] for note in found["notes"]] == [
        f"locks in the run folder {tmp_path / 'runs'} do not keep out n2",
        f"the cache folder {tmp_path / 'a'} is each node's own",
    ]


def test_a_folder_that_cannot_be_written(nodes, tmp_path):
    (tmp_path / "file").touch()
    found = nodes(["n1", "n2"], [{"run folder": str(tmp_path / "file")}] * 2)
    assert found["verdict"] == f"not ready: n1: run folder {tmp_path / 'file'}: cannot write there (File exists)"


# ---- what follows from the facts


def facts(node: str, rank: int = 0, **values: object) -> Facts:
    return Facts(rank, rank, node, **values)  # type: ignore[arg-type]


def with_gpu(node: str, rank: int, identity: str, name: str = "H100", free: float = 79.0) -> Facts:
    return facts(node, rank, gpu=name, gpu_id=identity, gpu_free=free, gpu_total=80.0)


def test_of_two_nodes_neither_is_the_usual_one():
    found = differences([facts("n1", versions={"torch": "2.13"}), facts("n2", 1, versions={"torch": "2.12"})])
    assert found == ["torch: n1 has 2.13, n2 has 2.12"]


def test_gpus():
    good = [with_gpu("n1", 0, "a"), with_gpu("n1", 1, "b"), with_gpu("n2", 2, "a")]
    assert gpu_faults(good) == [] == gpu_faults([facts("n1"), facts("n2", 1)])
    assert gpu_faults([*good, facts("n3", 3)]) == ["n3: no GPU is visible, other nodes have some"]
    assert gpu_faults([*good, facts("n2", 3, fault="local rank 1 has no GPU")]) == ["n2: local rank 1 has no GPU"]
    assert gpu_faults([*good, with_gpu("n2", 3, "a")]) == ["n2: processes 2 and 3 share one GPU"]
    assert gpu_faults([*good, with_gpu("n3", 3, "a", name="A100")]) == [
        "GPUs of different models: n1 has H100, n2 has H100, n3 has A100"
    ]
    [busy] = gpu_faults([*good, with_gpu("n2", 3, "b", free=60.0)])
    assert busy == "n2: of GPU 3 only 60.0 of 80.0 GiB are free; something else uses it"


def test_gpus_that_slurm_gave_and_torch_does_not_see(monkeypatch):
    pretend_gpus(monkeypatch)
    assert own_gpu(0, {"SLURM_GPUS_ON_NODE": "0"}) == own_gpu(0, {}) == {}
    fault = own_gpu(0, {"SLURM_GPUS_ON_NODE": "8"})["fault"]
    assert gpu_faults([facts("n1", 0, fault=fault), facts("n1", 1, fault=fault)]) == [f"n1: {fault}"]
    assert fault.startswith("GPUs from SLURM: 8, seen by torch ")


def test_a_slow_node():
    speeds = [Speed("n1", 8, {1: 100.0, 2: 400.0}), Speed("n2", 8, {1: 90.0, 2: 150.0}), Speed("n3", 4, {1: 1.0})]
    assert slow_nodes(speeds) == ["n2: all-reduce within the node has 150 GB/s, within n1 400 GB/s"]


def test_a_clock_is_judged_by_what_is_certain():
    names = {0: "n1", 8: "n2", 16: "n3"}
    assert clock_faults(names, {8: (1.4, 0.5), 16: (1.6, 0.5)}) == ["n3: its clock is 1.6 s ahead of n1's"]


def test_verdict_with_gpus():
    report = Report([with_gpu("n1", 0, "a"), with_gpu("n2", 1, "b")], backend="nccl", across=Speed("all", 2, {1: 40.0}))
    assert report.verdict == "ready: 2 nodes, 2 processes, 2 GPUs (H100), all-reduce (nccl) 40 GB/s across nodes"


def test_code_differs_where_a_source_does(tmp_path: Path):
    (tmp_path / "a.py").write_text("1")
    before = code_of(tmp_path)
    (tmp_path / "notes.txt").write_text("not code")
    assert code_of(tmp_path) == before
    (tmp_path / "a.py").write_text("2")
    assert code_of(tmp_path) != before


def test_slurms_name_of_a_node_comes_first():
    assert node_name({"SLURMD_NODENAME": "gpu07"}) == "gpu07"
    assert node_name({}) != ""


# ---- the verb


def test_what_never_answers_is_cut_off(monkeypatch, capsys):
    codes: list[int] = []
    monkeypatch.setattr(doctor.os, "_exit", codes.append)
    with doctor.ended_after(0.05, "waiting for nothing", show=True):
        time.sleep(0.5)
    assert codes == [1]
    assert capsys.readouterr().out == "not ready: no answer within 0 s while waiting for nothing\n"
    with doctor.ended_after(0.2, "waiting for nothing", show=True):
        pass
    time.sleep(0.4)
    assert codes == [1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run.dir=x"], "run.dir=x belongs to --nodes"),
        (["--nodes", "--gpu"], "--nodes and --gpu are two examinations"),
        (["--nodes", "run.dri=x"], "did you mean 'run.dir'?"),
    ],
)
def test_mistakes(arguments, words, capsys):
    assert main(["doctor", *arguments]) == 2
    assert words in capsys.readouterr().err
