"""Whether all nodes see one folder, and how fast and how safe it is: files, renaming, locks."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import filelock

from hdscale.engine.ranks import Ranks
from hdscale.errors import one_line
from hdscale.files import locked, write_text

MIB = 2**20
FILE_MIB = 64
SMALL_FILES = 20
PATIENCE = 10.0
"""Seconds after which a node must see what another one has written."""


@dataclass
class NodeFolder:
    """One node's view of a folder.

    Attributes:
        seen: seconds until the first node's file was there; None: it did not come.
        write, read: MB/s (10^6 bytes) of one file of `FILE_MIB` MiB, written to the disk, and read as another node
            has written it. rename, lock: milliseconds of one atomic write of a small file, and of one lock.
        lock_kept: whether a lock that the first node holds kept this one out.
        fault: what could not be done.
    """

    seen: float | None = None
    write: float = 0.0
    read: float = 0.0
    rename: float = 0.0
    lock: float = 0.0
    lock_kept: bool = False
    fault: str = ""


@dataclass
class Folder:
    """A folder as all nodes see it.

    Attributes:
        title: "run folder" or "cache folder". path: its path.
        free: GiB. nodes: what each node sees. fault: why the first node cannot use it.
    """

    title: str
    path: str
    free: float = 0.0
    nodes: dict[str, NodeFolder] = field(default_factory=dict)
    fault: str = ""

    @property
    def blind(self) -> list[str]:
        """The nodes that do not see what the first one writes."""
        return [node for node, view in self.nodes.items() if view.seen is None and not view.fault]

    @property
    def without_locks(self) -> list[str]:
        """The nodes that another node's lock does not keep out."""
        return [node for node, view in self.nodes.items() if view.seen is not None and not view.lock_kept]


class Probe:
    """The steps of the check, on one process of each node; the others only take part in what is collective.

    Args:
        ranks: all processes.
        leaders: the first process of each node.
        path: the folder, as this process finds it.
        patience: seconds to wait for another node's file.
    """

    def __init__(self, ranks: Ranks, leaders: Sequence[int], path: Path, patience: float = PATIENCE) -> None:
        self.ranks, self.leaders, self.path, self.patience = ranks, list(leaders), path, patience
        self.leads = ranks.rank in self.leaders
        self.view = NodeFolder()

    def check(self, title: str, names: Sequence[str]) -> Folder:
        """Make the check; every process gets what was found.

        Args:
            title: of the folder. names: of the leaders' nodes.
        """
        folder = Folder(title, str(self.path))
        name, folder.fault, folder.free = self.ranks.broadcast_object(
            self.made() if self.ranks.is_main else ("", "", 0.0)
        )
        if folder.fault:
            return folder
        work = self.path / name
        try:
            for step in (self.look, self.write, self.read):
                self.on_leader(step, work)
            with self.locked_by_first(work):
                self.on_leader(self.try_lock, work)
            views = self.ranks.gather_objects(self.view)
        finally:
            if self.ranks.is_main:
                shutil.rmtree(work, ignore_errors=True)
        folder.nodes = {name: views[leader] for name, leader in zip(names, self.leaders, strict=True)}
        return folder

    def made(self) -> tuple[str, str, float]:
        """On the first node: the name of the check's own folder, what is wrong, and the free space in GiB."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            work = Path(tempfile.mkdtemp(prefix=".hdscale-doctor-", dir=self.path))
            write_text(work / "first", work.name, durable=True)
            return work.name, "", shutil.disk_usage(work).free / 2**30
        except OSError as error:
            return "", f"cannot write there ({error.strerror or error})", 0.0

    def on_leader(self, step: Callable[[Path], None], work: Path) -> None:
        """One step on each node, after which all processes meet; what fails is kept and later steps are left out."""
        if self.leads and not self.view.fault and (step == self.look or self.view.seen is not None):
            try:
                step(work)
            except OSError as error:
                self.view.fault = one_line(error)
        self.ranks.barrier()

    def look(self, work: Path) -> None:
        """Wait for the first node's file."""
        began = time.monotonic()
        while time.monotonic() - began <= self.patience:
            with contextlib.suppress(FileNotFoundError):
                if (work / "first").read_text() == work.name:
                    self.view.seen = time.monotonic() - began
                    return
            time.sleep(0.1)

    def write(self, work: Path) -> None:
        """One large file, small ones by an atomic rename, and locks that nobody else wants."""
        block = os.urandom(MIB)
        began = time.perf_counter()
        with (work / f"large.{self.ranks.rank}").open("wb") as stream:
            for _ in range(FILE_MIB):
                stream.write(block)
            stream.flush()
            os.fsync(stream.fileno())
        self.view.write = FILE_MIB * MIB / 1e6 / (time.perf_counter() - began)
        began = time.perf_counter()
        for index in range(SMALL_FILES):
            write_text(work / f"small.{self.ranks.rank}.{index}", f"{index}\n")
        self.view.rename = (time.perf_counter() - began) / SMALL_FILES * 1e3
        began = time.perf_counter()
        for _ in range(SMALL_FILES):
            with contextlib.suppress(NotImplementedError, OSError), locked(work / f"lock.{self.ranks.rank}"):
                pass
        self.view.lock = (time.perf_counter() - began) / SMALL_FILES * 1e3

    def read(self, work: Path) -> None:
        """The large file of the next node."""
        after = self.leaders.index(self.ranks.rank) + 1
        path, read = work / f"large.{self.leaders[after % len(self.leaders)]}", 0
        began = time.perf_counter()
        # a node that does not see the folder has not written its file
        with contextlib.suppress(FileNotFoundError), path.open("rb") as stream:
            while piece := stream.read(MIB):
                read += len(piece)
        if read not in (0, FILE_MIB * MIB):
            raise OSError(f"a file that another node has written has {read} bytes here, not {FILE_MIB * MIB}")
        self.view.read = read / 1e6 / (time.perf_counter() - began)

    @contextlib.contextmanager
    def locked_by_first(self, work: Path) -> Iterator[None]:
        """The first node holds a lock that all know; without locks there, nobody holds it."""
        with contextlib.ExitStack() as stack:
            if self.ranks.is_main:
                with contextlib.suppress(NotImplementedError, OSError):
                    stack.enter_context(locked(work / "lock"))
            self.ranks.barrier()
            yield
            self.ranks.barrier()

    def try_lock(self, work: Path) -> None:
        """Try to take the lock that the first node holds."""
        try:
            with locked(work / "lock", timeout=0):
                pass
        except filelock.Timeout:
            self.view.lock_kept = True
        except NotImplementedError:
            pass


def folder_faults(folder: Folder, first: str) -> list[str]:
    """One line for each node that cannot use the folder as the first one does."""
    if folder.fault:
        return [f"{first}: {folder.title} {folder.path}: {folder.fault}"]
    found = [f"{node}: does not see the {folder.title} {folder.path} of {first}" for node in folder.blind]
    for node, view in folder.nodes.items():
        if view.fault:
            found.append(f"{node}: {folder.title} {folder.path}: {view.fault}")
    return found
