"""What was found on several nodes: lines for people, and one line that says whether a run can start there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from hdscale.doctor.nodes.facts import Facts, nodes_of
from hdscale.doctor.nodes.network import MIB, Speed
from hdscale.doctor.nodes.shared_folder import Folder


@dataclass
class Report:
    """Everything that was found.

    Attributes:
        facts: of each process, in order of rank.
        clocks: node to (seconds by which it is ahead of the first node, error of that).
        backend: of all-reduce: nccl or gloo. within: for each node. across: for all processes, with several nodes.
        folders: the run folder and the cache folder.
        problems: what must be mended, one line each. notes: what is worth knowing.
    """

    facts: list[Facts]
    clocks: dict[str, tuple[float, float]] = field(default_factory=dict)
    backend: str = ""
    within: list[Speed] = field(default_factory=list)
    across: Speed | None = None
    folders: list[Folder] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def ready(self) -> bool:
        """Whether nothing was found wrong."""
        return not self.problems

    @property
    def verdict(self) -> str:
        """One line: ready, with what is there; or what is wrong, by the nodes' names."""
        if self.problems:
            return not_ready(self.problems)
        gpus = [one.gpu for one in self.facts if one.gpu]
        what = f"{counted(len(gpus), 'GPU')} ({gpus[0]})" if gpus else "no GPUs"
        parts = [counted(len(nodes_of(self.facts)), "node"), counted(len(self.facts), "process"), what]
        measured = [speed for speed in self.within if speed.bandwidths]
        places = []
        if measured:
            places.append(f"{min(speed.best for speed in measured):.3g} GB/s within a node")
        if self.across:
            places.append(f"{self.across.best:.3g} GB/s across nodes")
        if places:
            parts.append(f"all-reduce ({self.backend}) {', '.join(places)}")
        return f"ready: {', '.join(parts)}"


def not_ready(problems: Sequence[str]) -> str:
    """The verdict where something is wrong."""
    return f"not ready: {'; '.join(problems)}"


def counted(number: int, word: str) -> str:
    """`1 node`, `2 nodes`, `3 processes`."""
    return f"{number} {word}" + ("" if number == 1 else "es" if word.endswith("s") else "s")


def about_nodes(facts: Sequence[Facts]) -> list[str]:
    """Each node and each GPU by name, and the versions that all nodes have."""
    lines = []
    for node, processes in nodes_of(facts).items():
        memory = min(one.memory for one in processes)
        lines.append(f"{node}: {counted(len(processes), 'process')}, {memory:.1f} GiB of memory free")
        for one in processes:
            gpu = f"GPU {one.local_rank}: {one.gpu}, {one.gpu_free:.1f} of {one.gpu_total:.1f} GiB free"
            lines.append(f"  process {one.rank}: {gpu if one.gpu else one.fault or 'no GPU'}")
    versions: dict[str, list[str]] = {}
    for one in facts:
        for name, value in one.versions.items():
            versions.setdefault(name, [])
            if value not in versions[name]:
                versions[name].append(value)
    return [*lines, "versions: " + ", ".join(f"{name} {' / '.join(values)}" for name, values in versions.items())]


def about_clocks(clocks: dict[str, tuple[float, float]]) -> list[str]:
    """Each node's clock against the first node's."""
    parts = [f"{node} {offset:+.4f} s (± {error:.4f})" for node, (offset, error) in clocks.items()]
    return [f"clocks: {', '.join(parts)}"] if parts else []


def about_network(backend: str, speeds: Sequence[Speed]) -> list[str]:
    """A table of the bus bandwidth of all-reduce, by group and size."""
    sizes = sorted({size for speed in speeds for size in speed.bandwidths})
    if not sizes:
        return ["all-reduce: not measured, as no group has two processes that reach each other"]
    rows = [[f"all-reduce ({backend}), GB/s per link", *(f"{shown_size(size)}" for size in sizes)]]
    for speed in speeds:
        if speed.bandwidths:
            values = [speed.bandwidths.get(size) for size in sizes]
            name = f"{speed.where} ({counted(speed.processes, 'process')})"
            rows.append([name, *("" if value is None else f"{value:.3g}" for value in values)])
    first, *others = zip(*rows, strict=True)
    columns = [[cell.ljust(max(map(len, first))) for cell in first]]
    columns += [[cell.rjust(max(map(len, column))) for cell in column] for column in others]
    return ["  ".join(row) for row in zip(*columns, strict=True)]


def shown_size(size: int) -> str:
    """A size in KiB or MiB."""
    return f"{size // MIB} MiB" if size >= MIB else f"{size // 1024} KiB"


def about_folder(folder: Folder) -> list[str]:
    """Where it is, who sees it, and how fast it is on each node."""
    head = f"{folder.title} {folder.path}"
    if folder.fault:
        return [f"{head}: {folder.fault}"]
    seen = "seen by all nodes" if not folder.blind else f"not seen by {', '.join(folder.blind)}"
    lines = [f"{head}: {seen}, {folder.free:.0f} GiB free"]
    for node, view in folder.nodes.items():
        if view.fault:
            lines.append(f"  {node}: {view.fault}")
        elif view.seen is not None:
            lines.append(
                f"  {node}: seen after {view.seen:.1f} s, writes {view.write:.0f} MB/s, reads {view.read:.0f} MB/s, "
                f"renames in {view.rename:.1f} ms, locks in {view.lock:.1f} ms"
            )
    return lines
