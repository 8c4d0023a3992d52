"""Who a rank is, read from each launcher's variables; and the ranks' first meeting."""

from __future__ import annotations

import socket
import threading

import pytest
import torch.distributed as dist

from hdscale.engine import environment, rendezvous
from hdscale.engine.environment import (
    Launch,
    expand_node_list,
    host_names,
    port_of_job,
    read_environment,
    set_interface,
)
from hdscale.engine.rendezvous import RendezvousError, meet
from hdscale.errors import UserError

SLURM = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "9",
    "SLURM_NTASKS": "99",
    "SLURM_STEP_NUM_TASKS": "12",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "8,4",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    # left over in the user's shell
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "3",
    "MASTER_ADDR": "login",
    "MASTER_PORT": "1234",
}
RANKS = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "a", "MASTER_PORT": "29501"}


@pytest.fixture
def no_scontrol(monkeypatch: pytest.MonkeyPatch) -> None:
    """As inside a container."""
    monkeypatch.setattr(environment.shutil, "which", lambda name: None)


def test_slurm(no_scontrol: None) -> None:
    launch = read_environment(SLURM)
    assert (launch.launcher, launch.rank, launch.world_size) == ("slurm", 9, 12)
    assert (launch.local_rank, launch.local_world_size) == (1, 4)
    assert (launch.master_addr, launch.master_port) == ("gpu07", port_of_job(4711))
    assert str(launch).startswith(
        "started by srun (SLURM) job 4711 step 0 on gpu[07-08]: rank 9 of 12, local rank 1 of 4"
    )


@pytest.mark.parametrize(
    ("distribution", "nodes"),
    [
        ({}, ("a", "a", "a", "b")),
        ({"SLURM_DISTRIBUTION": "block:cyclic"}, ("a", "a", "a", "b")),
        ({"SLURM_DISTRIBUTION": "cyclic"}, ("a", "b", "a", "a")),
        ({"SLURM_DISTRIBUTION": "plane=2"}, ()),
    ],
)
def test_slurm_and_the_nodes_of_all_ranks(
    distribution: dict[str, str], nodes: tuple[str, ...], no_scontrol: None
) -> None:
    tasks = {"SLURM_STEP_NODELIST": "a,b", "SLURM_STEP_TASKS_PER_NODE": "3,1", "SLURM_STEP_NUM_TASKS": "12"}
    assert read_environment({**SLURM, **tasks, **distribution}).nodes == nodes


def test_slurm_says_that_a_job_was_restarted(no_scontrol: None) -> None:
    assert "restart 2" in str(read_environment({**SLURM, "SLURM_RESTART_COUNT": "2"}))


def test_the_meeting_place_can_be_overridden_but_not_by_accident(no_scontrol: None) -> None:
    launch = read_environment({**SLURM, "HDSCALE_MASTER_ADDR": "gpu07-ib", "HDSCALE_MASTER_PORT": "15001"})
    assert (launch.master_addr, launch.master_port) == ("gpu07-ib", 15001)


def test_torchrun_and_deepspeed_inside_a_slurm_step(no_scontrol: None) -> None:
    torchrun = {**SLURM, **RANKS, "TORCHELASTIC_RUN_ID": "x", "LOCAL_WORLD_SIZE": "2"}
    assert read_environment(torchrun) == Launch("torchrun", 3, 4, 1, "a", 29501, 2)
    deepspeed = {**SLURM, **RANKS, "CROSS_RANK": "0", "LOCAL_SIZE": "4"}
    assert read_environment(deepspeed) == Launch("deepspeed", 3, 4, 1, "a", 29501, 4)


def test_variables_set_by_hand() -> None:
    assert read_environment(RANKS) == Launch("environment", 3, 4, 1, "a", 29501, 1)


def test_submitit_local() -> None:
    launch = read_environment(
        {"SUBMITIT_LOCAL_JOB_ID": "77", "SUBMITIT_LOCAL_GLOBALID": "1", "SUBMITIT_LOCAL_NTASKS": "2"}
        | {"SUBMITIT_LOCAL_LOCALID": "1"}
    )
    assert (launch.launcher, launch.rank, launch.world_size, launch.local_world_size) == ("submitit", 1, 2, 2)


