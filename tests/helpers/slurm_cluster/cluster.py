"""Bring up a real SLURM on one machine: munged, slurmctld and one slurmd a node, all below one folder.

Nothing outside that folder is touched but `/etc/hosts` (the nodes' names must resolve), so that a SLURM that
the machine already has is left alone. The nodes' sizes are fictitious: SLURM believes them
(`config_overrides`), and a GPU is a link to /dev/null. As root:

    python -m tests.helpers.slurm_cluster.cluster /tmp/slurm      # starts; prints the line to export; Ctrl-C stops
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

PACKAGES = ["munge", "slurmctld", "slurmd", "slurm-client"]
PROGRAMS = ["munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel"]

CONFIGURATION = """\
ClusterName=hdscale
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
MailProg=/bin/true
# ids of a fresh controller must not repeat those that an earlier one gave: files are named after them
FirstJobId={first_job}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
StateSaveLocation={folder}/state
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdLogFile={folder}/slurmd-%n.log
SlurmdSpoolDir={folder}/spool-%n
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=256
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=1,sched_min_interval=100000
ReturnToService=2
JobRequeue=1
KillWait=30
CompleteWait=0
OverTimeLimit=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
MinJobAge=3600
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc={folder}/completed.txt
GresTypes=gpu
{nodes}
PartitionName=main Nodes={names} Default=YES DefaultTime=60 State=UP PriorityTier=1 GraceTime=60
PartitionName=high Nodes={names} DefaultTime=60 State=UP PriorityTier=10 PreemptMode=OFF
"""


class ClusterUnavailable(RuntimeError):
    """SLURM cannot be brought up here; the message says why."""


class SlurmCluster:
    """A running SLURM. `env` is what a client's environment needs to reach it.

    Args:
        folder: everything of the cluster lies here; short enough for a socket's path (about 90 characters).
        nodes, cpus, gpus, memory: number of nodes, and what each has (memory in MB), true or not.
    """

    def __init__(self, folder: Path, nodes: int = 4, cpus: int = 64, gpus: int = 8, memory: int = 512_000):
        self.folder, self.nodes, self.cpus, self.gpus, self.memory = Path(folder), nodes, cpus, gpus, memory
        self.names = [f"n{number}" for number in range(1, nodes + 1)]
        self.processes: list[subprocess.Popen] = []
        self.env = dict(os.environ, SLURM_CONF=str(self.folder / "slurm.conf"), LC_ALL="C")

    def __enter__(self) -> SlurmCluster:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Install what is missing, write the configuration, start the daemons, wait for the nodes."""
        install_packages()
        self.write_configuration()
        munge_socket = self.folder / "munge.socket"
        munge_files = {"key": "munge.key", "pid": "munged.pid", "log": "munged.log", "seed": "munged.seed"}
        self.spawn(
            "munged", "--foreground", "--force", f"--socket={munge_socket}",
            *[f"--{kind}-file={self.folder / name}" for kind, name in munge_files.items()],
        )  # fmt: skip
        wait_until(munge_socket.exists, 10, "munged does not open its socket", self.logs)
        self.spawn("slurmctld", "-D", "-f", self.env["SLURM_CONF"])
        wait_until(lambda: " UP" in self.output("scontrol", "ping"), 30, "slurmctld does not answer", self.logs)
        for name in self.names:
            self.spawn("slurmd", "-D", "-f", self.env["SLURM_CONF"], "-N", name)
        wait_until(
            lambda: self.output("sinfo", "-hN", "-p", "main", "-o", "%T").split() == ["idle"] * self.nodes,
            60, "the nodes do not come up", self.logs,
        )  # fmt: skip

    def write_configuration(self) -> None:
        """slurm.conf, gres.conf, the munge key, and the nodes' names in /etc/hosts."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "state").mkdir(exist_ok=True)
        host = socket.gethostname().split(".")[0]
        ports = free_ports(self.nodes + 1)
        lines = []
        for name, port in zip(self.names, ports[1:], strict=True):
            (self.folder / f"spool-{name}").mkdir(exist_ok=True)
            size = f"CPUs={self.cpus} RealMemory={self.memory} Gres=gpu:{self.gpus}"
            lines.append(f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} {size} State=UNKNOWN")
        (self.folder / "slurm.conf").write_text(
            CONFIGURATION.format(
                host=host,
                folder=self.folder,
                controller_port=ports[0],
                first_job=int(time.time()) % 50_000_000 + 1,
                nodes="\n".join(lines),
                names=",".join(self.names),
            )
        )
        for number in range(self.gpus):
            with contextlib.suppress(FileExistsError):
                (self.folder / f"gpu{number}").symlink_to("/dev/null")
        gpu_files = f"{self.folder}/gpu[0-{self.gpus - 1}]"
        (self.folder / "gres.conf").write_text(f"NodeName={','.join(self.names)} Name=gpu File={gpu_files}\n")
        (self.folder / "cgroup.conf").write_text("CgroupAutomount=no\n")
        key = self.folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(128))
        for name in [host, *self.names]:
            try:
                socket.gethostbyname(name)
            except OSError:
                with open("/etc/hosts", "a") as hosts:
                    hosts.write(f"127.0.0.1 {name}\n")

    def spawn(self, *command: str) -> None:
        """Start a daemon in the foreground of a session of its own."""
        log = open(self.folder / f"{command[0]}.out", "ab")  # noqa: SIM115 (lives as long as the daemon)
        self.processes.append(
            subprocess.Popen(
                command,
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        )

    def stop(self) -> None:
        """Cancel the jobs, wait for them to leave, end the daemons."""
        if shutil.which("scancel") and " UP" in self.output("scontrol", "ping"):
            self.output("scancel", "--user=root")
            with contextlib.suppress(ClusterUnavailable):
                wait_until(lambda: not self.output("squeue", "-h").strip(), 20, "jobs do not leave")
        for process in reversed(self.processes):
            process.send_signal(signal.SIGTERM)
        for process in reversed(self.processes):
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self.processes.clear()

    def run(self, *command: str, timeout: float = 120, **options: object) -> subprocess.CompletedProcess[str]:
        """A client command in the cluster's environment, output captured."""
        options = {"env": self.env, **options}
        return subprocess.run(  # type: ignore[call-overload]
            command, text=True, capture_output=True, timeout=timeout, **options
        )

    def output(self, *command: str) -> str:
        """What a client command prints; empty where it fails."""
        try:
            return self.run(*command, timeout=30).stdout
        except subprocess.TimeoutExpired:
            return ""

    def logs(self) -> str:
        """The ends of the daemons' logs, for a failure's message."""
        files = sorted(self.folder.glob("*.log")) + sorted(self.folder.glob("*.out"))
        return "\n".join(f"--- {file.name}\n{file.read_text(errors='replace')[-1500:]}" for file in files)

    def field(self, job: str, name: str) -> str:
        """One field of `scontrol show job`, such as JobState, Restarts or NodeList."""
        for word in self.output("scontrol", "show", "job", "-o", job).split():
            key, _, value = word.partition("=")
            if key == name:
                return value
        return ""


