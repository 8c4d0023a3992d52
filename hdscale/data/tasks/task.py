"""A task as data: where its rows are, and how a row becomes a source and a target text."""

from __future__ import annotations

import functools
import json
import math
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hdscale.errors import UserError, nearest

KINDS = ("label", "number", "text", "qa")
SPLITS = ("train", "validation", "test")
HELD_OUT_ROWS = 1000
"""Training rows that become the validation set where a data set has only one labelled set to test on (Section
3.1.1)."""
SPLIT_SEED = 42


@dataclass(frozen=True, slots=True)
class Example:
    """One instance as text."""

    source: str
    target: str
    task: str
    id: str
    """Unique in its split: by default the data set's own split and the row in it (`validation-17`)."""
    references: tuple[str, ...] | None = None
    """All gold texts, where a metric needs more than the target (QA, several summaries)."""
    group: str | None = None
    """What the example is a part of (MRQA: the question that this chunk belongs to); None: stands for
    itself."""
    input_ids: tuple[int, ...] | None = None
    """The source's tokens, where the text was cut by tokens already."""


@dataclass(frozen=True)
class Decoding:
    """How predictions are generated where it differs from `eval.*`.

    `max_target_length` counts generated tokens with `</s>` (None: the longest label of a label task, else
    `data.max_target_length`); `num_beams` None means `eval.num_beams`; `min_length` counts as transformers
    does, with the decoder's start token: 2 forbids an empty output.
    """

    max_target_length: int | None = None
    num_beams: int | None = None
    min_length: int = 0


@dataclass(frozen=True)
class SplitRule:
    """Which rows make up a split.

    `origins` are the data set's own splits (or the keys of a task's `files`), joined in this order. `part`
    cuts them by a shuffle with `seed`: `all`; `first_half` and `second_half` (the first is the smaller of an
    odd number); `held_out` (`rows` rows, at most half of a small set) and `remainder` (the others). The rows
    of a part keep their order in the data set.
    """

    origins: tuple[str, ...]
    part: str = "all"
    rows: int = HELD_OUT_ROWS
    seed: int = SPLIT_SEED

    PARTS = ("all", "first_half", "second_half", "held_out", "remainder")

    def select(self, total: int) -> np.ndarray | None:
        """Ascending indices of this part among `total` rows; None for all of them."""
        if self.part == "all":
            return None
        import torch  # here, because declarations are read where no tensor is needed (params, --help)

        shuffled = torch.randperm(total, generator=torch.Generator().manual_seed(self.seed)).numpy()
        half, held_out = total // 2, min(self.rows, total // 2)
        cut = {
            "first_half": slice(0, half),
            "second_half": slice(half, total),
            "held_out": slice(0, held_out),
            "remainder": slice(held_out, total),
        }[self.part]
        return np.sort(shuffled[cut])

    def size(self, total: int) -> int:
        """Rows of this part of `total` rows."""
        chosen = self.select(total)
        return total if chosen is None else len(chosen)


