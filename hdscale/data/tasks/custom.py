"""Tasks that users declare in YAML (docs/tasks.md): declarations as the built-in ones, checked key by key."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from hdscale.data.task import KINDS, SPLITS, DecodingLimits, SplitRule, Task
from hdscale.data.template import fields
from hdscale.errors import UserError, nearest

DEFAULT_METRICS = {
    "label": ("accuracy",),
    "number": ("pearson", "spearman"),
    "text": ("rouge1", "rouge2", "rougeL", "rougeLsum"),
    "qa": ("em", "f1"),
}
KEYS = (
    "name kind files header repo config revision splits source target labels step bounds references id may_be_empty "
    "metrics decoding rouge_tokenizer"
).split()
SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")


def task_from_mapping(declaration: Mapping[str, Any], name: str | None = None) -> Task:
    """A task from a YAML mapping.

    Args:
        declaration: the keys of `KEYS`; `kind`, `source` and one of `files` and `repo` are required.
        name: the key under `data.custom`, where the mapping has no `name`.

    Raises:
        UserError: naming the task and the key that is missing, unknown or has an unusable value.
    """
    where, kind = f"task {checked_name(declaration, name)}", checked_kind(declaration, name)
    files = read_files(declaration, where)
    repo = declaration.get("repo")
    if bool(files) == bool(repo):
        raise UserError(f"{where}: give either 'files: {{train: FILE, …}}' or 'repo: a hub data set'")
    labels, label_map = read_labels(declaration, kind, where)
    step, bounds = read_numbers(declaration, where)
    target, references = declaration.get("target", ""), declaration.get("references")
    if not target and not references:
        raise UserError(
            f"{where}: 'target' is missing: a template such as '{{answer}}' (or 'references', a column of texts)"
        )
    task = Task(
        name=checked_name(declaration, name),
        kind=kind,
        splits=read_splits(declaration, list(files) or list(SPLITS), where),
        source=declaration["source"],
        target=str(target),
        metrics=texts(declaration, "metrics", where) or DEFAULT_METRICS[kind],
        labels=labels,
        label_map=label_map,
        step=step,
        bounds=bounds,
        references=None if references is None else str(references),
        id=None if declaration.get("id") is None else str(declaration["id"]),
        may_be_empty=texts(declaration, "may_be_empty", where),
        rouge_tokenizer=read_rouge_tokenizer(declaration, where),
        decoding=read_decoding(declaration.get("decoding"), where),
        repo=repo,
        configs=tuple(map(str, texts(declaration, "config", where) or ("default", "data", ""))),
        revision=None if declaration.get("revision") is None else str(declaration["revision"]),
        files=files,
        header=texts(declaration, "header", where),
    )
    check_templates(task, where)
    return task


def checked_name(declaration: Mapping[str, Any], name: str | None) -> str:
    """The task's name, which also names files."""
    found = str(declaration.get("name", name or ""))
    if not found or "/" in found or found.startswith("."):
        raise UserError(
            f"data: a task's name must be a word that can name a file, not '{found}'; give it by 'name: my_task'"
        )
    return found


def checked_kind(declaration: Mapping[str, Any], name: str | None) -> str:
    """The key `kind`, after a check of all keys' names."""
    where = f"task {checked_name(declaration, name)}"
    for key in declaration:
        if key not in KEYS:
            raise UserError(f"{where}: unknown key '{key}'{nearest(str(key), KEYS)}")
    for key in ("kind", "source"):
        if not isinstance(declaration.get(key), str):
            raise UserError(f"{where}: '{key}' is missing or not a text; see docs/tasks.md for an example of each kind")
    kind = str(declaration["kind"])
    if kind not in KINDS:
        raise UserError(f"{where}: unknown kind '{kind}'{nearest(kind, KINDS)}")
    return kind


def read_numbers(declaration: Mapping[str, Any], where: str) -> tuple[float | None, tuple[float, float] | None]:
    """The keys `step` and `bounds` of a task whose targets are numbers."""
    bounds, step = declaration.get("bounds"), declaration.get("step")
    if bounds is not None and (not is_list(bounds) or len(bounds) != 2 or not all(map(is_number, bounds))):
        raise UserError(f"{where}: 'bounds' must be [lowest, highest], not {bounds!r}")
    if step is not None and (not is_number(step) or step <= 0):
        raise UserError(f"{where}: 'step' must be a number above 0, not {step!r}")
    return (
        None if step is None else float(step),
        None if bounds is None else (float(bounds[0]), float(bounds[1])),
    )


def check_templates(task: Task, where: str) -> None:
    """Raise UserError for a template that cannot be read, or a source without columns."""
    for template in (task.source, task.target):
        try:
            fields(template)
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
    if not fields(task.source):
        raise UserError(
            f"{where}: 'source' names no column in braces, so every row would read the same: '{task.source}'"
        )


def read_files(declaration: Mapping[str, Any], where: str) -> dict[str, tuple[str, ...]]:
    """{split: paths} of the key `files`, whose values are a path or a list of paths."""
    declared = declaration.get("files") or {}
    if not isinstance(declared, Mapping):
        raise UserError(f"{where}: 'files' must map splits to files: {{train: FILE, validation: FILE, test: FILE}}")
    files: dict[str, tuple[str, ...]] = {}
    for split, paths in declared.items():
        chosen = texts(declared, split, where)
        for path in chosen:
            if Path(path.removesuffix(".gz")).suffix not in SUFFIXES:
                raise UserError(
                    f"{where}: {path}: unknown file type; known: {', '.join(SUFFIXES)} (.gz after text ones)"
                )
        if not chosen:
            raise UserError(f"{where}: 'files' names no file for {split}: {paths!r}")
        files[str(split)] = chosen
    return files


