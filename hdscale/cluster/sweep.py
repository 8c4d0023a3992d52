"""Sweeps: `--sweep method.decoder.dim=32,64 run.seed=1..25` is the grid of all combinations."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TypeVar

from hdscale.errors import UserError

Point = TypeVar("Point")


def grid(axes: Mapping[str, Sequence[Point]]) -> Iterator[dict[str, Point]]:
    """Every combination of one point from each axis, the last axis changing fastest: {axis: its point}."""
    for row in itertools.product(*axes.values()):
        yield dict(zip(axes, row, strict=True))


def expand(axes: list[str]) -> list[tuple[str, list[str]]]:
    """(name, overrides) of every run of a sweep, the last axis changing fastest.

    An axis is `key=value,value,…`; `1..25` stands for the whole numbers from 1 to 25, both included; a comma
    inside brackets does not separate (`data.tasks=[cola,sst2],[rte]`).

    Raises:
        UserError: for an axis that is not key=values, one without a value, or a key that comes twice.
    """
    columns: list[list[tuple[str, str]]] = []
    for axis in axes:
        key, separator, text = axis.partition("=")
        values = [value for part in split(text) for value in numbers(part)]
        if not separator or not key or not values:
            raise UserError(f"--sweep {axis!r} is not key=value,value; write for example --sweep run.seed=1..5")
        columns.append([(key, value) for value in values])
    keys = [column[0][0] for column in columns]
    for key in keys:
        if keys.count(key) > 1:
            raise UserError(f"--sweep names {key} twice; join its values: {key}=a,b,c")
        if key in ("run.name", "run.dir"):
            raise UserError(f"--sweep cannot set {key}: the runs are named after what is swept")
        if key.startswith("cluster."):
            raise UserError(f"--sweep cannot set {key}: the jobs of an array are alike; launch once a value")
    runs = [
        (name_of(tuple(row.items())), [f"{key}={value}" for key, value in row.items()])
        for row in grid({column[0][0]: [value for _, value in column] for column in columns})
    ]
    names = [name for name, _ in runs]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"--sweep has two runs called {name}; leave out one of the equal values")
    return runs


def split(text: str) -> list[str]:
    """The parts between commas that are outside of brackets and quotes; empty ones are left out."""
    parts, depth, quote = [""], 0, ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in "\"'":
            quote = character
        elif character in "[{(":
            depth += 1
        elif character in "]})":
            depth -= 1
        if character == "," and not depth and not quote:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts if part.strip()]


def numbers(part: str) -> list[str]:
    """`2..4` -> 2, 3, 4; anything else is one value."""
    match = re.fullmatch(r"(-?\d+)\.\.(-?\d+)", part)
    if not match:
        return [part]
    low, high = int(match[1]), int(match[2])
    if high < low:
        raise UserError(f"--sweep range {part} is empty: the smaller number comes first")
    return [str(value) for value in range(low, high + 1)]


def name_of(row: tuple[tuple[str, str], ...]) -> str:
    """A folder's name for one combination: `decoder.dim=32,seed=1`."""
    words = [f"{'.'.join(key.split('.')[-2:]).removeprefix('run.')}={value}" for key, value in row]
    return re.sub(r"[^\w.,=+-]+", "_", ",".join(words)).strip("_")
