"""Reading MRQA 2019's sets (Section 3.1.2) from the shared task's own files or from the hub's form.

Its own files are `{train,dev}/<Set>.jsonl.gz` (or `.jsonl`): an optional header line, then one context per line
with its questions. `char_spans` count code points and end inclusively. The hub's form (`mrqa-workshop/mrqa`)
has one question per row and all sets in one file.

How oddities are handled:
- a question that repeats an earlier one of its set (same qid, question and context) is left out; another
  question under the same qid is kept, its id is `<qid>~2`, and the official form of predictions keeps the
  last of them;
- a question without a detected answer, or with an empty context, is kept: its target is the empty string;
- lone surrogates, which JSON can state and UTF-8 cannot, become U+FFFD (one for one, so that offsets hold);
- white space at the ends of a span is not part of the answer.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from hdscale.data import hub
from hdscale.data.settings import DataSettings
from hdscale.data.tables import json_rows, open_parquet
from hdscale.data.task import Example, Task
from hdscale.data.tasks.mrqa.chunks import chunks_of_questions
from hdscale.data.tasks.mrqa.question import Question, clean, field_of, make_question
from hdscale.errors import UserError
from hdscale.files import cache_folder, remembered_sha256

FOLDERS = {"train": "train", "validation": "dev", "test": "dev"}
"""{split of the hub's form: folder of the shared task's own files}."""


def paths_of(task: Task, origin: str, settings: DataSettings) -> list[Path]:
    """The files of one of the set's splits: the shared task's own, else the hub's form (mirrored or fetched).

    Raises:
        UserError: the file is missing.
    """
    if task.files:
        return [Path(path).expanduser() for path in task.files[origin]]
    folder = None
    if settings.mrqa_root is not None:
        folder = Path(settings.mrqa_root)
    elif settings.root is not None and (Path(settings.root) / "mrqa").is_dir():
        folder = Path(settings.root) / "mrqa"
    if folder is None:
        return hub.split_paths(task, origin, settings)
    stem = folder / FOLDERS[origin] / task.options["set"]
    for path in (Path(f"{stem}.jsonl.gz"), Path(f"{stem}.jsonl")):
        if path.is_file():
            return [path]
    raise UserError(
        f"{stem}.jsonl.gz is missing: split '{origin}' of task {task.name}; take it from the shared task's "
        "page, or name other tasks"
    )


def questions(task: Task, split: str, settings: DataSettings) -> Iterator[Question]:
    """The split's questions in the order of its files, repeats left out.

    Raises:
        UserError: naming file, line (or row) and field of the first thing that cannot be used.
    """
    seen: dict[str, list[int]] = {}
    keep = None
    if task.splits[split].part != "all":
        chosen = task.splits[split].select(sum(1 for _ in read_paths(task, split, settings)))
        keep = None if chosen is None else set(chosen.tolist())
    return (
        question
        for number, (where, context, qa) in enumerate(read_paths(task, split, settings))
        if keep is None or number in keep
        for question in [make_question(task, where, context, qa, seen)]
        if question is not None
    )


def split_paths(task: Task, split: str, settings: DataSettings) -> list[Path]:
    """All files of a split."""
    return [path for origin in task.splits[split].origins for path in paths_of(task, origin, settings)]


def read_paths(task: Task, split: str, settings: DataSettings) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """(file and line, context, question record) of every question of a split."""
    for path in split_paths(task, split, settings):
        if path.suffix == ".parquet":
            yield from hub_rows(path, task.options.get("set"))
        else:
            for where, context, qas in passages(path):
                for number, qa in enumerate(qas):
                    yield f"{where}: qas[{number}]", context, qa


def passages(path: Path) -> Iterator[tuple[str, str, list[Mapping[str, Any]]]]:
    """(file and line, context, question records) of each line of the shared task's file, header left out."""
    if not path.is_file():
        raise UserError(f"no file {path}; relative paths start at the working folder")
    rows = json_rows(path)
    number = 0
    while True:
        try:
            number, row = next(rows)
        except StopIteration:
            return
        except zlib.error as error:
            raise UserError(f"{path}: damaged after line {number} ({error}); copy it again") from error
        where = f"{path}: line {number}"
        if "header" in row and "context" not in row:
            header = row["header"]
            if not isinstance(header, Mapping) or "dataset" not in header:
                raise UserError(f"{where}: field 'header.dataset' is missing; name the data set or leave the line out")
            continue
        context = field_of(row, "context", str, where)
        qas = field_of(row, "qas", list, where)
        yield where, clean(context), qas


