"""Extractive-QA checkpoints on MRQA tasks: the likeliest span of each window, then the same protocol as for
generated answers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from hdscale.data.settings import DataSettings
from hdscale.data.tasks import Task
from hdscale.data.tasks.mrqa.read import questions
from hdscale.data.tasks.task import Example
from hdscale.errors import UserError
from hdscale.evaluation.decode import SCORE_DECIMALS, Decoding, Prediction, pad

MAX_ANSWER_TOKENS = 30
"""Longest span that is considered (the habit of SQuAD's extractive baselines)."""


@dataclasses.dataclass(slots=True)
class Window:
    """Question and a part of the context as the model's tokenizer pairs them."""

    id: str
    input_ids: list[int]
    token_types: list[int]
    offsets: list[tuple[int, int] | None]
    """Character range in the context of each token, None outside of it."""
    context: str


class Windows:
    """All windows of a split, in the order of the questions; what `evaluate_rows` reads."""

    def __init__(self, windows: list[Window]) -> None:
        self.windows = windows
        self.source_lengths = [len(window.input_ids) for window in windows]

    def __len__(self) -> int:
        return len(self.windows)

    def row(self, number: int) -> Window:
        return self.windows[number]


def windows_of(
    task: Task, split: str, tokenizer: Any, data: DataSettings, limit: int | None
) -> tuple[Windows, list[Example]]:
    """The windows of a split's questions, and one example for each of them (its question is the example's
    `group`).

    Raises:
        UserError: the tokenizer knows no offsets.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(
            f"{type(tokenizer).__name__} does not map tokens to characters; use a model with a fast tokenizer"
        )
    length = min(data.max_source_length, tokenizer.model_max_length)
    windows, examples = [], []
    for question in questions(task, split, data, limit):
        encoded = tokenizer(
            shortened(question.question, tokenizer, length // 2),
            question.context,
            truncation="only_second" if question.context else "longest_first",
            max_length=length,
            stride=min(data.chunk_overlap, length // 4),
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
            return_token_type_ids=True,
            verbose=False,
        )
        for number, ids in enumerate(encoded["input_ids"]):
            parts = encoded.sequence_ids(number)
            offsets = [
                tuple(place) if part == 1 else None
                for part, place in zip(parts, encoded["offset_mapping"][number], strict=True)
            ]
            id = f"{question.id}#{number}"
            windows.append(Window(id, ids, encoded["token_type_ids"][number], offsets, question.context))
            examples.append(Example(question.source, question.target, task.name, id, question.references, question.id))
    return Windows(windows), examples


def shortened(text: str, tokenizer: Any, most: int) -> str:
    """The beginning of a question that would leave less than half of the window to the context."""
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)["offset_mapping"]
    return text if len(offsets) <= most else text[: offsets[most - 1][1]]


class SpanDecoder:
    """The best span of each window; `score` is the sum of its start and end logits, comparable between
    windows of a question.
    """

    decoding = Decoding(MAX_ANSWER_TOKENS)
    scored, task_id, lockstep = True, None, False

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model, tokenizer

    @torch.inference_mode()
    def __call__(self, rows: Sequence[Window], numbers: Sequence[int]) -> list[Prediction]:
        input_ids, attention_mask = pad([row.input_ids for row in rows], self.tokenizer.pad_token_id, self.model.device)
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        if getattr(self.model.config, "type_vocab_size", 0) > 1:  # BERT's segments; RoBERTa and DistilBERT have none
            inputs["token_type_ids"] = pad([row.token_types for row in rows], 0, self.model.device)[0]
        found = self.model(**inputs)
        starts, ends = found.start_logits.float().cpu().numpy(), found.end_logits.float().cpu().numpy()
        predictions = []
        for place, (row, number) in enumerate(zip(rows, numbers, strict=True)):
            text, tokens, score = best_span(row, starts[place], ends[place])
            predictions.append(Prediction(number, row.id, text, tokens, round(score, SCORE_DECIMALS)))
        return predictions


def best_span(window: Window, starts: np.ndarray, ends: np.ndarray) -> tuple[str, int, float]:
    """(text, tokens, score) of the likeliest span of context tokens, at most `MAX_ANSWER_TOKENS` long; empty
    without context.
    """
    inside = [place for place, offset in enumerate(window.offsets) if offset is not None and offset[0] < offset[1]]
    if not inside:
        return "", 0, float(starts[0] + ends[0])
    low, high = inside[0], inside[-1] + 1
    mask = np.full(high - low, -np.inf)
    mask[[place - low for place in inside]] = 0.0
    sums = (starts[low:high] + mask)[:, None] + (ends[low:high] + mask)[None, :]
    sums[~np.triu(np.tril(np.ones_like(sums, dtype=bool), MAX_ANSWER_TOKENS - 1))] = -np.inf
    first, last = np.unravel_index(int(sums.argmax()), sums.shape)
    begin, end = window.offsets[low + first], window.offsets[low + last]
    assert begin is not None and end is not None  # both are context tokens by the mask
    return window.context[begin[0] : end[1]], int(last - first + 1), float(sums[first, last])
