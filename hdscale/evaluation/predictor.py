"""Predictions for JSON lines: in the order of the rows, in bounded memory.

Rows are read one window at a time; inside a window they are sorted by length and decoded in batches. The question and
context of an MRQA task are cut into chunks, and the likeliest answer is kept (Section 3.1.2).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

from hdscale.data.batches import Row
from hdscale.data.settings import DataSettings
from hdscale.data.tasks import Task
from hdscale.engine.tuning import largest_that_fits
from hdscale.errors import UserError
from hdscale.evaluation.evaluator import CPU_BATCH_SIZE
from hdscale.evaluation.generation import (
    Decoder,
    Decoding,
    GenerationModel,
    Prediction,
    model_device,
    task_decoding,
)
from hdscale.evaluation.mrqa_protocol import best_chunk
from hdscale.evaluation.requests import Request, tokenize_requests
from hdscale.evaluation.settings import EvalSettings
from hdscale.runs.ranks import SingleProcess

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WINDOW = 4096
"""Rows in memory at once: enough that the rows of a batch have similar lengths."""
GPU_BATCH_SIZE = 128


class Predictor:
    """Decodes requests with a model.

    Args:
        model: any model that generates. tokenizer: its tokenizer.
        settings: `eval.*` (beams, batch size, the score of chunks). data: `data.*` (lengths).
        batch_size: rows decoded at once; default: `eval.batch_size`, otherwise by device. It is halved for as long as a
            batch does not fit into memory.
        task_id: gives the model's id of a task (None: of free text); None if the model knows of no tasks.
        scored: also return log-likelihoods.
    """

    def __init__(
        self,
        model: GenerationModel,
        tokenizer: PreTrainedTokenizerBase,
        settings: EvalSettings,
        data: DataSettings,
        task_id: Callable[[str | None], int | None],
        batch_size: int | None = None,
        scored: bool = False,
    ) -> None:
        self.model, self.tokenizer, self._task_id = model, tokenizer, task_id
        self.settings, self.data, self.scored = settings, data, scored
        default = GPU_BATCH_SIZE if model_device(model).type == "cuda" else CPU_BATCH_SIZE
        self.batch_size = batch_size or settings.batch_size or default

    def stream(self, requests: Iterator[Request], window: int) -> Iterator[dict[str, Any]]:
        """The output rows of all requests, in order, with `window` of them in memory at once."""
        while group := list(islice(requests, window)):
            yield from self.answer(group)

    def answer(self, requests: Sequence[Request]) -> list[dict[str, Any]]:
        """The output rows of some requests: `line`, `id` (if the row has one), `prediction`, `score` (if asked for)."""
        tokenize_requests(requests, self.tokenizer, self.data)
        pieces = [(number, ids) for number, request in enumerate(requests) for ids in request.pieces]
        groups: dict[tuple[Decoding, bool, int | None], list[int]] = {}
        for place, (number, _) in enumerate(pieces):
            request = requests[number]
            group = (self.decoding(request.task), request.chunked, self.task_id(request.task))
            groups.setdefault(group, []).append(place)
        sources = [ids for _, ids in pieces]
        predictions: dict[int, Prediction] = {}
        for (decoding, chunked, task_id), places in groups.items():
            scored = chunked or self.scored
            decoder = Decoder(self.model, self.tokenizer, decoding, scored=scored, task_id=task_id)
            places.sort(key=lambda place: (-len(sources[place]), place))
            for prediction in self.decode(decoder, sources, places):
                predictions[prediction.row] = prediction
        parts: list[list[Prediction]] = [[] for _ in requests]
        for place, (number, _) in enumerate(pieces):
            parts[number].append(predictions[place])
        return [self.output(request, found) for request, found in zip(requests, parts, strict=True)]

    def decode(self, decoder: Decoder, sources: Sequence[list[int]], places: Sequence[int]) -> Iterator[Prediction]:
        """Predictions for the sources at these places, in batches that fit into memory; a smaller batch size is kept.

        Raises:
            UserError: not even one row fits.
        """
        found: list[Prediction] = []

        def attempt(size: int) -> None:
            batch = places[start : start + size]
            found[:] = decoder([Row(sources[place], [], decoder.task_id or 0, "", "") for place in batch], batch)

        start = 0
        while start < len(places):
            size = largest_that_fits(attempt, SingleProcess(), self.batch_size)
            if size == 0:
                raise UserError(
                    "not one row can be decoded in this device's memory; lower data.max_source_length, or use a "
                    "smaller model"
                )
            self.batch_size = size
            yield from found
            start += size

    def decoding(self, task: Task | None) -> Decoding:
        """How a task's rows are decoded; free text by `data.max_target_length` and `eval.num_beams`."""
        if task is None:
            return Decoding(self.data.max_target_length, self.settings.num_beams)
        return task_decoding(task, self.tokenizer, self.settings, self.data.max_target_length)

    def task_id(self, task: Task | None) -> int | None:
        """The id of a row's task in the model."""
        return self._task_id(None if task is None else task.name)

    def output(self, request: Request, parts: Sequence[Prediction]) -> dict[str, Any]:
        """One output row; the answers of a question's chunks become one."""
        best = parts[0]
        if request.chunked:
            records = [{"prediction": part.text, "score": part.score, "tokens": part.tokens} for part in parts]
            chosen = best_chunk(records, mean=self.settings.mrqa_score == "mean")
            best = dataclasses.replace(parts[chosen or 0], text="" if chosen is None else parts[chosen].text.strip())
        row: dict[str, Any] = {"line": request.line}
        if request.id is not None:
            row["id"] = request.id
        row["prediction"] = best.text
        if self.scored:
            row["score"] = best.score
        return row
