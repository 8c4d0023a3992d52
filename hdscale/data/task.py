"""A task as data: where its rows are, and how a row becomes a source and a target text."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from hdscale.data.settings import DataSettings
from hdscale.data.template import cell_text, fields, fill, lookup
from hdscale.errors import UserError

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
    """What the example is a part of (MRQA: the question that this chunk belongs to); None: the
    example is complete."""
    input_ids: tuple[int, ...] | None = None
    """The source's tokens, where the text was cut by tokens already."""


@dataclass(frozen=True)
class DecodingLimits:
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
    """Which rows a split consists of.

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


class Reader(Protocol):
    """What turns a task's data into examples. Readers have no state: two of a class are equal."""

    @property
    def name(self) -> str:
        """Part of the key under which tokenised data are cached."""

    @property
    def chunked(self) -> bool:
        """Whether examples are chunks of questions: parts of a long context, one prediction for each."""

    def identity(self, task: Task, split: str, settings: DataSettings) -> list[str]:
        """What determines the split's examples besides the declaration (checksums of files)."""

    def check(self, task: Task, split: str, settings: DataSettings) -> None:
        """Raise UserError, quickly, if the data cannot be read."""

    def size(self, task: Task, split: str, settings: DataSettings) -> int:
        """Rows of the split, as the paper's Tables 10-12 count them."""

    def examples(self, task: Task, split: str, settings: DataSettings, tokenizer: Any = None) -> Iterator[Example]:
        """The split's examples, in a fixed order and in bounded memory.

        Args:
            tokenizer: needed where examples are cut by tokens.
        """


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
    """Columns that may be empty."""
    decoding: DecodingLimits = DecodingLimits()
    rouge_tokenizer: str = "latin"
    """What ROUGE reads: `latin` (letters and digits, as in its reference implementation) or `unicode`."""
    repo: str | None = None
    configs: tuple[str, ...] = ()
    """Folders of the repository where the files may be; the first that has them is used ("" is the top)."""
    revision: str | None = None
    files: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """{own split name: files} of a task whose data are not on the hub."""
    header: tuple[str, ...] = ()
    """Column names of CSV and TSV files without a header line."""
    reader: Reader | None = None
    """Turns the task's data into examples; None: the data are tables (`hdscale.data.tables`)."""
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
        return self.reader is not None and self.reader.chunked

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
            UserError: empty text, a label outside the set, a value that is not a number.
        """
        values = {path: cell_text(row, path, where) for path in fields(self.source)}
        for path, text in values.items():
            if not text.strip() and path not in self.may_be_empty:
                raise UserError(
                    f"{where}: column '{path}' of task {self.name} is empty; fill or remove the row, or "
                    "list the column under the task's may_be_empty"
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
                f"{where}: column '{self.references}' of task {self.name} must contain texts, not {texts!r:.80}"
            )
        return tuple(texts)

    def check_target(self, target: str, where: str) -> str:
        """The target text as it is to be generated, after the checks of its kind."""
        if self.kind == "label":
            text = self.label_map.get(target, target) if self.label_map is not None else target
            if text not in self.labels:
                known = ", ".join(self.label_map or self.labels)
                hint = "; a split whose labels are hidden cannot be used" if target == "-1" else ""
                raise UserError(f"{where}: label '{target}' is not a label of task {self.name} ({known}){hint}")
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
