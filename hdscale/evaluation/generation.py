"""Generating the targets of tokenised rows: what a model must offer, lengths and beams, and the decoder of a batch.

Shapes: B batch, S source, T target.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from hdscale.data.batches import IGNORED, mask_of, pad_rows
from hdscale.data.tasks import Task
from hdscale.errors import UserError
from hdscale.evaluation.settings import EvalSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SCORE_DECIMALS = 4
"""Log-likelihoods are rounded to this many decimals before they are compared or written."""
UNKNOWN_TASK = -1
"""Id of a task that a task-conditioned model was not trained on."""


class GenerationModel(Protocol):
    """What evaluation needs of a model: `hdscale.modeling.model.AdaptedModel` has it, and `hdscale.load.Seq2Seq`."""

    training: bool

    def train(self, mode: bool = True) -> object:
        """Switch dropout on or off."""

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        """Its parameters, all on one device."""

    def generate(
        self, input_ids: Tensor, attention_mask: Tensor, task_ids: Tensor | None = None, **arguments: Any
    ) -> Tensor:
        """Token ids [B, T + 1] for sources [B, S], the decoder's start token first; `arguments` are transformers'."""

    def log_likelihood(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, task_ids: Tensor | None = None
    ) -> Tensor:
        """Log-likelihood [B] of the labels [B, T] (-100 is left out), summed over each row's tokens."""


@runtime_checkable
class ScoresWhileGenerating(Protocol):
    """A model whose scores need no second pass."""

    def generate_with_scores(
        self, input_ids: Tensor, attention_mask: Tensor, task_ids: Tensor | None = None, **arguments: Any
    ) -> tuple[Tensor, Tensor]:
        """What `generate` returns, and the log-likelihood [B] of what was generated."""


class SourceRow(Protocol):
    """A tokenised row, as far as evaluation reads it."""

    @property
    def input_ids(self) -> list[int]: ...

    @property
    def id(self) -> str: ...


Row_co = TypeVar("Row_co", bound=SourceRow, covariant=True)
Row_contra = TypeVar("Row_contra", bound=SourceRow, contravariant=True)


class SplitRows(Protocol[Row_co]):
    """The tokenised rows of a split."""

    @property
    def source_lengths(self) -> Sequence[int] | np.ndarray:
        """Tokens of each row's source."""

    def __len__(self) -> int: ...

    def row(self, number: int, /) -> Row_co:
        """The row at this position."""


class RowSample(Generic[Row_co]):
    """Some rows of a split, in order: position `number` here is row `chosen[number]` there."""

    def __init__(self, rows: SplitRows[Row_co], chosen: Sequence[int]) -> None:
        self._rows, self._chosen = rows, chosen

    @property
    def source_lengths(self) -> np.ndarray:
        """Tokens of each row's source."""
        return np.asarray(self._rows.source_lengths)[list(self._chosen)]

    def __len__(self) -> int:
        return len(self._chosen)

    def row(self, number: int, /) -> Row_co:
        """The row at this position of the sample."""
        return self._rows.row(self._chosen[number])


@dataclasses.dataclass(frozen=True)
class Decoding:
    """How a task's targets are generated (greedy or beam search).

    Attributes:
        max_new_tokens: largest number of tokens, </s> included.
        num_beams: 1 is greedy search.
        min_new_tokens: number of tokens before </s> is allowed.
        without_empty: log-likelihoods are those given that the text is not empty.
    """

    max_new_tokens: int
    num_beams: int = 1
    min_new_tokens: int = 0
    without_empty: bool = False

    def generate_arguments(self) -> dict[str, Any]:
        """Keyword arguments of `model.generate`."""
        arguments: dict[str, Any] = {
            "max_new_tokens": self.max_new_tokens,
            "num_beams": self.num_beams,
            "do_sample": False,
        }
        if self.min_new_tokens:
            arguments["min_new_tokens"] = self.min_new_tokens
        return arguments


def task_decoding(
    task: Task, tokenizer: PreTrainedTokenizerBase, settings: EvalSettings, max_target_length: int
) -> Decoding:
    """How the task's targets are generated: at most as long as the longest label, </s> included, in a label task."""
    own = task.decoding
    length = own.max_target_length or max_target_length
    if task.kind == "label" and task.labels and own.max_target_length is None:
        length = max(len(tokenizer(label).input_ids) for label in task.labels)
    # a task's minimum counts the decoder's start token, as transformers' `min_length` does
    most = max(1, length - settings.count_start_token)
    without_empty = task.chunked and not settings.mrqa_empty
    fewest = max(0, own.min_length - 1, without_empty)
    return Decoding(most, own.num_beams or settings.num_beams, fewest, without_empty)


def task_id_of(name: str | None, task_ids: Mapping[str, int]) -> int | None:
    """The id by which the model knows a task; None for a model that is not conditioned on tasks (it has no ids).

    Args:
        name: of the task; None for free text, which belongs to no task.
        task_ids: {task: its id} of the model.
    """
    if not task_ids:
        return None
    return UNKNOWN_TASK if name is None else task_ids.get(name, UNKNOWN_TASK)


@dataclasses.dataclass(slots=True)
class Prediction:
    """One decoded row: its position in the split, its id, the text, its length in tokens (</s> included, padding not).

    `score` is the log-likelihood of what was generated, summed over its tokens and rounded, where it was asked for.
    """

    row: int
    id: str
    text: str
    tokens: int
    score: float | None = None


