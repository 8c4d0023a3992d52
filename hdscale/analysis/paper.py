"""The paper's tables as data: rows, columns, printed scores and shares, and the configuration that trains each row."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from hdscale.errors import UserError, nearest

ASSET = Path(__file__).resolve().parent / "assets" / "paper.yaml"
CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "paper"
"""One configuration for each row that is trained (in the repository; an installed package has none)."""


@dataclass(frozen=True)
class Column:
    """A column of scores: its header and where its number is in a `results.json`.

    `path` is (task, metric) of a task, or (average,) of the averages.
    """

    header: str
    path: tuple[str, ...]


@dataclass(frozen=True)
class PaperRow:
    """A printed row.

    Attributes:
        percent: printed share of trainable parameters; None where none is printed.
        config: stem of the file in configs/paper that trains it; None for a row that the paper reports from elsewhere.
        scores: printed numbers (x100) in the order of the columns, None where there is none.
        reported: where a row that the paper did not train comes from.
        percent_note: why the exact share differs from the printed one by more than 0.1.
    """

    name: str
    percent: float | None
    config: str | None
    scores: tuple[float | None, ...]
    reported: str | None = None
    percent_note: str | None = None
    note: str | None = None


@dataclass(frozen=True)
class PaperTable:
    """A printed table."""

    key: str
    title: str
    columns: tuple[Column, ...]
    rows: tuple[PaperRow, ...]
    note: str | None = None


@functools.cache
def paper_tables() -> dict[str, PaperTable]:
    """The tables by key ("table1"), in the paper's order."""
    tree = yaml.safe_load(ASSET.read_text())["tables"]
    return {
        key: PaperTable(
            key,
            table["title"],
            tuple(Column(column[0], tuple(column[1:])) for column in table["columns"]),
            tuple(PaperRow(**{**row, "scores": tuple(row["scores"])}) for row in table["rows"]),
            table.get("note"),
        )
        for key, table in tree.items()
    }


def paper_table(key: str) -> PaperTable:
    """A table by key ("table1") or number ("1").

    Raises:
        UserError: for one that the paper does not have.
    """
    tables = paper_tables()
    key = f"table{key}" if key.isdigit() else key
    if key not in tables:
        raise UserError(f"no table '{key}' of scores in the paper{nearest(key, tables)}")
    return tables[key]


def config_path(stem: str) -> Path:
    """The configuration that trains a row.

    Raises:
        UserError: where the repository's configs/ are not there.
    """
    path = CONFIGS / f"{stem}.yaml"
    if not path.is_file():
        raise UserError(f"no {path}; run this from a checkout of the repository, which has configs/paper/")
    return path


def trained_rows(keys: Sequence[str]) -> list[tuple[PaperTable, PaperRow]]:
    """The rows of these tables that a configuration trains."""
    return [(paper_table(key), row) for key in keys for row in paper_table(key).rows if row.config is not None]
