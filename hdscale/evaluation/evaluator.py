"""Evaluating tasks by what a model answers: decode their splits over all ranks, write the predictions, score them.

The bits of a matrix product change with the number of rows, so what must be the same at any number of ranks is decided
globally: rows are sorted by length and cut into batches, and each rank decodes whole batches.

An interrupted evaluation resumes: finished batches are read from the part files, finished splits from their
predictions, as long as their stamp (the model's step, rows, batch size, decoding) is the same.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch

from hdscale.data.sample import sample_examples
from hdscale.data.settings import DataSettings
from hdscale.data.sources import load_examples
from hdscale.data.tasks import Example, Task
from hdscale.data.tokenize import tokenized_split
from hdscale.engine.tuning import largest_that_fits
from hdscale.errors import UserError
from hdscale.evaluation.averages import averages, selection_score
from hdscale.evaluation.generation import (
    BatchDecoder,
    Decoder,
    GenerationModel,
    Prediction,
    RowSample,
    SourceRow,
    SplitRows,
    global_batches,
    task_decoding,
    task_id_of,
)
from hdscale.evaluation.metrics import check_metrics, compute_scores
from hdscale.evaluation.mrqa_protocol import answer_questions, write_official
from hdscale.evaluation.predictions import SHARED_FILES_SECONDS, PredictionFiles, batch_line, fingerprint
from hdscale.evaluation.settings import EvalSettings
from hdscale.files import json_line
from hdscale.runs.ranks import RankGroup, SingleProcess
from hdscale.runs.scores import Score
from hdscale.runs.settled import Settled

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BATCH_SIZES = "batch_sizes.json"
"""Beside the predictions: {task.split: rows of an evaluation batch}, found once and used by every later evaluation."""
LARGEST_BATCH_SIZE = 512
CPU_BATCH_SIZE = 32
"""On a CPU there is no device memory to fill, and larger batches only have more padding."""

SplitProgress = Callable[[int, int], None]
"""Called with (rows decoded by all ranks, rows) after each batch."""
TaskProgress = Callable[[str, int, int], None]
"""Called with (task name, rows decoded by all ranks, rows) after each batch."""


class EvaluationStopped(Exception):
    """`should_stop()` was true between two batches. What is decoded is on disk; the same call resumes from there."""


@dataclasses.dataclass
class SplitResult:
    """Metrics (x100) of one task on one split, notes about them, and where its predictions are."""

    task: str
    split: str
    metrics: dict[str, float]
    notes: dict[str, Any]
    path: Path


@dataclasses.dataclass
class Evaluation:
    """The results of several tasks, by name."""

    tasks: Sequence[Task]
    results: dict[str, SplitResult]

    def metrics(self) -> dict[str, dict[str, float]]:
        """{task: {metric: value x100}}, as in `results.json`."""
        return {name: result.metrics for name, result in self.results.items()}

    def notes(self) -> dict[str, dict[str, Any]]:
        """{task: what a reader must know about its metrics}."""
        return {name: result.notes for name, result in self.results.items()}

    def scores(self, step: int | None, selection: str, checkpoint: str | None = None) -> list[Score]:
        """The metrics with what they are of; see `hdscale.runs.scores.Score` for the arguments."""
        return [
            Score(
                name,
                result.split,
                result.metrics,
                step,
                selection,
                result.notes["rows"],
                result.notes["rows_in_split"],
                checkpoint,
            )
            for name, result in self.results.items()
        ]

    def averages(self) -> dict[str, float]:
        """All averages that apply to these tasks."""
        return averages(self.tasks, self.metrics())

    def selection(self, select: str) -> float:
        """The number by which `eval.select` compares checkpoints: higher is better."""
        return selection_score(select, self.tasks, self.metrics(), self.notes())


Row = TypeVar("Row", bound=SourceRow)


@dataclasses.dataclass
class SplitInputs(Generic[Row]):
    """A split, or a sample of it, as it is decoded.

    Attributes:
        rows: tokenised. examples: one for each row.
        decoder: of the rows.
        total: rows of the whole split (questions, where examples are chunks of them).
    """

    rows: SplitRows[Row]
    examples: Sequence[Example]
    decoder: BatchDecoder[Row]
    total: int

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row's source."""
        return [int(length) for length in self.rows.source_lengths]

    def decode(self, numbers: Sequence[int]) -> list[Prediction]:
        """The predictions of these rows, as one batch."""
        return self.decoder([self.rows.row(number) for number in numbers], numbers)