def read_splits(declaration: Mapping[str, Any], origins: list[str], where: str) -> dict[str, SplitRule]:
    """The key `splits`: {train: {from: train, part: remainder, rows: 500}, …}; by default each origin is its
    own split."""
    declared = declaration.get("splits")
    if declared is None:
        unknown = [origin for origin in origins if origin not in SPLITS]
        if unknown:
            raise UserError(
                f"{where}: split '{unknown[0]}'{nearest(unknown[0], SPLITS)} (or say under 'splits' what it is)"
            )
        return {split: SplitRule((split,)) for split in SPLITS if split in origins}
    if not isinstance(declared, Mapping) or not declared:
        raise UserError(f"{where}: 'splits' must be a mapping of train, validation and test")
    rules = {}
    for split, rule in declared.items():
        if split not in SPLITS:
            raise UserError(f"{where}: unknown split '{split}'{nearest(str(split), SPLITS)}")
        known = origins if declaration.get("files") else None
        rules[split] = read_rule(split, rule if isinstance(rule, Mapping) else {"from": rule}, known, where)
    return rules


def read_rule(split: str, rule: Mapping[str, Any], origins: list[str] | None, where: str) -> SplitRule:
    """One entry of `splits`.

    Args:
        origins: keys of `files`, which `from` must name; None for a task on the hub.
    """
    for key in rule:
        if key not in ("from", "part", "rows", "seed"):
            raise UserError(
                f"{where}: splits.{split}: unknown key '{key}'{nearest(str(key), ['from', 'part', 'rows', 'seed'])}"
            )
    sources = texts(rule, "from", f"{where}: splits.{split}") or (split,)
    for source in sources if origins is not None else ():
        if source not in (origins or ()):
            raise UserError(
                f"{where}: splits.{split} reads from '{source}', which 'files' lacks{nearest(source, origins or ())}"
            )
    part = rule.get("part", "all")
    if part not in SplitRule.PARTS:
        raise UserError(f"{where}: splits.{split}: unknown part '{part}'{nearest(str(part), SplitRule.PARTS)}")
    numbers = {key: rule[key] for key in ("rows", "seed") if key in rule}
    for key, value in numbers.items():
        if not isinstance(value, int) or value < (1 if key == "rows" else 0):
            raise UserError(f"{where}: splits.{split}.{key} must be a positive whole number, not {value!r}")
    return SplitRule(sources, part, **numbers)


def read_labels(declaration: Mapping[str, Any], kind: str, where: str) -> tuple[tuple[str, ...], dict[str, str] | None]:
    """(target texts, map from the data's values or None) of the key `labels`: a list, or {value: target
    text}."""
    declared = declaration.get("labels")
    if kind != "label":
        if declared is not None:
            raise UserError(f"{where}: 'labels' is for tasks of kind label, not {kind}")
        return (), None
    if isinstance(declared, Mapping) and declared:
        mapped = {str(value): str(text) for value, text in declared.items()}
        return tuple(dict.fromkeys(mapped.values())), mapped
    labels = () if isinstance(declared, Mapping) else texts(declaration, "labels", where)
    if not labels:
        raise UserError(f"{where}: a label task needs 'labels': [negative, positive], or {{0: negative, 1: positive}}")
    if len(set(labels)) != len(labels):
        raise UserError(f"{where}: 'labels' names one twice: {', '.join(labels)}")
    return labels, None


def read_rouge_tokenizer(declaration: Mapping[str, Any], where: str) -> str:
    """The key `rouge_tokenizer`."""
    chosen = str(declaration.get("rouge_tokenizer", "latin"))
    if chosen not in ("latin", "unicode"):
        raise UserError(f"{where}: 'rouge_tokenizer' must be latin or unicode, not '{chosen}'")
    return chosen


def read_decoding(declared: Any, where: str) -> DecodingLimits:
    """The key `decoding`."""
    if declared is None:
        return DecodingLimits()
    names = [field.name for field in dataclasses.fields(DecodingLimits)]
    if not isinstance(declared, Mapping):
        raise UserError(f"{where}: 'decoding' must be a mapping of {', '.join(names)}")
    for key, value in declared.items():
        if key not in names:
            raise UserError(f"{where}: decoding: unknown key '{key}'{nearest(str(key), names)}")
        if not isinstance(value, int) or isinstance(value, bool) or value < (0 if key == "min_length" else 1):
            raise UserError(f"{where}: decoding.{key} must be a positive whole number, not {value!r}")
    return DecodingLimits(**declared)


def texts(declaration: Mapping[str, Any], key: str, where: str) -> tuple[str, ...]:
    """A key's value, one text or a list of them, as a tuple of texts."""
    value = declaration.get(key)
    if value is None:
        return ()
    values = list(value) if is_list(value) else [value]
    if not all(isinstance(item, str | int | float) for item in values):
        raise UserError(f"{where}: '{key}' must be a text or a list of texts, not {value!r}")
    return tuple(map(str, values))


def is_list(value: Any) -> bool:
    """Whether a value of YAML is a list."""
    return isinstance(value, Iterable) and not isinstance(value, str | Mapping)


def is_number(value: Any) -> bool:
    """Whether a value of YAML is a number."""
    return isinstance(value, int | float) and not isinstance(value, bool)
