"""torchrun's rendezvous and `deepspeed --hostfile` as two nodes on this machine: the losses of one node."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hdscale.engine.ranks import free_port
from tests.helpers.places import ROOT

pytestmark = pytest.mark.slow

BIN = Path(sys.executable).parent
STEPS = 4
SETTINGS = [f"train.max_steps={STEPS}", "train.log_every=1", "eval.every=0", "eval.limit=4", "eval.test_limit=4"]
SECONDS = 240.0
SSH = """#!/bin/bash
# in place of ssh: the command runs here, with none of the caller's variables, as on another machine
while [ "${1:0:1}" = - ]; do [ "$1" = -o ] && shift; shift; done
echo "$1" >> "$HOME/hosts"
shift
exec env -i HOME="$HOME" PATH=/usr/bin:/bin sh -c "$*"
"""
PDSH = """#!/bin/bash
# in place of pdsh -S -f N -w HOSTS COMMAND: the command on each host, %n its number; the highest exit code
hosts=$5 code=0 number=0
shift 5
for host in ${hosts//,/ }; do
  ssh "$host" "${*//%n/$number}" &
  pids[number]=$!
  number=$((number + 1))
done
for pid in "${pids[@]}"; do
  wait "$pid"
  ended=$?
  [ "$ended" -le "$code" ] || code=$ended
done
exit "$code"
"""


class Machines:
    """Starts commands that belong to one run, each as a node of its own.

    Args:
        folder: of the runs, and the home of the user.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.env = {**os.environ, "HOME": str(folder), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        self.env["PATH"] = f"{folder / 'bin'}:{BIN}:{self.env['PATH']}"
        self.env["PYTHONPATH"] = str(ROOT)

    def run(self, name: str, launchers: list[list[str]], *settings: str) -> list[int]:
        """The exit codes of launchers that start `hdscale/train.py` together."""
        script = ["hdscale/train.py", "--config", "configs/quickstart.yaml", *SETTINGS]
        script += [f"run.dir={self.folder / 'runs'}", f"run.name={name}", *settings]
        with (self.folder / f"{name}.out").open("wb") as output:
            started = [
                subprocess.Popen(
                    [sys.executable, str(BIN / launcher[0]), *launcher[1:], *script],
                    cwd=ROOT, env=self.env, stdout=output, stderr=output, start_new_session=True,
                )
                for launcher in launchers
            ]  # fmt: skip
            try:
                return [process.wait(SECONDS) for process in started]
            finally:
                for process in started:
                    if process.poll() is None:
                        os.killpg(process.pid, signal.SIGKILL)
                        process.wait()

    def output(self, name: str) -> str:
        return (self.folder / f"{name}.out").read_text()

    def losses(self, name: str) -> list[tuple[int, float]]:
        """(step, loss) of each line of the log."""
        lines = (self.folder / "runs" / name / "metrics.jsonl").read_text().splitlines()
        return [(row["step"], row["loss"]) for row in map(json.loads, lines) if row["kind"] == "train"]

    def first_line(self, name: str) -> str:
        return (self.folder / "runs" / name / "train.log").read_text().splitlines()[0]


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machines]:
    folder = tmp_path_factory.mktemp("nodes")
    (folder / "bin").mkdir()
    for name, text in {"ssh": SSH, "pdsh": PDSH}.items():
        (folder / "bin" / name).write_text(text)
        (folder / "bin" / name).chmod(0o755)
    (folder / "hostfile").write_text("localhost slots=1\n127.0.0.1 slots=1\n")
    yield Machines(folder)


@pytest.fixture(scope="module")
def one_node(machines: Machines) -> list[tuple[int, float]]:
    """The losses of two ranks that one launcher started."""
    codes = machines.run("one", [["torchrun", "--nproc_per_node=2", f"--master_port={free_port()}"]])
    assert codes == [0], machines.output("one")
    losses = machines.losses("one")
    assert [step for step, _ in losses] == list(range(1, STEPS + 1))
    return losses


def torchrun(machines: Machines) -> list[list[str]]:
    """The same command on both nodes."""
    endpoint = f"localhost:{free_port()}"
    command = ["torchrun", "--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d", f"--rdzv_endpoint={endpoint}"]
    return [command, command]


def hostfile(machines: Machines) -> list[list[str]]:
    """One command, which reaches the nodes by pdsh and ssh."""
    place = ["--master_addr=127.0.0.1", f"--master_port={free_port()}"]
    return [["deepspeed", f"--hostfile={machines.folder / 'hostfile'}", *place]]


def without_ssh(machines: Machines) -> list[list[str]]:
    """A command for each node, with the node's number."""
    [command] = hostfile(machines)
    return [[*command, "--no_ssh", f"--node_rank={node}"] for node in range(2)]


@pytest.mark.parametrize(
    ("launch", "launcher"),
    [(torchrun, "torchrun"), (hostfile, "the deepspeed launcher"), (without_ssh, "the deepspeed launcher")],
)
def test_two_nodes_have_the_losses_of_one(
    launch: Callable[[Machines], list[list[str]]],
    launcher: str,
    machines: Machines,
    one_node: list[tuple[int, float]],
) -> None:
    name = launch.__name__
    launchers = launch(machines)
    assert machines.run(name, launchers) == [0] * len(launchers), machines.output(name)
    assert machines.losses(name) == one_node
    # each on a node of its own
    assert f"started by {launcher}: rank 0 of 2, local rank 0 of 1" in machines.first_line(name)


def test_what_travels_to_the_nodes_and_which_exit_code_comes_back(machines: Machines) -> None:
    """DeepSpeed sends few variables; those of ~/.deepspeed_env go as well."""
    file, cache = machines.folder / ".deepspeed_env", machines.folder / "hostfile" / "cache"
    file.write_text(f"HDSCALE_CACHE={cache}\n")
    try:
        [code] = machines.run("mistake", hostfile(machines))
    finally:
        file.unlink()
    said = machines.output("mistake")
    assert code == 2, said
    assert said.count("hdscale: error: ") == 1 and f"cannot make the cache folder {cache}" in said
    assert set((machines.folder / "hosts").read_text().split()) == {"localhost", "127.0.0.1"}