@dataclasses.dataclass(kw_only=True)
class SplitEvaluator(abc.ABC):
    """Evaluates splits with whatever decodes them: see `Evaluator` and `hdscale.evaluation.extractive`.

    Attributes:
        settings: `eval.*`. data: `data.*`.
        folder: where the predictions go (`<run>/predictions`).
        ranks: the group that shares the work; default: this process alone.
        should_stop: called between batches, equally often on all ranks.
        lockstep: all ranks make the same number of forward passes (for ZeRO-3).
    """

    settings: EvalSettings
    data: DataSettings
    folder: Path
    ranks: RankGroup = dataclasses.field(default_factory=SingleProcess)
    should_stop: Callable[[], bool] | None = None
    lockstep: bool = False

    def evaluate(
        self,
        tasks: Sequence[Task],
        split: str,
        step: int | str,
        limit: int | None = None,
        progress: TaskProgress | None = None,
    ) -> Evaluation:
        """Evaluate every task on `split`; the arguments are those of `evaluate_split`."""
        results = {}
        for task in tasks:
            shown = functools.partial(progress, task.name) if progress else None
            results[task.name] = self.evaluate_split(task, split, step, limit, shown)
        return Evaluation(tasks, results)

    def evaluate_split(
        self,
        task: Task,
        split: str,
        step: int | str,
        limit: int | None = None,
        progress: SplitProgress | None = None,
    ) -> SplitResult:
        """Decode every row of a task's split, over all ranks, and score it.

        Args:
            step: the model's step, or another name of its weights; predictions of other weights are not reused.
            limit: a sample of at most this many rows (questions, for MRQA): see `hdscale.data.sample`.
            progress: told how many rows are decoded.

        Returns:
            the same result on every rank.

        Raises:
            EvaluationStopped: after `should_stop()`; call again with the same arguments to resume.
            UserError: an empty split, a metric that the task's kind does not have, no memory for one row.
        """
        check_metrics(task)
        return self.evaluate_rows(task, split, self.inputs(task, split, limit), step, progress)

    @abc.abstractmethod
    def inputs(self, task: Task, split: str, limit: int | None) -> SplitInputs[Any]:
        """A split, or a sample of at most `limit` of its rows (questions), and what decodes it."""

    def evaluate_rows(
        self,
        task: Task,
        split: str,
        inputs: SplitInputs[Any],
        step: int | str,
        progress: SplitProgress | None = None,
    ) -> SplitResult:
        """`evaluate_split` of rows that are read already.

        The chunks of a question (MRQA) are answered one by one; their answers become the question's, which is scored.
        """
        examples = inputs.examples
        if not examples:
            raise UserError(f"task {task.name}: its {split} split has no rows")
        self.ranks.on_main(self.folder.mkdir, parents=True, exist_ok=True)
        name = f"{task.name}.{split}"
        batch_size = self.batch_size(name, inputs)
        stamp = {
            "step": step,
            "name": name,
            "rows": len(examples),
            "batch_size": batch_size,
            "decoding": dataclasses.asdict(inputs.decoder.decoding),
            "inputs": fingerprint(inputs.rows, len(examples)),
        }
        files = PredictionFiles(self.folder, name, stamp)
        if not self.ranks.on_main(files.is_complete):
            started = time.monotonic()
            self.decode(inputs, files, global_batches(inputs.lengths, batch_size), progress)
            seconds = time.monotonic() - started
            patience = SHARED_FILES_SECONDS if self.ranks.world_size > 1 else 0.0
            self.ranks.on_main(files.merge, examples, task.chunked, seconds, patience)
        metrics, notes = self.ranks.on_main(score, task, files, examples, self.settings)
        notes |= {"rows_in_split": inputs.total, "batch_size": batch_size}
        return SplitResult(task.name, split, metrics, notes, files.path)

    def decode(
        self,
        inputs: SplitInputs[Any],
        files: PredictionFiles,
        batches: Sequence[Sequence[int]],
        progress: SplitProgress | None = None,
    ) -> None:
        """Decode all batches that are in no part file yet, each rank its share, into the part files.

        Ranks decode in lockstep, so `should_stop` is called equally often on each and may be a collective agreement.

        Raises:
            EvaluationStopped: on all ranks, after `should_stop()`; the part files keep what is done.
        """
        ranks = self.ranks
        done = set(ranks.on_main(files.gather_finished))
        pending = [number for number in range(len(batches)) if number not in done]
        total = sum(len(batch) for batch in batches)
        decoded = total - sum(len(batches[number]) for number in pending)
        with files.part(ranks.rank).open("w", encoding="utf-8") as stream:
            stream.write(json_line(files.stamp))
            for start in range(0, len(pending), ranks.world_size):
                if self.should_stop is not None and self.should_stop():
                    raise EvaluationStopped(files.name)
                turn = pending[start : start + ranks.world_size]
                if ranks.rank < len(turn):
                    number = turn[ranks.rank]
                    stream.write(batch_line(number, inputs.decode(batches[number])))
                    stream.flush()
                elif self.in_lockstep:
                    inputs.decode(batches[turn[0]])
                decoded += sum(len(batches[number]) for number in turn)
                if progress is not None:
                    progress(decoded, total)
        ranks.barrier()

    @property
    def in_lockstep(self) -> bool:
        """Whether there are other ranks to keep in step with."""
        return self.lockstep and self.ranks.world_size > 1

    def batch_size(self, name: str, inputs: SplitInputs[Any]) -> int:
        """`eval.batch_size`, or (null) the largest that fits, found once and kept in the folder under the name."""
        if self.settings.batch_size is not None:
            return self.settings.batch_size
        return self._batch_sizes.once(name, functools.partial(self._largest_batch_size, inputs))

    @functools.cached_property
    def _batch_sizes(self) -> Settled:
        return Settled(self.folder / BATCH_SIZES, self.ranks)

    def _largest_batch_size(self, inputs: SplitInputs[Any]) -> int:
        """The largest batch size at which the longest row fits, with an answer as long as it may get."""
        if inputs.decoder.device.type == "cpu":
            return CPU_BATCH_SIZE
        lengths = inputs.lengths
        longest = max(range(len(lengths)), key=lengths.__getitem__)
        row, decoder = inputs.rows.row(longest), inputs.decoder.at_full_length()
        size = largest_that_fits(
            lambda count: decoder([row] * count, [longest] * count), self.ranks, LARGEST_BATCH_SIZE
        )
        if torch.cuda.is_available():
            # libraries that allocate for themselves need the memory that the attempts have left in PyTorch's cache
            torch.cuda.empty_cache()
        if size == 0:
            raise UserError(
                "eval.batch_size=null: not one row can be decoded in this device's memory; use a smaller base "
                "(model.name) or shorter sources (data.max_source_length)"
            )
        return size


