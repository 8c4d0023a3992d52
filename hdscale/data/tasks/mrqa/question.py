"""A question of MRQA with its whole context, from its record, every field checked."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from hdscale.data.task import Example, Task
from hdscale.errors import UserError

_SURROGATE = re.compile(r"[\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class Question(Example):
    """A question with its whole context; `source` is the prompt, `target` the first answer found,
    `references` all gold answers.
    """

    qid: str = ""
    question: str = ""
    begin: int = 0
    """Where the question begins in the prompt."""
    context: str = ""
    spans: tuple[tuple[int, int], ...] = ()
    """(first, last) character of every detected answer in the context, inclusive, in the order of the file.
    """


def make_question(task: Task, where: str, context: str, record: Any, seen: dict[str, list[int]]) -> Question | None:
    """A question from its record, or None if it repeats an earlier one; `seen` is {qid: hashes of question
    and context}.
    """
    if not isinstance(record, Mapping):
        raise UserError(f"{where} must be an object with 'qid', 'question' and 'answers'")
    qid = field_of(record, "qid", str, where)
    text = clean(field_of(record, "question", str, where)).strip()
    content = hash((text, context))
    earlier = seen.setdefault(qid, [])
    if content in earlier:
        return None
    earlier.append(content)
    detected = record.get("detected_answers")
    spans = read_spans(detected if detected is not None else [], context, where)
    answers = record.get("answers")
    if answers is None and detected is not None:
        answers = [answer["text"] for answer in detected if "text" in answer]
    if not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers):
        raise UserError(f"{where}: field 'answers' is missing or no list of texts")
    return Question(
        source=prompt_before_context(task.source, text) + context,
        target=context[spans[0][0] : spans[0][1] + 1] if spans else "",
        task=task.name,
        id=qid if len(earlier) == 1 else f"{qid}~{len(earlier)}",
        references=tuple(map(clean, answers)) or ("",),
        qid=qid,
        question=text,
        begin=task.source.index("{question}"),
        context=context,
        spans=spans,
    )


def prompt_before_context(template: str, question: str) -> str:
    """The prompt up to the context; the template must end with it, so that chunks differ at their ends."""
    before, marker, after = template.partition("{context}")
    if not marker or after or "{question}" not in before:
        raise UserError(f"template '{template}': a chunked QA task needs '{{question}}' and, at its end, '{{context}}'")
    return before.replace("{question}", question)


def read_spans(detected: Any, context: str, where: str) -> tuple[tuple[int, int], ...]:
    """(first, last) of every detected answer, checked against the context and stripped of white space."""
    if not isinstance(detected, list):
        raise UserError(f"{where}: field 'detected_answers' must be a list")
    spans = []
    for number, answer in enumerate(detected):
        field = f"detected_answers[{number}]"
        if not isinstance(answer, Mapping) or not isinstance(answer.get("char_spans"), list):
            raise UserError(f"{where}: field '{field}.char_spans' is missing or no list")
        for index, span in enumerate(answer["char_spans"]):
            if not (isinstance(span, list | tuple) and len(span) == 2 and all(type(end) is int for end in span)):
                raise UserError(f"{where}: field '{field}.char_spans[{index}]' must be [first, last], not {span!r}")
            first, last = span
            if not 0 <= first <= last < len(context):
                raise UserError(
                    f"{where}: field '{field}.char_spans[{index}]' is [{first}, {last}], outside the context "
                    f"of {len(context)} characters (ends are inclusive)"
                )
            while first <= last and context[first].isspace():
                first += 1
            while last > first and context[last].isspace():
                last -= 1
            if first <= last:
                spans.append((first, last))
    return tuple(spans)


def field_of(record: Mapping[str, Any], name: str, kind: type, where: str) -> Any:
    """A required field of a JSON object."""
    if name not in record:
        raise UserError(f"{where}: field '{name}' is missing")
    if not isinstance(record[name], kind):
        raise UserError(f"{where}: field '{name}' must be a {kind.__name__}, not {type(record[name]).__name__}")
    return record[name]


def clean(text: str) -> str:
    """The text with lone surrogates replaced, character for character."""
    return _SURROGATE.sub("\ufffd", text)


def official_ids(question_ids: Iterable[str]) -> dict[str, str]:
    """{question id: qid as the file has it}: without the number that a repeated qid got."""
    ids = list(question_ids)
    known = set(ids)
    found = {}
    for question_id in ids:
        stem, mark, number = question_id.rpartition("~")
        repeated = bool(mark) and number.isdigit() and stem in known
        found[question_id] = stem if repeated else question_id
    return found
