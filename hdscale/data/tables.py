"""Rows of parquet, JSONL, CSV and TSV files as examples: the reader of all tasks whose data are tables."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from hdscale.data import hub
from hdscale.data.settings import DataSettings
from hdscale.data.task import Example, Task
from hdscale.errors import UserError, nearest, one_line
from hdscale.files import cache_folder, remembered_sha256

BATCH_ROWS = 4096
csv.field_size_limit(2**31 - 1)  # the default of 128 KiB is shorter than some documents


def origin_paths(task: Task, split: str, settings: DataSettings) -> dict[str, list[Path]]:
    """{own split of the data set: its files} of everything that a split is made of."""
    return {origin: paths_of(task, origin, settings) for origin in task.splits[split].origins}


def paths_of(task: Task, origin: str, settings: DataSettings) -> list[Path]:
    """The files of one of the data set's own splits."""
    if not task.files:
        return hub.split_paths(task, origin, settings)
    paths = [Path(path).expanduser() for path in task.files[origin]]
    for path in paths:
        if not path.is_file():
            raise UserError(
                f"task {task.name}: no file {path} (split '{origin}'); relative paths start at the working folder"
            )
    return paths


@dataclass(frozen=True)
class TableReader:
    """Reads tasks whose data are tables."""

    name: ClassVar[str] = "hdscale.data.tables"
    chunked: ClassVar[bool] = False

    def identity(self, task: Task, split: str, settings: DataSettings) -> list[str]:
        """Checksums of the split's files, in order: together with the declaration they determine its examples."""
        groups, cache = origin_paths(task, split, settings), cache_folder(settings.cache)
        return [f"{origin} {remembered_sha256(path, cache)}" for origin, paths in groups.items() for path in paths]

    def check(self, task: Task, split: str, settings: DataSettings) -> None:
        """Raise UserError, naming file and column, if a file of the split is missing, unreadable, or lacks a
        column."""
        for paths in origin_paths(task, split, settings).values():
            for path in paths:
                known = column_names(path, task)
                if known is None:
                    continue
                for column in task.columns():
                    if column not in known:
                        raise UserError(
                            f"{path}: no column '{column}', which task {task.name} reads{nearest(column, known)}"
                        )

    def size(self, task: Task, split: str, settings: DataSettings) -> int:
        """Rows of the split."""
        groups = origin_paths(task, split, settings)
        return task.splits[split].size(sum(count_rows(path, task) for paths in groups.values() for path in paths))

    def examples(self, task: Task, split: str, settings: DataSettings, tokenizer: Any = None) -> Iterator[Example]:
        """The split's examples, in the order of the files; reads them in bounded memory.

        Raises:
            UserError: naming file, row or line, and column, at the first row that cannot be used.
        """
        self.check(task, split, settings)
        groups = origin_paths(task, split, settings)
        counts = {origin: [count_rows(path, task) for path in paths] for origin, paths in groups.items()}
        total = sum(sum(numbers) for numbers in counts.values())
        if total == 0:
            raise UserError(f"{next(iter(groups.values()))[0]}: no rows (split '{split}' of task {task.name})")
        chosen = task.splits[split].select(total)
        keep = np.ones(total, dtype=bool)
        if chosen is not None:
            keep[:] = False
            keep[chosen] = True
        seen: dict[str, str] = {}
        position = 0
        for origin, paths in groups.items():
            row_of_origin = 0
            for path in paths:
                for where, row in iter_rows(path, task):
                    if keep[position]:
                        example = task.example(row, id=f"{origin}-{row_of_origin}", where=where)
                        if task.id is not None:
                            check_unique(example, where, seen, task)
                        yield example
                    position += 1
                    row_of_origin += 1


def check_unique(example: Example, where: str, seen: dict[str, str], task: Task) -> None:
    """Raise on an id that an earlier row of the split has."""
    if not example.id.strip():
        raise UserError(f"{where}: column '{task.id}' of task {task.name} is empty; every row needs an id")
    if example.id in seen:
        raise UserError(
            f"{where}: id '{example.id}' of task {task.name} is that of {seen[example.id]} too; ids must be unique"
        )
    seen[example.id] = where


def suffix_of(path: Path) -> str:
    """`.jsonl` of `rows.jsonl.gz`."""
    return Path(path.name.removesuffix(".gz")).suffix