@dataclasses.dataclass(kw_only=True)
class Evaluator(SplitEvaluator):
    """Evaluates tasks by generating their targets.

    Attributes:
        model: generates, and computes log-likelihoods for tasks whose examples are chunks.
        tokenizer: the model's.
        task_ids: {task: its id} of a task-conditioned model, empty for others.
    """

    model: GenerationModel
    tokenizer: PreTrainedTokenizerBase
    task_ids: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def inputs(self, task: Task, split: str, limit: int | None) -> SplitInputs[Any]:
        rows = tokenized_split(task, split, self.tokenizer, self.data)
        examples = load_examples(task, split, self.data, self.tokenizer)
        if len(rows) != len(examples):
            raise ValueError(f"{len(rows)} rows for {len(examples)} examples of {task.name}")
        chosen, total = sample_examples(examples, limit, task.chunked)
        decoder = Decoder(
            self.model,
            self.tokenizer,
            task_decoding(task, self.tokenizer, self.settings, self.data.max_target_length),
            scored=task.chunked,
            task_id=task_id_of(task.name, self.task_ids),
            lockstep=self.in_lockstep,
        )
        return SplitInputs(RowSample(rows, chosen), [examples[number] for number in chosen], decoder, total)


def score(
    task: Task, files: PredictionFiles, examples: Sequence[Example], settings: EvalSettings
) -> tuple[dict[str, float], dict[str, Any]]:
    """Metrics and notes of complete predictions."""
    records = files.records()
    texts = [record["prediction"] for record in records]
    notes: dict[str, Any] = {"generated_tokens": sum(record["tokens"] for record in records) / len(records)}
    if task.chunked:
        answers, questions = answer_questions(records, examples, mean=settings.mrqa_score == "mean")
        texts, examples = list(answers.values()), list(questions.values())
        notes |= {
            "chunks": len(records),
            "empty_answers": sum(not text for text in texts),
            "chunk_score": settings.mrqa_score,
            "empty_allowed": settings.mrqa_empty,
        }
        write_official(answers, files.official_path)
    scores = compute_scores(task, texts, examples)
    return scores.metrics, scores.notes | notes | {"seconds": files.seconds()}
