"""JSON lines to what a model reads: free text, a task's columns, or a question with its context cut into chunks."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hdscale.data.settings import DataSettings
from hdscale.data.tasks import Task
from hdscale.data.tasks.mrqa.chunks import chunks_of_questions
from hdscale.data.tasks.mrqa.question import Question, clean, make_question
from hdscale.data.template import cell_text, fields, fill
from hdscale.errors import UserError, nearest, one_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FREE_TEXT = ("source", "text")
"""Columns of a row that names no task: the text of the first one that the row has is read as it is."""


@dataclasses.dataclass(slots=True)
class Request:
    """One input row: its line, its own id, its task (None: free text), and the token ids of its pieces.

    A question has one piece per chunk of its context, every other row has one piece.
    """

    line: int
    id: Any
    task: Task | None
    source: str | Question
    pieces: list[list[int]] = dataclasses.field(default_factory=list)

    @property
    def chunked(self) -> bool:
        return isinstance(self.source, Question)


class BadRow(UserError):
    """A row that cannot be used; the message begins with the row's line."""


def read_requests(
    stream: Iterable[bytes],
    default: Task | None,
    find_task: Callable[[str], Task],
    report: Callable[[BadRow], None],
) -> Iterator[Request]:
    """The rows of JSON lines, in order, in bounded memory; blank lines are skipped.

    Args:
        default: the task of rows that name none.
        find_task: finds the task that a row's `task` names.
        report: called for each row that cannot be used; it raises, or returns to skip the row.

    Raises:
        UserError: the input ends in the middle of an archive.
    """
    number = 0
    try:
        for number, raw in enumerate(stream, start=1):
            if not raw.strip():
                continue
            try:
                yield parse(number, raw, default, find_task)
            except BadRow as error:
                report(error)
    except (EOFError, OSError) as error:
        # nothing can be read behind the damage: such a row cannot be skipped
        raise UserError(f"the input is damaged or cut off after line {number} ({one_line(error)})") from error


def parse(number: int, raw: bytes, default: Task | None, find_task: Callable[[str], Task]) -> Request:
    """One row.

    Raises:
        BadRow: it names the line and what is wrong.
    """
    where = f"line {number}"
    try:
        row = json.loads(raw.decode("utf-8-sig" if number == 1 else "utf-8"))
    except UnicodeDecodeError as error:
        raise BadRow(f"{where}: not UTF-8 ({error.reason} at byte {error.start})") from None
    except (json.JSONDecodeError, RecursionError) as error:
        raise BadRow(f"{where}: not JSON ({getattr(error, 'msg', error)})") from None
    if not isinstance(row, dict):
        raise BadRow(f"{where}: must be a JSON object, not {type(row).__name__}")
    try:
        task = default
        if row.get("task") is not None:
            if not isinstance(row["task"], str):
                raise UserError(f"{where}: field 'task' must be a name")
            task = find_task(row["task"])
        return Request(number, row.get("id", row.get("qid")), task, source_of(task, row, where))
    except BadRow:
        raise
    except UserError as error:
        message = str(error)
        raise BadRow(message if message.startswith(where) else f"{where}: {message}") from None


def source_of(task: Task | None, row: Mapping[str, Any], where: str) -> str | Question:
    """What the model reads for a row.

    Raises:
        UserError: a field is missing, empty or not a text.
    """
    if task is None:
        for name in FREE_TEXT:
            if name in row:
                return whole_text(row[name], name, where)
        raise UserError(
            f"{where}: no field '{FREE_TEXT[0]}'{nearest(FREE_TEXT[0], row)}; or name a task by --task or in 'task'"
        )
    if task.chunked:
        record: dict[str, Any] = {"qid": "", "answers": [], "question": row.get("question")}
        for name in ("question", "context"):
            if not isinstance(row.get(name), str):
                raise UserError(f"{where}: field '{name}' of task {task.name} is missing or not a text")
        question = make_question(task, where, clean(row["context"]), record, {})
        assert question is not None  # nothing seen before
        return question
    values = {path: cell_text(row, path, where) for path in fields(task.source)}
    for path, text in values.items():
        if not text.strip() and path not in task.may_be_empty:
            raise UserError(f"{where}: column '{path}' of task {task.name} is empty")
    return whole_text(fill(task.source, values), "source", where)


def whole_text(value: Any, name: str, where: str) -> str:
    """A text that a tokenizer can read: not empty, with lone surrogates replaced."""
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{where}: field '{name}' is empty or not a text")
    return clean(value)


def tokenize_requests(requests: Sequence[Request], tokenizer: PreTrainedTokenizerBase, data: DataSettings) -> None:
    """Fill in the pieces of requests, those with plain text all at once."""
    plain = [(request, request.source) for request in requests if isinstance(request.source, str)]
    if plain:
        encoded = tokenizer(
            [source for _, source in plain],
            truncation=True,
            max_length=data.max_source_length,
            padding=False,
            return_attention_mask=False,
        )
        for (request, _), ids in zip(plain, encoded["input_ids"], strict=True):
            request.pieces = [ids]
    for request in requests:
        if isinstance(request.source, Question):
            chunks = chunks_of_questions(
                [request.source], tokenizer, data.max_source_length, data.chunk_overlap, training=False
            )
            request.pieces = [list(chunk.input_ids or ()) for chunk in chunks]
