"""Extractive-QA checkpoints on MRQA tasks: the likeliest span of each window, then the same protocol as for generated
answers."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from hdscale.data.batches import pad_rows
from hdscale.data.sample import sample_rows
from hdscale.data.settings import DataSettings
from hdscale.data.tasks import Example, Task
from hdscale.data.tasks.mrqa.reader import questions
from hdscale.errors import UserError
from hdscale.evaluation.evaluator import SplitEvaluator, SplitInputs
from hdscale.evaluation.generation import SCORE_DECIMALS, Decoding, Prediction, pad_sources

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MAX_ANSWER_TOKENS = 30
"""Length of the longest span considered (as in SQuAD's extractive baselines)."""


def check_extractive(tasks: Sequence[Task]) -> None:
    """Raise UserError for a task whose answers are not spans of its contexts."""
    for task in tasks:
        if not task.chunked:
            raise UserError(f"task {task.name}: an extractive checkpoint can only be evaluated on MRQA tasks")


@dataclasses.dataclass(slots=True)
class Window:
    """A question and a part of its context, as the model's tokenizer pairs them."""

    id: str
    input_ids: list[int]
    token_types: list[int]
    offsets: list[tuple[int, int] | None]
    """Character range in the context of each token, None outside of it."""
    context: str


class Windows:
    """All windows of a split, in the order of the questions: the rows that an `ExtractiveEvaluator` decodes."""

    def __init__(self, windows: list[Window]) -> None:
        self.windows = windows
        self.source_lengths = [len(window.input_ids) for window in windows]

    def __len__(self) -> int:
        return len(self.windows)

    def row(self, number: int) -> Window:
        return self.windows[number]


def windows_of(
    task: Task, split: str, tokenizer: PreTrainedTokenizerBase, data: DataSettings, limit: int | None
) -> tuple[Windows, list[Example], int]:
    """The windows of a sample of a split's questions, one example for each window, and the split's questions.

    The `group` of an example is the question's id.

    Raises:
        UserError: the tokenizer does not map tokens to characters.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(
            f"{type(tokenizer).__name__} does not map tokens to characters; use a model with a fast tokenizer"
        )
    length = min(data.max_source_length, tokenizer.model_max_length)
    windows, examples = [], []
    found = list(questions(task, split, data))
    for question in (found[number] for number in sample_rows(len(found), limit)):
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
    return Windows(windows), examples, len(found)


def shortened(text: str, tokenizer: PreTrainedTokenizerBase, most: int) -> str:
    """The first `most` tokens of a question: a longer one would leave less than half of the window to the context."""
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)["offset_mapping"]
    return text if len(offsets) <= most else text[: offsets[most - 1][1]]


class SpanDecoder:
    """A `BatchDecoder` that marks the best span of each window.

    `score` is the sum of its start and end logits, comparable between the windows of a question.
    """

    decoding = Decoding(MAX_ANSWER_TOKENS)

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model, self.tokenizer = model, tokenizer

    @property
    def device(self) -> torch.device:
        return self.model.device

    def at_full_length(self) -> SpanDecoder:
        """Itself: the memory of a batch does not depend on the answers."""
        return self

    @torch.inference_mode()
    def __call__(self, rows: Sequence[Window], numbers: Sequence[int]) -> list[Prediction]:
        sources = [row.input_ids for row in rows]
        input_ids, attention_mask = pad_sources(sources, self.tokenizer.pad_token_id, self.device)
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        if getattr(self.model.config, "type_vocab_size", 0) > 1:  # BERT's segments; RoBERTa and DistilBERT have none
            inputs["token_type_ids"] = pad_rows([row.token_types for row in rows], 0).to(self.device)
        found = self.model(**inputs)
        starts, ends = found.start_logits.float().cpu().numpy(), found.end_logits.float().cpu().numpy()
        predictions = []
        for place, (row, number) in enumerate(zip(rows, numbers, strict=True)):
            text, tokens, score = best_span(row, starts[place], ends[place])
            predictions.append(Prediction(number, row.id, text, tokens, round(score, SCORE_DECIMALS)))
        return predictions


def best_span(window: Window, starts: np.ndarray, ends: np.ndarray) -> tuple[str, int, float]:
    """(text, tokens, score) of the likeliest span of context tokens, at most `MAX_ANSWER_TOKENS` long.

    The text is empty if there is no context.
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


@dataclasses.dataclass(kw_only=True)
class ExtractiveEvaluator(SplitEvaluator):
    """Evaluates an extractive-QA checkpoint on MRQA tasks.

    Attributes:
        model: of transformers, with a head that gives start and end logits.
        tokenizer: the model's, a fast one.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    def inputs(self, task: Task, split: str, limit: int | None) -> SplitInputs[Window]:
        """The windows of a sample of at most `limit` questions.

        Raises:
            UserError: see `check_extractive` and `windows_of`.
        """
        check_extractive([task])
        windows, examples, total = windows_of(task, split, self.tokenizer, self.data, limit)
        return SplitInputs(windows, examples, SpanDecoder(self.model, self.tokenizer), total)
