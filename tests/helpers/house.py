"""The structure of the package, read from its sources: which way imports point, circles of files, late imports.

`python -m tests.helpers.house [ROOT]` prints the numbers of a checkout, and exits with 1 if a rule is broken. It reads
the sources only, so it needs nothing but Python.
"""

from __future__ import annotations

import ast
import sys
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "hdscale"
ORDER = (
    "commands > doctor > train > bench > analysis | study > report > launch | load > resolve > config > evaluation"
    " > engine > modeling > bases | data | cluster > runs > ops > files > requirements > errors | settings"
)
"""A room imports only rooms to its right; rooms joined by | do not import each other."""
LEVELS = {room.strip(): level for level, rooms in enumerate(ORDER.split(">")) for room in rooms.split("|")}
MOST_LATE_IMPORTS = 30
"""Imports inside functions: each of them saves something, which a comment beside it says."""
EXCEPTIONS = {
    # entry points: `python -m hdscale`, `deepspeed hdscale/train.py`, and what batch scripts of 0.1 call
    ("hdscale.__main__", "hdscale.commands.cli"),
    ("hdscale.train", "hdscale.commands.train"),
    ("hdscale.cluster.batch", "hdscale.commands.batch"),
    # settings raise the errors that users see
    ("hdscale.settings", "hdscale.errors"),
}


@dataclass
class Import:
    """One import by a file of the package: of another file of it, or of anything outside."""

    file: str
    line: int
    target: str
    late: bool
    """Inside a function."""

    def __str__(self) -> str:
        return f"{self.file}, line {self.line}, imports {self.target}"


@dataclass
class House:
    """What the sources of a checkout say."""

    files: dict[str, Path]
    inside: list[Import] = field(default_factory=list)
    """Imports of files of the package."""
    outside: list[Import] = field(default_factory=list)
    """Imports of anything else."""


def read_house(root: Path = ROOT) -> House:
    """Every import statement of the package at `root`, with the file that it really reaches."""
    files = {}
    for path in sorted((root / PACKAGE).rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    house = House(files)
    for name, path in files.items():
        tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
        late = {
            id(node)
            for function in ast.walk(tree)
            if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
            for node in ast.walk(function)
        }
        for node in ast.walk(tree):
            for target in imported(node):
                if target == f"{PACKAGE}.__version__":
                    continue
                own = target == PACKAGE or target.startswith(PACKAGE + ".")
                kept = house.inside if own else house.outside
                kept.append(Import(name, node.lineno, file_of(target, files) if own else target, id(node) in late))
    return house


def imported(node: ast.AST) -> list[str]:
    """The dotted names that an import statement asks for."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        assert node.level == 0 and node.module, "imports are absolute"
        return [f"{node.module}.{alias.name}" for alias in node.names]
    return []


def file_of(target: str, files: dict[str, Path]) -> str:
    """The file of the package that a dotted name is in."""
    while target not in files:
        target = target.rsplit(".", 1)[0]
    return target


def room_of(name: str) -> str:
    """The room of a file: `hdscale.data.mixture` is in `data`; the package's own file is in none."""
    return name.split(".")[1] if "." in name else ""


def climbs(house: House) -> list[Import]:
    """Imports that do not point to a room further to the right."""
    found = []
    for one in house.inside:
        here, there = room_of(one.file), room_of(one.target)
        # the package's own file imports its names for type checkers, and in `__getattr__` when they are first used
        if here == there or one.file == PACKAGE or (one.file, one.target) in EXCEPTIONS:
            continue
        if here not in LEVELS or there not in LEVELS or LEVELS[there] <= LEVELS[here]:
            found.append(one)
    return found


def circles(house: House) -> list[list[str]]:
    """Groups of files that import one another in a circle (the exceptions aside)."""
    targets: dict[str, set[str]] = {name: set() for name in house.files}
    for one in house.inside:
        if one.file != one.target and (one.file, one.target) not in EXCEPTIONS:
            targets[one.file].add(one.target)

    @cache
    def reached(name: str) -> frozenset[str]:
        seen: set[str] = set()
        stack = [name]
        while stack:
            for target in targets[stack.pop()] - seen:
                seen.add(target)
                stack.append(target)
        return frozenset(seen)

    groups = {frozenset(other for other in reached(name) if name in reached(other)) for name in targets}
    return sorted(sorted(group) for group in groups if group)


def late_imports(house: House) -> list[tuple[str, int]]:
    """(file, line) of each import statement inside a function."""
    return sorted({(one.file, one.line) for one in house.inside + house.outside if one.late})


def argument_readers(house: House) -> list[str]:
    """Files outside of the commands that import argparse."""
    users = {one.file for one in house.outside if one.target.split(".")[0] == "argparse"}
    return sorted(name for name in users if room_of(name) != "commands")


def lines(house: House) -> int:
    """Lines of the package's Python, C++ and CUDA."""
    sources = [path for path in (next(iter(house.files.values())).parent).rglob("*") if path.suffix in SOURCES]
    return sum(len(path.read_text(encoding="utf-8").splitlines()) for path in sources)


SOURCES = {".py", ".cpp", ".cu", ".cuh", ".h"}


def main(arguments: list[str]) -> int:
    """Print the numbers of a checkout."""
    house = read_house(Path(arguments[0]) if arguments else ROOT)
    climbing, circular, late, arguing = climbs(house), circles(house), late_imports(house), argument_readers(house)
    print(f"files {len(house.files)}, lines {lines(house)}")
    print(f"climbing imports {len(climbing)}", *climbing, sep="\n  ")
    print(f"circles of files {len(circular)}", *(", ".join(names) for names in circular), sep="\n  ")
    print(f"imports inside functions {len(late)} (at most {MOST_LATE_IMPORTS})")
    print(f"files outside of commands that read arguments {len(arguing)}", *arguing, sep="\n  ")
    return int(bool(climbing or circular or arguing or len(late) > MOST_LATE_IMPORTS))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