@dataclass(frozen=True)
class Task:
    """A declaration: everything that the package knows of a task.

    Rows come from parquet files of a hub data set (`repo`, the folder being one of `configs`) or from `files`
    of one's own (JSONL, CSV, TSV, parquet). `source` and `target` are templates with column names in braces.
    """

    name: str
    kind: str
    """What the target is: `label` (one of `labels`), `number`, `text`, or `qa` (an answer, of which there may
    be several)."""
    splits: Mapping[str, SplitRule]
    source: str
    target: str
    metrics: tuple[str, ...]
    labels: tuple[str, ...] = ()
    """All target texts of a label task; of two, the second is the positive class."""
    label_map: Mapping[str, str] | None = None
    """{value in the data: target text}, where they differ."""
    step: float | None = None
    """Numbers are rounded to the nearest multiple of this."""
    bounds: tuple[float, float] | None = None
    references: str | None = None
    """Column with the list of all gold texts."""
    id: str | None = None
    """Column with a unique id; default: split and row number."""
    may_be_empty: tuple[str, ...] = ()
    """Columns in which an empty text is no mistake."""
    decoding: Decoding = Decoding()
    repo: str | None = None
    configs: tuple[str, ...] = ()
    """Folders of the repository that may hold the files, the first that does is used ("" is the top)."""
    revision: str | None = None
    files: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """{own split name: files} of a task whose data are not on the hub."""
    header: tuple[str, ...] = ()
    """Column names of CSV and TSV files without a header line."""
    reader: str = "hdscale.data.tables"
    """Module that turns the task's data into examples; what it must offer stands in
    `hdscale.data.sources`."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """What only that reader knows."""
    sizes: Mapping[str, int] = field(default_factory=dict)
    """{split: rows} of the full data (Tables 10-12); `hdscale prepare` checks them."""

    @property
    def trains(self) -> bool:
        """Whether the task has a training split (out-of-domain sets do not)."""
        return "train" in self.splits

    @property
    def chunked(self) -> bool:
        """Whether its examples are chunks of questions: parts of a long context, one prediction for each."""
        return self.reader == "hdscale.data.tasks.mrqa.read"

    def columns(self) -> list[str]:
        """Top-level columns that a row must have."""
        paths = [*fields(self.source), *fields(self.target)]
        paths += [column for column in (self.references, self.id) if column]
        return list(dict.fromkeys(path.split(".")[0] for path in paths))

    def example(self, row: Mapping[str, Any], id: str, where: str) -> Example:
        """The source and target text of a row.

        Args:
            row: {column: value}.
            id: used where the task names no id column.
            where: file and row, for the error message.

        Raises:
            UserError: empty text, a label outside the set, a value that is no number.
        """
        values = {path: cell_text(row, path, where) for path in fields(self.source)}
        for path, text in values.items():
            if not text.strip() and path not in self.may_be_empty:
                raise UserError(
                    f"{where}: column '{path}' of task {self.name} is empty; fill or remove the row, or "
                    "list the column "
                    "under the task's may_be_empty"
                )
        references = None
        if self.references:
            references = self.gold_texts(row, where)
        if self.target:
            target = fill(self.target, {path: cell_text(row, path, where) for path in fields(self.target)})
        else:
            target = references[0] if references else ""
        return Example(
            source=fill(self.source, values),
            target=self.check_target(target, where),
            task=self.name,
            id=cell_text(row, self.id, where) if self.id else id,
            references=references,
        )

    def gold_texts(self, row: Mapping[str, Any], where: str) -> tuple[str, ...]:
        """The gold texts of the row's `references` column: a list, or one text."""
        found = lookup(row, self.references or "", where)
        if isinstance(found, str) and found.lstrip().startswith("["):
            try:  # CSV has no lists: JSON in the cell
                found = json.loads(found)
            except json.JSONDecodeError:
                pass
        if found is None:
            found = []
        texts = list(found) if isinstance(found, Sequence) and not isinstance(found, str) else [found]
        if not all(isinstance(text, str) for text in texts):
            raise UserError(
                f"{where}: column '{self.references}' of task {self.name} must hold texts, not {texts!r:.80}"
            )
        return tuple(texts)

    def check_target(self, target: str, where: str) -> str:
        """The target text as it is to be generated, after the checks of its kind."""
        if self.kind == "label":
            text = self.label_map.get(target, target) if self.label_map is not None else target
            if text not in self.labels:
                known = ", ".join(self.label_map or self.labels)
                hint = "; a split whose labels are hidden cannot be used" if target == "-1" else ""
                raise UserError(f"{where}: label '{target}' is none of the labels of task {self.name} ({known}){hint}")
            return text
        if self.kind == "number":
            return self.number_text(target, where)
        if self.kind == "text" and not target.strip() and not set(fields(self.target)) & set(self.may_be_empty):
            raise UserError(f"{where}: the target of task {self.name} is empty; fill or remove the row")
        return target

    def number_text(self, target: str, where: str) -> str:
        """A number rounded to the task's step and written with the step's decimals (STS-B: 3.84 -> `3.8`)."""
        try:
            number = float(target)
        except ValueError:
            number = math.nan
        if not math.isfinite(number):
            raise UserError(f"{where}: target '{target}' of task {self.name} is not a number")
        if self.bounds and not self.bounds[0] <= number <= self.bounds[1]:
            low, high = self.bounds
            raise UserError(f"{where}: target {number:g} of task {self.name} is outside its range, {low:g} to {high:g}")
        return target if self.step is None else round_to_step(number, self.step)


def round_to_step(number: float, step: float) -> str:
    """`number` at the nearest multiple of `step`, with the decimals of `step`; ties go to the even multiple
    (T5's rounding)."""
    per_unit = 1 / step
    if abs(per_unit - round(per_unit)) < 1e-9:
        per_unit = round(per_unit)
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    while decimals < 6 and abs(round(step, decimals) - step) > 1e-9:
        decimals += 1
    return f"{round(number * per_unit) / per_unit:.{decimals}f}"


@functools.lru_cache(maxsize=1024)
def parts(template: str) -> tuple[tuple[str, str | None], ...]:
    """(literal text, column path that follows it or None) along a template.

    Raises:
        UserError: unbalanced braces, or anything but a column name between them.
    """
    try:
        parsed = list(string.Formatter().parse(template))
    except ValueError as error:
        raise UserError(
            f"template '{template}': {error}; write column names in braces, literal braces twice"
        ) from error
    if any(name is not None and (not name or spec or how or "[" in name) for _, name, spec, how in parsed):
        raise UserError(f"template '{template}': only plain column names may stand in braces, such as {{question}}")
    return tuple((literal, name) for literal, name, _, _ in parsed)


def fields(template: str) -> tuple[str, ...]:
    """Column paths that a template names in braces, in order."""
    return tuple(name for _, name in parts(template) if name is not None)


def fill(template: str, values: Mapping[str, str]) -> str:
    """The template with each column's text in its place (texts are inserted as they are, braces and all)."""
    return "".join(literal + ("" if name is None else values[name]) for literal, name in parts(template))


def lookup(row: Mapping[str, Any], path: str, where: str) -> Any:
    """The value of a column; `answers.text` looks inside a column that holds a mapping."""
    value: Any = row
    for part in path.split("."):
        if not isinstance(value, Mapping) or part not in value:
            known = value if isinstance(value, Mapping) else row
            raise UserError(f"{where}: no column '{path}'{nearest(part, known)}")
        value = value[part]
    return value


def cell_text(row: Mapping[str, Any], path: str, where: str) -> str:
    """A cell as text: a missing value is the empty text, lists and mappings are a mistake."""
    value = lookup(row, path, where)
    if value is None or value != value:  # pandas writes a missing text as NaN
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, bool | int | float):
        return str(value)
    raise UserError(f"{where}: column '{path}' holds a {type(value).__name__}, not a text")