def column_names(path: Path, task: Task) -> list[str] | None:
    """The columns of a file (of JSONL: those of its first row); None if it is empty JSONL."""
    if suffix_of(path) == ".parquet":
        return list(open_parquet(path).schema_arrow.names)
    if suffix_of(path) in (".csv", ".tsv"):
        return list(task.header) or next(csv_rows(path), (0, []))[1]
    first = next(json_rows(path), None)
    return None if first is None else list(first[1])


def count_rows(path: Path, task: Task) -> int:
    """Rows of a file."""
    if suffix_of(path) == ".parquet":
        return open_parquet(path).metadata.num_rows
    if suffix_of(path) in (".csv", ".tsv"):
        return sum(1 for _ in csv_rows(path)) - (0 if task.header else 1)
    with open_text(path) as file:
        return sum(bool(line.strip()) for line in text_lines(file, path))


def iter_rows(path: Path, task: Task) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(file and row for messages, {column: value}) of every row; rows count from 0, lines from 1."""
    if suffix_of(path) == ".parquet":
        yield from parquet_rows(path, task)
    elif suffix_of(path) in (".csv", ".tsv"):
        lines = csv_rows(path)
        header = list(task.header) or next(lines, (0, []))[1]
        for number, cells in lines:
            if len(cells) != len(header):
                raise UserError(f"{path}: line {number} has {len(cells)} cells, but there are {len(header)} columns")
            yield f"{path}: line {number}", dict(zip(header, cells, strict=True))
    else:
        for number, row in json_rows(path):
            where = f"{path}: line {number}"
            check_unicode(row, where)
            yield where, row


def check_unicode(row: Mapping[str, Any], where: str) -> None:
    """Raise on half a surrogate pair, which JSON can state, but no tokenizer can read."""
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(error.object[error.start]):04x}"
        raise UserError(f"{where}: {half} is half a character (a lone surrogate); correct or remove the row") from error


def open_parquet(path: Path) -> pq.ParquetFile:
    """A parquet file; a damaged one is a UserError."""
    try:
        return pq.ParquetFile(path, memory_map=True)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a readable parquet file ({one_line(error)}); fetch it again") from error


def parquet_rows(path: Path, task: Task) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The rows of a parquet file, only the task's columns."""
    with open_parquet(path) as file:
        number = 0
        try:
            for batch in file.iter_batches(batch_size=BATCH_ROWS, columns=task.columns()):
                for row in batch.to_pylist():
                    yield f"{path}: row {number}", row
                    number += 1
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{path}: damaged after row {number} ({one_line(error)}); fetch it again") from error


def csv_rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """(line number, cells) of a CSV file, the header included; TSV files have no quoting, as GLUE's official
    ones."""
    tab = suffix_of(path) == ".tsv"
    with open_text(path) as file:
        lines = text_lines(file, path)
        rows = csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE) if tab else csv.reader(lines, strict=True)
        while True:
            try:
                cells = next(rows)
            except StopIteration:
                return
            except csv.Error as error:
                raise UserError(f"{path}: line {rows.line_num}: {error}; is the quoting right?") from error
            if cells:
                yield rows.line_num, cells


def json_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object) of a JSON lines file; blank lines are skipped."""
    with open_text(path) as file:
        for number, line in enumerate(text_lines(file, path), start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(
                    f"{path}: line {number} is not JSON ({error.msg}); write one object per line"
                ) from error
            if not isinstance(row, dict):
                raise UserError(f"{path}: line {number} is not a JSON object; write one object per line")
            yield number, row


def open_text(path: Path) -> IO[str]:
    """A text file, unpacked if its name ends in `.gz`; a byte order mark is dropped."""
    if path.name.endswith(".gz"):
        return gzip.open(path, "rt", encoding="utf-8-sig", newline="")
    return open(path, encoding="utf-8-sig", newline="")


def text_lines(file: IO[str], path: Path) -> Iterator[str]:
    """The lines of a text file; damage is reported with the line where it begins."""
    number = 0
    try:
        for line in file:
            number += 1
            yield line
    except (EOFError, gzip.BadGzipFile, OSError) as error:
        raise UserError(f"{path}: damaged or cut off after line {number} ({one_line(error)}); copy it again") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 after line {number} ({error.reason})") from error