class BatchDecoder(Protocol[Row_contra]):
    """Turns a batch of rows into predictions."""

    decoding: Decoding

    @property
    def device(self) -> torch.device:
        """Where the model is."""

    def __call__(self, rows: Sequence[Row_contra], numbers: Sequence[int]) -> list[Prediction]:
        """Decode one batch; `numbers` are the rows' positions in the split."""

    def at_full_length(self) -> BatchDecoder[Row_contra]:
        """A decoder that generates as many tokens as it may for each row: it shows how much memory a batch can need."""


class Decoder:
    """A `BatchDecoder` that generates with a sequence-to-sequence model.

    Args:
        model: generates and, where scores are wanted, computes log-likelihoods.
        tokenizer: its tokenizer.
        decoding: lengths and beams.
        scored: also compute the log-likelihood of what was generated.
        task_id: id of the rows' task, for a task-conditioned model.
        lockstep: every rank generates as many steps as the slowest one (ZeRO-3 gathers weights collectively).
    """

    def __init__(
        self,
        model: GenerationModel,
        tokenizer: PreTrainedTokenizerBase,
        decoding: Decoding,
        scored: bool = False,
        task_id: int | None = None,
        lockstep: bool = False,
    ) -> None:
        self.model, self.tokenizer, self.decoding = model, tokenizer, decoding
        self.scored, self.task_id, self.lockstep = scored, task_id, lockstep

    @property
    def device(self) -> torch.device:
        return model_device(self.model)

    def at_full_length(self) -> Decoder:
        full = dataclasses.replace(self.decoding, min_new_tokens=self.decoding.max_new_tokens)
        return Decoder(self.model, self.tokenizer, full, self.scored, self.task_id, self.lockstep)

    @torch.inference_mode()
    def __call__(self, rows: Sequence[SourceRow], numbers: Sequence[int]) -> list[Prediction]:
        """Decode one batch; `numbers` are the rows' positions in the split."""
        device = self.device
        input_ids, attention_mask = pad_sources([row.input_ids for row in rows], self.tokenizer.pad_token_id, device)
        task_ids = None
        if self.task_id is not None:
            task_ids = torch.full((len(rows),), self.task_id, dtype=torch.long, device=device)
        arguments = self.decoding.generate_arguments()
        if self.lockstep:
            arguments["synced_gpus"] = True
        with evaluation_mode(self.model):
            log_likelihood: Tensor | None = None
            if self.scored and isinstance(self.model, ScoresWhileGenerating):
                ids, log_likelihood = self.model.generate_with_scores(
                    input_ids, attention_mask, task_ids=task_ids, **arguments
                )
            else:
                ids = self.model.generate(input_ids, attention_mask, task_ids=task_ids, **arguments)
            generated = ids[:, 1:]  # [B, T], without the decoder's start token
            kept = tokens_kept(generated, self.tokenizer.eos_token_id, self.tokenizer.pad_token_id)
            if self.scored and log_likelihood is None:
                labels = generated.masked_fill(~kept, IGNORED)
                log_likelihood = self.model.log_likelihood(input_ids, attention_mask, labels, task_ids=task_ids)
            if log_likelihood is not None and self.decoding.without_empty:
                end = torch.full((len(rows), 1), self.tokenizer.eos_token_id, dtype=torch.long, device=device)
                empty = self.model.log_likelihood(input_ids, attention_mask, end, task_ids=task_ids)
                log_likelihood = log_likelihood.double() - log_of_rest(empty)
        scores: Sequence[float | None] = [None] * len(rows)
        if log_likelihood is not None:
            scores = [round(value, SCORE_DECIMALS) for value in log_likelihood.double().tolist()]
        texts = self.tokenizer.batch_decode(
            generated.tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        counts = kept.sum(dim=1).tolist()
        return [
            Prediction(number, str(row.id), text, count, score)
            for number, row, text, count, score in zip(numbers, rows, texts, counts, scores, strict=True)
        ]


def global_batches(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Row numbers in batches of `batch_size`, longest rows first (ties by row): each row in exactly one batch."""
    if batch_size < 1:
        raise UserError(f"eval.batch_size={batch_size} must be at least 1")
    order = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def pad_sources(sources: Sequence[Sequence[int]], pad_id: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """(input_ids, attention_mask), both int64 [B, S], of lists of token ids padded on the right."""
    input_ids = pad_rows(sources, pad_id)
    return input_ids.to(device), mask_of(sources, input_ids.shape[1]).long().to(device)


def tokens_kept(generated: Tensor, eos_id: int, pad_id: int) -> Tensor:
    """Mask [B, T] of the tokens that a row consists of: up to its first </s>, that included; padding is not kept."""
    after_end = (generated == eos_id).cumsum(dim=1) - (generated == eos_id).long() > 0
    return ~after_end & (generated != pad_id)


def log_of_rest(log_probability: Tensor) -> Tensor:
    """log(1 - p) of log p, in float64; p counts as at most 1 - 1e-6, as float32 does not tell it from 1 beyond."""
    return torch.log(-torch.expm1(log_probability.double().clamp(max=-1e-6)))


def model_device(model: GenerationModel) -> torch.device:
    """The device of the model's parameters."""
    return next(iter(model.parameters())).device


@contextlib.contextmanager
def evaluation_mode(model: GenerationModel) -> Iterator[None]:
    """Dropout is off inside; the model's training flag is restored afterwards."""
    training = model.training
    if training:
        model.train(False)
    try:
        yield
    finally:
        if training:
            model.train()
