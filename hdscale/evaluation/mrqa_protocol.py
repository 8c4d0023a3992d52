"""From answers of chunks to answers of questions (Section 3.1.2), and the official evaluator's prediction files.

Every chunk of a question is decoded and scored by the summed log-likelihood of the tokens generated, </s> included (the
empty answer is `</s>` alone and is scored too). The likeliest non-empty answer becomes the question's, which is empty
only if all are.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hdscale.data.tasks import Example
from hdscale.data.tasks.mrqa.question import official_ids
from hdscale.errors import UserError, one_line
from hdscale.files import write_text


def best_chunk(chunks: Sequence[Mapping[str, Any]], mean: bool = False) -> int | None:
    """Which of a question's chunks has the likeliest non-empty prediction; None if all are empty.

    Args:
        chunks: records with `prediction`, `score` (summed log-likelihood) and `tokens` (how many were summed), in the
            order of the chunks.
        mean: compare scores per token instead; that favours longer answers.

    Among equal scores the earlier chunk wins.
    """
    best, best_score = None, float("-inf")
    for number, chunk in enumerate(chunks):
        score = chunk["score"] / max(chunk["tokens"], 1) if mean else chunk["score"]
        if chunk["prediction"].strip() and (best is None or score > best_score):
            best, best_score = number, score
    return best


def best_answer(chunks: Sequence[Mapping[str, Any]], mean: bool = False) -> str:
    """The likeliest non-empty prediction among a question's chunks, or the empty string."""
    best = best_chunk(chunks, mean)
    return "" if best is None else chunks[best]["prediction"].strip()


UNANSWERED = "\0"
"""The answer of a question that a prediction file lacks: it matches no gold answer (an empty prediction would match the
answer "The")."""


def question_of(chunk: Example) -> str:
    """The id of the question that a chunk is a part of."""
    if chunk.group is None:
        raise ValueError(f"example {chunk.id} of task {chunk.task} is not a chunk of a question")
    return chunk.group


def answer_questions(
    records: Iterable[Mapping[str, Any]], examples: Sequence[Example], mean: bool = False
) -> tuple[dict[str, str], dict[str, Example]]:
    """The questions' answers, from the records of their chunks.

    Args:
        records: predictions, one for each of `examples`, in the same order.
        examples: chunks; `group` is the question's id, `references` its gold answers.
        mean: see `best_answer`.

    Returns:
        ({question id: answer}, {question id: its first chunk}), both in the order of the questions.
    """
    chunks: dict[str, list[Mapping[str, Any]]] = {}
    first: dict[str, Example] = {}
    for record, example in zip(records, examples, strict=True):
        chunks.setdefault(question_of(example), []).append(record)
        first.setdefault(question_of(example), example)
    return {question: best_answer(found, mean) for question, found in chunks.items()}, first


def to_official(answers: Mapping[str, str]) -> dict[str, str]:
    """{qid: answer} as the shared task's evaluator reads it.

    Where a file repeats a qid, the last question's answer counts, as the last gold answers do in the official
    evaluator.
    """
    qids = official_ids(answers)
    return {qids[question]: answer for question, answer in answers.items()}


def write_official(answers: Mapping[str, str], path: str | Path) -> None:
    """Write the official evaluator's prediction file: one JSON object, qid -> answer."""
    write_text(path, json.dumps(to_official(answers), ensure_ascii=False), durable=True)


def read_official(path: str | Path, questions: Iterable[str]) -> dict[str, str]:
    """{question id: answer} of an official prediction file for these question ids; a question that it lacks is
    `UNANSWERED`, which is wrong.

    Raises:
        UserError: not a JSON object of strings.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: cannot be read as a prediction file ({one_line(error)})") from error
    if not isinstance(content, dict) or not all(isinstance(answer, str) for answer in content.values()):
        raise UserError(f"{path}: must be one JSON object that maps each qid to its answer, a string")
    return {question: content.get(qid, UNANSWERED) for question, qid in official_ids(questions).items()}
