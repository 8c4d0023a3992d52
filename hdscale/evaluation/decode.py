"""Decoding a set of tokenised rows: global batches, dealt out whole to ranks, streamed to part files,
resumable.

The bits of a matrix product change with the number of rows, so what must be the same at any number of ranks
is decided globally: rows are sorted by length, cut into batches, and a rank takes whole batches. A finished
batch is one line of the rank's part file; a torn line is a batch that was not finished. Rank 0 merges the
parts in row order.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from hdscale.errors import UserError
from hdscale.runs.ranks import RankGroup, SingleProcess

SCORE_DECIMALS = 4
"""Log-likelihoods are rounded to this many decimals before they are compared or written."""


class EvaluationStopped(Exception):
    """`should_stop()` said so between two batches: what is decoded is on disk, and the same call goes on from
    there.
    """


@dataclasses.dataclass(frozen=True)
class Decoding:
    """How a task's targets are generated (greedy or beam search)."""

    max_new_tokens: int
    num_beams: int = 1
    min_new_tokens: int = 0

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


@dataclasses.dataclass(slots=True)
class Prediction:
    """One decoded row: position in the split, its id, the text, its length in tokens (without padding, with
    </s>).

    `score` is the summed token log-likelihood of what was generated, rounded, where it was asked for.
    """

    row: int
    id: str
    text: str
    tokens: int
    score: float | None = None


