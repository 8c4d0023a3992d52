"""The tasks: declarations (row to text) and the registry that finds them by name.

A module with tasks offers `tasks(settings) -> list[Task]` and, where it has some, `MIXTURES: {name: names of
tasks}`; adding it to `MODULES` is all that a new family needs.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Iterable, Mapping
from typing import Any

from hdscale.data.settings import DataSettings
from hdscale.data.task import KINDS, SPLITS, DecodingLimits, Example, SplitRule, Task
from hdscale.data.tasks.custom import task_from_mapping
from hdscale.errors import UserError, nearest

__all__ = [
    "KINDS",
    "SPLITS",
    "DecodingLimits",
    "Example",
    "SplitRule",
    "Task",
    "expand_tasks",
    "get_task",
    "registry",
]

MODULES = (
    "hdscale.data.tasks.glue",
    "hdscale.data.tasks.nli",
    "hdscale.data.tasks.summarisation",
    "hdscale.data.tasks.mrqa.tasks",
    "hdscale.data.tasks.quickstart.tasks",
)
MIXTURE_OF_ALL = "all"


def registry(settings: DataSettings | None = None) -> tuple[dict[str, Task], dict[str, tuple[str, ...]]]:
    """({name: task}, {mixture: names of tasks}): built-in ones, then those of `data.custom` and
    `data.mixtures`."""
    settings = settings or DataSettings()
    tasks: dict[str, Task] = {}
    mixtures: dict[str, tuple[str, ...]] = {}
    for name in MODULES:
        module = importlib.import_module(name)
        declared = module.tasks(settings)
        if not settings.task_prefix:
            declared = [without_prefix(task) for task in declared]
        tasks |= {task.name: task for task in declared}
        mixtures |= getattr(module, "MIXTURES", {})
    mixtures[MIXTURE_OF_ALL] = tuple(tasks)
    built_in = {*tasks, *mixtures}
    for name, declaration in settings.custom.items():
        if name in built_in:
            raise UserError(f"data.custom.{name}: the package has a task or mixture of this name; choose another")
        if not isinstance(declaration, Mapping):
            raise UserError(f"data.custom.{name} must be a mapping (docs/tasks.md), not {declaration!r}")
        tasks[name] = task_from_mapping({**declaration, "name": name})
    for name, members in settings.mixtures.items():
        if name in built_in or name in tasks:
            raise UserError(f"data.mixtures.{name}: there is a task or mixture of this name; choose another")
        if not isinstance(members, list | tuple) or not members:
            raise UserError(f"data.mixtures.{name} must be a list of names of tasks, not {members!r}")
        mixtures[name] = tuple(map(str, members))
    return tasks, mixtures


def without_prefix(task: Task) -> Task:
    """The task without its name at the beginning of its sources (`data.task_prefix=false`)."""
    return dataclasses.replace(task, source=task.source.removeprefix(f"{task.name} "))


def get_task(task: str | Mapping[str, Any] | Task, settings: DataSettings | None = None) -> Task:
    """A task by name, or from a YAML mapping.

    Raises:
        UserError: an unknown name (with the nearest known one) or a faulty declaration.
    """
    if isinstance(task, Task):
        return task
    if isinstance(task, Mapping):
        return task_from_mapping(task)
    tasks, _ = registry(settings)
    if task not in tasks:
        raise UserError(f"data: unknown task '{task}'{nearest(str(task), tasks)}")
    return tasks[task]


def expand_tasks(items: Iterable[str | Mapping[str, Any] | Task], settings: DataSettings | None = None) -> list[Task]:
    """The tasks of `data.tasks`, in order and each once, mixtures replaced by their members.

    Raises:
        UserError: an unknown name (with the nearest known one), no task at all, or two tasks of one name.
    """
    if isinstance(items, str):
        items = [items]
    tasks, mixtures = registry(settings)
    found: dict[str, Task] = {}

    def add(item: str | Mapping[str, Any] | Task, within: tuple[str, ...] = ()) -> None:
        if isinstance(item, str) and item in mixtures:
            if item in within:
                raise UserError(f"data.mixtures.{item} contains itself")
            for member in mixtures[item]:
                add(member, (*within, item))
            return
        if isinstance(item, str):
            if item not in tasks:
                place = f"data.mixtures.{within[-1]}" if within else "data.tasks"
                raise UserError(f"{place}: unknown task '{item}'{nearest(item, [*tasks, *mixtures])}")
            task = tasks[item]
        elif isinstance(item, Task | Mapping):
            task = get_task(item)
        else:
            raise UserError(f"data.tasks: {item!r} is neither a name nor a mapping that declares a task")
        if found.setdefault(task.name, task) != task:
            raise UserError(f"data.tasks: two different tasks are called '{task.name}'")

    for item in items:
        add(item)
    if not found:
        raise UserError("data.tasks is empty; name a task or a mixture, for example data.tasks=[glue]")
    return list(found.values())