def test_nothing_and_a_batch_script_without_srun_are_one_process() -> None:
    assert read_environment({}) == Launch("none")
    batch = read_environment({"SLURM_JOB_ID": "5", "SLURM_PROCID": "0", "SLURM_NTASKS": "8"})
    assert (batch.launcher, batch.world_size) == ("none", 1)
    assert str(batch) == "no launcher (inside SLURM job 5, but not by srun): one process"


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({**RANKS, "RANK": "four"}, "RANK='four' is not a number"),
        ({**RANKS, "RANK": "4"}, "rank 4 of 4 is impossible"),
        ({"RANK": "0", "CROSS_RANK": "0"}, "WORLD_SIZE is not set"),
    ],
)
def test_contradictions_are_one_line(variables: dict[str, str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        read_environment(variables)


@pytest.mark.parametrize(
    ("nodes", "names"),
    [
        ("n1", ["n1"]),
        ("n[1-3]", ["n1", "n2", "n3"]),
        ("gpu[08-10,12],login", ["gpu08", "gpu09", "gpu10", "gpu12", "login"]),
        ("r[1-2]n[09-10]", ["r1n09", "r1n10", "r2n09", "r2n10"]),
        ("a-1,b-[2,4]-x", ["a-1", "b-2-x", "b-4-x"]),
        ("", []),
    ],
)
def test_node_lists(nodes: str, names: list[str], no_scontrol: None) -> None:
    assert expand_node_list(nodes) == host_names(nodes) == names


def test_ports_of_neighbouring_jobs_and_steps_differ() -> None:
    ports = [port_of_job(job, step) for job in range(70_000, 71_024) for step in range(16)]
    assert len(set(ports)) == len(ports)
    assert min(ports) >= 15_000 and max(ports) < 32_768


def test_interface() -> None:
    environ = {"GLOO_SOCKET_IFNAME": "eth1"}
    set_interface("ib0", environ)
    assert environ == {"GLOO_SOCKET_IFNAME": "eth1", "NCCL_SOCKET_IFNAME": "ib0"}
    environ = {"HDSCALE_INTERFACE": "ib1"}
    set_interface(None, environ)
    assert environ["NCCL_SOCKET_IFNAME"] == environ["GLOO_SOCKET_IFNAME"] == "ib1"
    set_interface(None, empty := {})
    assert empty == {}


# ---- the meeting


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def gather(launches: list[Launch], seconds: float) -> list[object]:
    """Each launch's store or error, all ranks at once in threads of this process."""
    answers: list[object] = [None] * len(launches)

    def one(index: int) -> None:
        try:
            answers[index] = meet(launches[index], seconds)
        except RendezvousError as error:
            answers[index] = str(error)

    threads = [threading.Thread(target=one, args=(index,)) for index in range(len(launches))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return answers


@pytest.fixture
def short_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "GRACE_SECONDS", 1)


def ranks(world_size: int, present: list[int], port: int, job: str = "job 1") -> list[Launch]:
    return [Launch("slurm", rank, world_size, 0, "127.0.0.1", port, 1, job) for rank in present]


def test_all_ranks_meet() -> None:
    stores = gather(ranks(3, [0, 1, 2], free_port()), 30)
    stores[2].set("x", "1")  # type: ignore[attr-defined]
    assert stores[0].get("x") == b"1"  # type: ignore[attr-defined]


def test_missing_ranks_are_named_to_all(short_grace: None) -> None:
    port = free_port()
    answers = gather(ranks(5, [0, 2, 3], port), 2)
    assert answers == [f"after 2 s at 127.0.0.1:{port}, ranks 1, 4 of 5 are missing"] * 3


def test_missing_ranks_are_named_with_their_nodes(short_grace: None) -> None:
    port = free_port()
    there = Launch("slurm", 0, 4, 0, "127.0.0.1", port, 1, "job 1", nodes=("n1", "n1", "n2", "n2"))
    assert gather([there], 1) == [f"after 1 s at 127.0.0.1:{port}, ranks 1, 2, 3 of 4 are missing (on n1, n2)"]


def test_ranks_that_torchrun_starts_again_meet_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """The agent's store outlives them, and still has what the first ones said."""
    agent = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    for attempt in (0, 1):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(attempt))
        launches = [Launch("torchrun", rank, 2, rank, "127.0.0.1", agent.port, 2) for rank in range(2)]
        stores = gather(launches, 30)
        assert not stores[0].check(["of the ranks"])  # type: ignore[attr-defined]
        stores[1].set("of the ranks", "1")  # type: ignore[attr-defined]
        assert stores[0].get("of the ranks") == b"1"  # type: ignore[attr-defined]


def test_a_missing_rank_0_is_named() -> None:
    [answer] = gather(ranks(2, [1], free_port()), 1)
    assert "does not reach rank 0 at 127.0.0.1" in str(answer) and "rank 0 is missing" in str(answer)


def test_two_runs_at_one_port_do_not_mix(short_grace: None) -> None:
    port = free_port()
    ours, theirs = ranks(2, [0, 1], port, "job 1"), ranks(2, [1], port, "job 2")
    answers = gather([ours[0], theirs[0]], 2)
    assert "rank 1 of 2 is missing" in str(answers[0])
    assert "another run (job 1) listens" in str(answers[1]) and "HDSCALE_MASTER_PORT" in str(answers[1])