def hub_rows(path: Path, subset: str | None) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """(file and row, context, question record) of the rows of one subset of the hub's parquet file."""
    columns = ["subset", "context", "qid", "question", "answers", "detected_answers"]
    number = -1
    with open_parquet(path) as file:
        for batch in file.iter_batches(batch_size=1024, columns=columns):
            for row in batch.to_pylist():
                number += 1
                if subset is None or row["subset"] == subset:
                    record = {**row, "detected_answers": hub_answers(row["detected_answers"])}
                    yield f"{path}: row {number}", clean(row["context"] or ""), record


def hub_answers(found: Any) -> list[dict[str, Any]]:
    """Detected answers in the shared task's form, from the hub's (lists inside mappings, or mappings inside
    lists).
    """
    if found is None:
        return []
    if isinstance(found, Mapping):
        texts, places = found.get("text") or [], found.get("char_spans") or []
        found = [{"text": text, "char_spans": spans} for text, spans in zip(texts, places, strict=True)]
    answers = []
    for answer in found:
        spans = answer["char_spans"]
        if isinstance(spans, Mapping):
            pairs = list(zip(spans["start"], spans["end"], strict=True))
        else:
            pairs = [(span["start"], span["end"]) if isinstance(span, Mapping) else tuple(span) for span in spans]
        answers.append({"text": answer["text"], "char_spans": [list(pair) for pair in pairs]})
    return answers


@dataclass(frozen=True)
class MrqaReader:
    """Reads MRQA's sets; its examples are chunks of questions."""

    name: ClassVar[str] = "hdscale.data.mrqa"
    chunked: ClassVar[bool] = True

    def identity(self, task: Task, split: str, settings: DataSettings) -> list[str]:
        """Checksums of the split's files, and how contexts are cut."""
        paths, cache = split_paths(task, split, settings), cache_folder(settings.cache)
        return [f"overlap {settings.chunk_overlap}", *(remembered_sha256(path, cache) for path in paths)]

    def check(self, task: Task, split: str, settings: DataSettings) -> None:
        """Raise UserError if a file of the split is not there or does not begin as it should."""
        for path in split_paths(task, split, settings):
            if path.suffix == ".parquet":
                known = open_parquet(path).schema_arrow.names
                for column in ("subset", "context", "qid", "question", "answers", "detected_answers"):
                    if column not in known:
                        raise UserError(f"{path}: no column '{column}', which task {task.name} reads")
            else:
                next(passages(path), None)

    def size(self, task: Task, split: str, settings: DataSettings) -> int:
        """Questions of the split, as Table 11 counts them (before chunking)."""
        return sum(1 for _ in questions(task, split, settings))

    def examples(self, task: Task, split: str, settings: DataSettings, tokenizer: Any = None) -> Iterator[Example]:
        """The chunks of the split's questions (Section 3.1.2), or whole questions where there is no tokenizer to
        cut by.

        Chunks are `hdscale.data.tasks.mrqa.chunks.Chunk`s: their `group` is the question's id, their `input_ids` the
        exact window.
        """
        found = questions(task, split, settings)
        if tokenizer is None:
            return found
        return chunks_of_questions(
            found, tokenizer, settings.max_source_length, settings.chunk_overlap, training=split == "train"
        )