def global_batches(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Row numbers in batches of `batch_size`, longest rows first (ties by row): each row in exactly one
    batch.
    """
    if batch_size < 1:
        raise UserError(f"eval.batch_size={batch_size} must be at least 1")
    order = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


class Decoder:
    """Turns batches of tokenised rows into `Prediction`s with a model that has `generate` and
    `log_likelihood`, or `generate_with_scores`, whose scores need no second pass.

    Args:
        model: an `hdscale` model, or any object with the same `generate(input_ids, attention_mask,
            task_ids=…, **kwargs)` and `log_likelihood(input_ids, attention_mask, labels, task_ids=…) -> [B]`.
        tokenizer: its tokenizer.
        decoding: lengths and beams.
        scored: also compute the log-likelihood of what was generated.
        task_id: index of the rows' task among the model's tasks, for task-conditioned models.
        lockstep: all ranks make the same number of forward passes (ZeRO-3 gathers weights collectively).
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        decoding: Decoding,
        scored: bool = False,
        task_id: int | None = None,
        lockstep: bool = False,
    ) -> None:
        self.model, self.tokenizer, self.decoding = model, tokenizer, decoding
        self.scored, self.task_id, self.lockstep = scored, task_id, lockstep
        self.device = model_device(model)

    @torch.inference_mode()
    def __call__(self, rows: Sequence[Any], numbers: Sequence[int]) -> list[Prediction]:
        """Decode one batch. `rows` have `input_ids` and `id`; `numbers` are their positions in the split."""
        input_ids, attention_mask = pad([row.input_ids for row in rows], self.tokenizer.pad_token_id, self.device)
        task_ids = None
        if self.task_id is not None:
            task_ids = torch.full((len(rows),), self.task_id, dtype=torch.long, device=self.device)
        arguments = self.decoding.generate_arguments()
        if self.lockstep:
            arguments["synced_gpus"] = True
        with evaluation_mode(self.model):
            log_likelihood = None
            if self.scored and hasattr(self.model, "generate_with_scores"):
                ids, log_likelihood = self.model.generate_with_scores(
                    input_ids, attention_mask, task_ids=task_ids, **arguments
                )
            else:
                ids = self.model.generate(input_ids, attention_mask, task_ids=task_ids, **arguments)
            generated = ids[:, 1:]  # [B, T], without the decoder's start token
            kept = tokens_kept(generated, self.tokenizer.eos_token_id, self.tokenizer.pad_token_id)
            scores: list[float] | list[None] = [None] * len(rows)
            if self.scored:
                if log_likelihood is None:
                    labels = generated.masked_fill(~kept, -100)
                    log_likelihood = self.model.log_likelihood(input_ids, attention_mask, labels, task_ids=task_ids)
                scores = [round(value, SCORE_DECIMALS) for value in log_likelihood.double().tolist()]
        texts = self.tokenizer.batch_decode(
            generated.tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        counts = kept.sum(dim=1).tolist()
        return [
            Prediction(number, str(row.id), text, count, score)
            for number, row, text, count, score in zip(numbers, rows, texts, counts, scores, strict=True)
        ]


def model_device(model: Any) -> torch.device:
    """The device of the model's parameters (CPU for an object without any)."""
    parameters = getattr(model, "parameters", None)
    first = next(iter(parameters()), None) if callable(parameters) else None
    return torch.device("cpu") if first is None else first.device


@contextlib.contextmanager
def evaluation_mode(model: Any) -> Iterator[None]:
    """Dropout off inside, the model's training flag restored after."""
    training = getattr(model, "training", False)
    if training:
        model.eval()
    try:
        yield
    finally:
        if training:
            model.train()


def pad(
    sequences: Sequence[Sequence[int]], pad_id: int, device: torch.device | str = "cpu"
) -> tuple[torch.Tensor, torch.Tensor]:
    """(input_ids, attention_mask), both [B, S] int64, of token lists padded on the right."""
    longest = max(len(sequence) for sequence in sequences)
    input_ids = torch.full((len(sequences), longest), pad_id, dtype=torch.long)
    attention_mask = torch.zeros((len(sequences), longest), dtype=torch.long)
    for index, sequence in enumerate(sequences):
        input_ids[index, : len(sequence)] = torch.as_tensor(sequence, dtype=torch.long)
        attention_mask[index, : len(sequence)] = 1
    return input_ids.to(device), attention_mask.to(device)


def tokens_kept(generated: torch.Tensor, eos_id: int, pad_id: int) -> torch.Tensor:
    """Mask [B, T] of what a row really generated: up to and with its first </s>; padding after it is not."""
    after_end = (generated == eos_id).cumsum(dim=1) - (generated == eos_id).long() > 0
    return ~after_end & (generated != pad_id)


class PartFiles:
    """The part files of one evaluation: `<name>.part<rank>.jsonl`, each a stamp line, then one line for each
    finished batch.
    """

    def __init__(self, folder: Path, name: str, stamp: dict[str, Any]) -> None:
        self.folder, self.name, self.stamp = folder, name, stamp

    def path(self, rank: int | str) -> Path:
        return self.folder / f"{self.name}.part{rank}.jsonl"

    def existing(self) -> list[Path]:
        return sorted(self.folder.glob(f"{self.name}.part*.jsonl"))

    def finished(self) -> dict[int, list[Prediction]]:
        """{batch number: predictions} of all parts that carry this stamp; torn lines and other stamps are
        left out.
        """
        batches: dict[int, list[Prediction]] = {}
        for path in self.existing():
            with path.open(encoding="utf-8") as lines:
                for number, line in enumerate(lines):
                    try:
                        record = json.loads(line)
                    except json.JSONDecodeError:
                        break  # killed while it wrote this line
                    if number == 0:
                        if record != self.stamp:
                            break
                    else:
                        batches[record["batch"]] = [Prediction(*fields) for fields in record["rows"]]
        return batches

    def consolidate(self) -> list[int]:
        """Gather what earlier, interrupted evaluations of the same stamp left into one part, and drop
        everything else.

        Returns:
            The numbers of the finished batches.
        """
        batches, old = self.finished(), self.existing()
        if batches:
            with atomic_writer(self.path("-earlier")) as stream:
                stream.write(dumps(self.stamp))
                for batch in sorted(batches):
                    stream.write(self.line(batch, batches[batch]))
        for path in old:
            if not (batches and path == self.path("-earlier")):
                path.unlink()
        return sorted(batches)

    @staticmethod
    def line(batch: int, predictions: list[Prediction]) -> str:
        return dumps({"batch": batch, "rows": [dataclasses.astuple(prediction) for prediction in predictions]})


def decode_all(
    decoder: Callable[[Sequence[Any], Sequence[int]], list[Prediction]],
    rows: Any,
    parts: PartFiles,
    *,
    batches: list[list[int]],
    ranks: RankGroup | None = None,
    should_stop: Callable[[], bool] | None = None,
    progress: Callable[[int, int], None] | None = None,
    lockstep: bool = False,
) -> None:
    """Decode all batches that no part file holds yet, every rank its share, into the part files.

    `rows.row(i)` is the i-th tokenised row. Ranks go round by round, so `should_stop` is called equally often
    on each and may be a collective agreement.

    Raises:
        EvaluationStopped: on all ranks, after `should_stop()`; the parts keep what is done.
    """
    ranks = ranks or SingleProcess()
    done = set(ranks.on_main(parts.consolidate))
    pending = [number for number in range(len(batches)) if number not in done]
    total = sum(len(batch) for batch in batches)
    decoded = total - sum(len(batches[number]) for number in pending)
    with parts.path(ranks.rank).open("w", encoding="utf-8") as stream:
        stream.write(dumps(parts.stamp))
        for start in range(0, len(pending), ranks.world_size):
            if should_stop is not None and should_stop():
                raise EvaluationStopped(parts.name)
            turn = pending[start : start + ranks.world_size]
            if ranks.rank < len(turn):
                batch = batches[turn[ranks.rank]]
                predictions = decoder([rows.row(row) for row in batch], batch)
                stream.write(parts.line(turn[ranks.rank], predictions))
                stream.flush()
            elif lockstep:
                decoder([rows.row(row) for row in batches[turn[0]]], batches[turn[0]])
            decoded += sum(len(batches[number]) for number in turn)
            if progress is not None:
                progress(decoded, total)
    ranks.barrier()


def find_batch_size(attempt: Callable[[int], None], ranks: RankGroup | None = None, largest: int = 512) -> int:
    """The largest of `largest`, `largest`/2, … that fits on every rank's accelerator.

    Args:
        attempt: decodes a batch of that many of the longest rows, as long as they may get; raises
            `torch.OutOfMemoryError`.

    Raises:
        UserError: not even one row fits.
    """
    ranks = ranks or SingleProcess()
    size = largest
    while size >= 1:
        try:
            attempt(size)
            fits = True
        except torch.OutOfMemoryError:
            fits = False
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if ranks.all_true(fits):
            return size
        size //= 2
    raise UserError("not one row can be decoded in this device's memory; use a smaller base or shorter sources")


@contextlib.contextmanager
def atomic_writer(path: Path) -> Iterator[Any]:
    """A text stream whose file appears under its name only when everything is on disk."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8", newline="\n") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def dumps(record: Any) -> str:
    """One JSON line."""
    return json.dumps(record, ensure_ascii=False) + "\n"
