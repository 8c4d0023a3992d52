"""Evaluating splits by generation: decode over all ranks, write `predictions/<task>.<split>.jsonl`, score on
rank 0.

An evaluation that was interrupted goes on where it stopped: finished batches are found again in the part
files, finished splits in their predictions file, as long as the stamp (model step, rows, batch size,
decoding) is the same.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hdscale.data.sources import load_examples
from hdscale.data.tokenize import tokenized_split
from hdscale.errors import UserError
from hdscale.evaluation.averages import averages, selection_score
from hdscale.evaluation.decode import (
    Decoder,
    Decoding,
    PartFiles,
    Prediction,
    atomic_writer,
    decode_all,
    dumps,
    find_batch_size,
    global_batches,
    model_device,
)
from hdscale.evaluation.metrics import check_metrics, compute_scores
from hdscale.evaluation.mrqa_protocol import answer_questions, first_questions, is_chunked, write_official
from hdscale.evaluation.settings import EvalSettings
from hdscale.runs.ranks import RankGroup, SingleProcess

BATCH_SIZES = "batch_sizes.json"
"""Beside the predictions: {task.split: rows of an evaluation batch}, found once and used again by every later
evaluation.
"""
CPU_BATCH_SIZE = 32
"""Where there is no accelerator memory to fill: larger batches only pad more."""


@dataclasses.dataclass
class SplitResult:
    """Metrics (×100) of one task on one split, notes beside them, and where its predictions are."""

    task: str
    split: str
    metrics: dict[str, float]
    notes: dict[str, Any]
    path: Path


@dataclasses.dataclass
class Evaluation:
    """What one evaluation of several tasks found."""

    results: dict[str, SplitResult]
    averages: dict[str, float]
    selection: float

    def metrics(self) -> dict[str, dict[str, float]]:
        """{task: {metric: value ×100}}, as `results.json` has it."""
        return {name: result.metrics for name, result in self.results.items()}

    def notes(self) -> dict[str, dict[str, Any]]:
        return {name: result.notes for name, result in self.results.items()}


def evaluate_tasks(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[Any],
    split: str,
    settings: EvalSettings,
    *,
    data: Any,
    folder: str | Path,
    step: int | str,
    limit: int | None = None,
    ranks: RankGroup | None = None,
    task_ids: dict[str, int] | None = None,
    should_stop: Callable[[], bool] | None = None,
    progress: Callable[[str, int, int], None] | None = None,
    lockstep: bool = False,
) -> Evaluation:
    """Evaluate every task on `split` and average; the arguments are those of `evaluate_split`.

    Args:
        task_ids: {task name: index among the model's tasks}, for task-conditioned models.
        progress: called with (task name, rows decoded by all ranks, rows) after each batch.
    """
    results = {}
    for task in tasks:
        results[task.name] = evaluate_split(
            model,
            tokenizer,
            task,
            split,
            settings,
            data=data,
            folder=folder,
            step=step,
            limit=limit,
            ranks=ranks,
            task_id=(task_ids or {}).get(task.name),
            should_stop=should_stop,
            progress=(lambda done, total, name=task.name: progress(name, done, total)) if progress else None,
            lockstep=lockstep,
        )
    metrics = {name: result.metrics for name, result in results.items()}
    notes = {name: result.notes for name, result in results.items()}
    return Evaluation(results, averages(tasks, metrics), selection_score(settings.select, tasks, metrics, notes))


def evaluate_split(
    model: Any,
    tokenizer: Any,
    task: Any,
    split: str,
    settings: EvalSettings,
    *,
    data: Any,
    folder: str | Path,
    step: int | str,
    limit: int | None = None,
    ranks: RankGroup | None = None,
    task_id: int | None = None,
    should_stop: Callable[[], bool] | None = None,
    progress: Callable[[int, int], None] | None = None,
    lockstep: bool = False,
) -> SplitResult:
    """Generate for every row of a task's split, over all ranks, and score.

    Args:
        settings: `eval.*` (batch size, beams where the task states none).
        data: `data.*`, for the data room.
        folder: where the predictions go (`<run>/predictions`).
        step: the model's step, or another name of its weights; predictions of another one are not used again.
        limit: only the first so many rows (questions, for MRQA).
        ranks: the group that shares the work (`barrier`, `all_true`, `broadcast_object`); default: this
            process alone.
        task_id: the task's index among the model's tasks.
        should_stop: looked at between batches, equally often on all ranks.
        progress: called with (rows decoded, rows) after each batch.
        lockstep: all ranks make the same number of forward passes (for ZeRO-3).

    Returns:
        The same result on every rank.

    Raises:
        EvaluationStopped: after `should_stop()`; call again with the same arguments to go on.
        UserError: an empty split, a metric unknown to the task's kind, no memory for one row.
    """
    check_metrics(task)
    rows = tokenized_split(task, split, tokenizer, data)
    examples = load_examples(task, split, data, tokenizer)
    return evaluate_rows(
        model,
        tokenizer,
        task,
        split,
        rows,
        examples,
        settings,
        decoding=task_decoding(task, tokenizer, settings, data.max_target_length),
        folder=folder,
        step=step,
        limit=limit,
        ranks=ranks,
        task_id=task_id,
        should_stop=should_stop,
        progress=progress,
        lockstep=lockstep,
    )


def evaluate_rows(
    model: Any,
    tokenizer: Any,
    task: Any,
    split: str,
    rows: Any,
    examples: Sequence[Any],
    settings: EvalSettings,
    *,
    decoding: Decoding,
    folder: str | Path,
    step: int | str,
    limit: int | None = None,
    ranks: RankGroup | None = None,
    task_id: int | None = None,
    should_stop: Callable[[], bool] | None = None,
    progress: Callable[[int, int], None] | None = None,
    lockstep: bool = False,
    decoder: Any = None,
) -> SplitResult:
    """`evaluate_split` on rows that are at hand: a `TokenizedSplit` (`source_lengths`, `row(i)`), one row for
    each example.

    Examples with a `group` are chunks of a question (MRQA): their answers become the question's before they
    are scored. `decoder` stands in for the one that generates (an extractive model's).
    """
    ranks = ranks or SingleProcess()
    folder = Path(folder)
    ranks.on_main(folder.mkdir, parents=True, exist_ok=True)
    if len(rows) != len(examples):
        raise ValueError(f"{len(rows)} rows for {len(examples)} examples of {task.name}")
    chunked = is_chunked(examples)
    if limit is not None:
        examples = examples[: first_questions(examples, limit) if chunked else limit]
    if not len(examples):
        raise UserError(f"task {task.name}: its {split} split has no rows")
    lockstep = lockstep and ranks.world_size > 1
    decoder = decoder or Decoder(model, tokenizer, decoding, scored=chunked, task_id=task_id, lockstep=lockstep)
    lengths = rows.source_lengths[: len(examples)]
    name = f"{task.name}.{split}"
    batch_size = stored_batch_size(settings, folder, name, decoder, rows, lengths, ranks)
    stamp = {
        "step": step,
        "name": name,
        "rows": len(examples),
        "batch_size": batch_size,
        "decoding": dataclasses.asdict(decoding),
        "inputs": fingerprint(rows, len(examples)),
    }
    path = folder / f"{name}.jsonl"
    parts = PartFiles(folder, name, stamp)
    if not ranks.on_main(is_complete, path, stamp):
        started = time.monotonic()
        decode_all(
            decoder,
            rows,
            parts,
            batches=global_batches(lengths, batch_size),
            ranks=ranks,
            should_stop=should_stop,
            progress=progress,
            lockstep=lockstep,
        )
        seconds = time.monotonic() - started
        ranks.on_main(merge, parts, path, examples, chunked, ranks.world_size, seconds)
    metrics, notes = ranks.on_main(score, task, path, examples, chunked, settings)
    return SplitResult(task.name, split, metrics, notes | {"batch_size": batch_size}, path)


def task_decoding(task: Any, tokenizer: Any, settings: EvalSettings, max_target_length: int) -> Decoding:
    """How the task's targets are generated: a label task is cut at its longest label, </s> included."""
    own = task.decoding
    length = own.max_target_length or max_target_length
    if task.kind == "label" and task.labels and own.max_target_length is None:
        length = max(len(tokenizer(label).input_ids) for label in task.labels)
    # a task's minimum counts the decoder's start token, as transformers' `min_length` does
    return Decoding(length, own.num_beams or settings.num_beams, min_new_tokens=max(0, own.min_length - 1))


def stored_batch_size(
    settings: EvalSettings,
    folder: Path,
    name: str,
    decoder: Decoder,
    rows: Any,
    lengths: Sequence[int],
    ranks: RankGroup,
) -> int:
    """`eval.batch_size`, or (null) the size stored by an earlier evaluation of this folder, or the largest
    that fits, stored.
    """
    if settings.batch_size is not None:
        return settings.batch_size
    store = folder / BATCH_SIZES
    known = ranks.on_main(lambda: json.loads(store.read_text()) if store.is_file() else {})
    if name in known:
        return known[name]
    size = CPU_BATCH_SIZE
    if model_device(decoder.model).type != "cpu":
        longest = max(range(len(lengths)), key=lengths.__getitem__)
        # as long as a target may get: the shortest length allowed is the longest
        full = dataclasses.replace(decoder.decoding, min_new_tokens=decoder.decoding.max_new_tokens)
        probe = Decoder(decoder.model, decoder.tokenizer, full, decoder.scored, decoder.task_id, decoder.lockstep)
        size = find_batch_size(lambda count: probe([rows.row(longest)] * count, [longest] * count), ranks)

    def store_size() -> None:
        with atomic_writer(store) as stream:
            json.dump(known | {name: size}, stream, indent=1)

    ranks.on_main(store_size)
    return size


def fingerprint(rows: Any, count: int) -> str:
    """A checksum of the first `count` rows' ids and token ids: predictions are used again only for the very
    same inputs.
    """
    digest = hashlib.sha256()
    for number in range(count):
        row = rows.row(number)
        digest.update(f"{row.id}\t{row.input_ids}\n".encode())
    return digest.hexdigest()[:16]


def stamp_path(path: Path) -> Path:
    return path.with_suffix(".stamp.json")


def is_complete(path: Path, stamp: dict[str, Any]) -> bool:
    """Whether the predictions file is there, whole, and made with this stamp."""
    try:
        return path.is_file() and json.loads(stamp_path(path).read_text())["stamp"] == stamp
    except (OSError, json.JSONDecodeError, KeyError):
        return False


def merge(
    parts: PartFiles,
    path: Path,
    examples: Sequence[Any],
    chunked: bool,
    world_size: int,
    seconds: float,
    patience: float = 60.0,
) -> None:
    """Write the predictions file in row order from all part files, then its stamp, then drop the parts.

    Raises:
        RuntimeError: rows are missing (on a shared file system, after waiting for it to show them).
    """
    deadline = time.monotonic() + (patience if world_size > 1 else 0.0)
    while True:
        found = {item.row: item for batch in parts.finished().values() for item in batch}
        if len(found) == len(examples):
            break
        if time.monotonic() > deadline:
            raise RuntimeError(f"{path}: {len(examples) - len(found)} of {len(examples)} rows are in no part file")
        time.sleep(0.5)
    stamp_path(path).unlink(missing_ok=True)
    with atomic_writer(path) as stream:
        for row, example in enumerate(examples):
            stream.write(dumps(prediction_record(found[row], example, chunked)))
    with atomic_writer(stamp_path(path)) as stream:
        json.dump({"stamp": parts.stamp, "seconds": round(seconds, 3)}, stream, indent=1)
    for part in parts.existing():
        part.unlink()


def prediction_record(prediction: Prediction, example: Any, chunked: bool) -> dict[str, Any]:
    """One line of a predictions file: id, prediction, its tokens and target; for a chunk also its question
    and score.
    """
    record: dict[str, Any] = {"id": prediction.id, "prediction": prediction.text, "target": example.target}
    if chunked:
        record |= {"question": example.group, "score": prediction.score}
    return record | {"tokens": prediction.tokens}


def score(
    task: Any, path: Path, examples: Sequence[Any], chunked: bool, settings: EvalSettings
) -> tuple[dict[str, float], dict[str, Any]]:
    """Metrics and notes of a predictions file."""
    with path.open(encoding="utf-8") as lines:
        records = [json.loads(line) for line in lines]
    texts = [record["prediction"] for record in records]
    notes: dict[str, Any] = {"generated_tokens": sum(record["tokens"] for record in records) / len(records)}
    if chunked:
        answers, questions = answer_questions(records, examples, mean=settings.mrqa_score == "mean")
        texts, examples = list(answers.values()), list(questions.values())
        notes |= {
            "chunks": len(records),
            "empty_answers": sum(not text for text in texts),
            "chunk_score": settings.mrqa_score,
        }
        write_official(answers, path.with_suffix(".official.json"))
    scores = compute_scores(task, texts, examples)
    seconds = json.loads(stamp_path(path).read_text())["seconds"]
    return scores.metrics, scores.notes | notes | {"seconds": seconds}