def install_packages() -> None:
    """Install SLURM and munge (Debian) where they are missing."""
    if os.geteuid() != 0:
        raise ClusterUnavailable("bringing up SLURM needs root")
    if all(find_program(name) for name in PROGRAMS):
        return
    if not shutil.which("apt-get"):
        raise ClusterUnavailable(f"SLURM is not installed and there is no apt-get to install {' '.join(PACKAGES)}")
    apt = ["apt-get", "-q", "-y", "--no-install-recommends"]
    env = dict(os.environ, DEBIAN_FRONTEND="noninteractive")
    for command in (["apt-get", "-q", "update"], [*apt, "install", *PACKAGES]):
        done = subprocess.run(command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        if done.returncode:
            raise ClusterUnavailable(f"{' '.join(command)} failed: {done.stdout.strip()[-500:]}")


def find_program(name: str) -> str | None:
    """Path of a program, sbin included."""
    return shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now."""
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def wait_until(
    true: Callable[[], bool],
    seconds: float,
    what: str,
    details: Callable[[], str] | None = None,
    every: float = 0.2,
) -> None:
    """Poll until `true()`; ClusterUnavailable after `seconds`."""
    end = time.monotonic() + seconds
    while not true():
        if time.monotonic() > end:
            raise ClusterUnavailable(f"{what} within {seconds:.0f} s" + (f"\n{details()}" if details else ""))
        time.sleep(every)


def main(arguments: Sequence[str]) -> int:
    """Keep a cluster up until interrupted."""
    with SlurmCluster(Path(arguments[0] if arguments else "/tmp/hdscale-slurm")) as cluster:
        print(f"export SLURM_CONF={cluster.env['SLURM_CONF']}", flush=True)
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        with contextlib.suppress(KeyboardInterrupt):
            signal.pause()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
