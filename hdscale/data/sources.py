"""From a task and a split to examples, by the task's reader."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from hdscale.data.settings import DataSettings
from hdscale.data.tables import TableReader
from hdscale.data.task import SPLITS, Example, Reader, Task
from hdscale.errors import UserError

TABLES = TableReader()


def reader(task: Task) -> Reader:
    """What reads a task's data."""
    return task.reader or TABLES


def load_split(task: Task, split: str, settings: DataSettings, tokenizer: Any = None) -> Iterator[Example]:
    """A split's examples, one by one.

    Args:
        tokenizer: needed by tasks whose examples are cut by tokens (MRQA), ignored by the others.

    Raises:
        UserError: the task has no such split, or a file, column or row cannot be used (each named).
    """
    check_split(task, split)
    return reader(task).examples(task, split, settings, tokenizer)


def load_examples(task: Task, split: str, settings: DataSettings, tokenizer: Any = None) -> Sequence[Example]:
    """All examples of a split (`load_split` as a list: for evaluation, which needs the texts)."""
    return list(load_split(task, split, settings, tokenizer))


def split_identity(task: Task, split: str, settings: DataSettings) -> list[str]:
    """What determines the split's examples besides the declaration."""
    check_split(task, split)
    return reader(task).identity(task, split, settings)


def split_size(task: Task, split: str, settings: DataSettings) -> int:
    """Rows of a split, as the paper's Tables 10-12 count them."""
    check_split(task, split)
    return reader(task).size(task, split, settings)


def check_splits(tasks: Iterable[Task], settings: DataSettings, splits: Sequence[str] = SPLITS) -> None:
    """Raise UserError, before anything expensive, if a split of a task is missing or lacks a column."""
    for task in tasks:
        for split in splits:
            if split in task.splits:
                reader(task).check(task, split, settings)


def check_split(task: Task, split: str) -> None:
    """Raise UserError if the task has no such split."""
    if split not in task.splits:
        raise UserError(f"task {task.name} has no {split} split; it has: {', '.join(task.splits)}")
