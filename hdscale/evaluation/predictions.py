"""The files of one split's predictions.

    <task>.<split>.jsonl             one line per row (per chunk, for MRQA), in the order of the split
    <task>.<split>.stamp.json        what they were made from, and the seconds that decoding took
    <task>.<split>.official.json     MRQA: what the shared task's evaluator reads
    <task>.<split>.part<rank>.jsonl  while ranks decode: the stamp, then one line per finished batch

An incomplete line is a batch that was not finished. Rank 0 merges the parts in the order of the rows.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hdscale.data.tasks import Example
from hdscale.evaluation.generation import Prediction, SourceRow, SplitRows
from hdscale.files import atomic_writer, json_line, write_json

SHARED_FILES_SECONDS = 60.0
"""A shared file system may show what another rank wrote only after a while; rank 0 waits this long for it."""


class PredictionFiles:
    """The predictions of one split: those of an interrupted evaluation are kept, as long as the stamp is the same.

    Args:
        folder: where the files are.
        name: `<task>.<split>`.
        stamp: everything that decides what the predictions are (the model's step, the rows, the batch size, ...).
    """

    def __init__(self, folder: Path, name: str, stamp: dict[str, Any]) -> None:
        self.folder, self.name, self.stamp = folder, name, stamp
        self.path = folder / f"{name}.jsonl"
        self.stamp_path = folder / f"{name}.stamp.json"
        self.official_path = folder / f"{name}.official.json"

    def is_complete(self) -> bool:
        """Whether the predictions are there, all of them, and made with this stamp."""
        try:
            return self.path.is_file() and json.loads(self.stamp_path.read_text())["stamp"] == self.stamp
        except (OSError, json.JSONDecodeError, KeyError):
            return False

    def records(self) -> list[dict[str, Any]]:
        """The lines of the complete predictions."""
        with self.path.open(encoding="utf-8") as lines:
            return [json.loads(line) for line in lines]

    def seconds(self) -> float:
        """Time that decoding took, in the session that finished it."""
        return float(json.loads(self.stamp_path.read_text())["seconds"])

    def part(self, rank: int | str) -> Path:
        """The part file of a rank."""
        return self.folder / f"{self.name}.part{rank}.jsonl"

    def parts(self) -> list[Path]:
        """The part files that exist."""
        return sorted(self.folder.glob(f"{self.name}.part*.jsonl"))

    def finished_batches(self) -> dict[int, list[Prediction]]:
        """{batch number: predictions} of all parts with this stamp; incomplete lines and other stamps are left out."""
        batches: dict[int, list[Prediction]] = {}
        for path in self.parts():
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

    def gather_finished(self) -> list[int]:
        """Move what interrupted evaluations with this stamp have finished into one part file, and remove all others.

        Returns:
            the numbers of the finished batches.
        """
        batches, old = self.finished_batches(), self.parts()
        earlier = self.part("-earlier")
        if batches:
            with atomic_writer(earlier, durable=True) as stream:
                stream.write(json_line(self.stamp))
                for batch in sorted(batches):
                    stream.write(batch_line(batch, batches[batch]))
        for path in old:
            if not (batches and path == earlier):
                path.unlink()
        return sorted(batches)

    def merge(self, examples: Sequence[Example], chunked: bool, seconds: float, patience: float = 0.0) -> None:
        """Write the predictions in the order of the rows, then their stamp; then remove the parts.

        Args:
            examples: one for each row.
            chunked: they are chunks of questions.
            seconds: that decoding took.
            patience: seconds to wait for parts that a shared file system does not show yet.

        Raises:
            RuntimeError: rows are missing.
        """
        deadline = time.monotonic() + patience
        while True:
            found = {item.row: item for batch in self.finished_batches().values() for item in batch}
            if len(found) == len(examples):
                break
            if time.monotonic() > deadline:
                missing = len(examples) - len(found)
                raise RuntimeError(f"{self.path}: {missing} of {len(examples)} rows are in no part file")
            time.sleep(0.5)
        self.stamp_path.unlink(missing_ok=True)
        with atomic_writer(self.path, durable=True) as stream:
            for row, example in enumerate(examples):
                stream.write(json_line(prediction_record(found[row], example, chunked)))
        write_json(self.stamp_path, {"stamp": self.stamp, "seconds": round(seconds, 3)}, indent=1, durable=True)
        for part in self.parts():
            part.unlink()


def batch_line(batch: int, predictions: Sequence[Prediction]) -> str:
    """The line of a finished batch in a part file."""
    return json_line({"batch": batch, "rows": [dataclasses.astuple(prediction) for prediction in predictions]})


def prediction_record(prediction: Prediction, example: Example, chunked: bool) -> dict[str, Any]:
    """One line of the predictions: id, prediction, target and tokens; for a chunk also its question and score."""
    record: dict[str, Any] = {"id": prediction.id, "prediction": prediction.text, "target": example.target}
    if chunked:
        record |= {"question": example.group, "score": prediction.score}
    return record | {"tokens": prediction.tokens}


def fingerprint(rows: SplitRows[SourceRow], count: int) -> str:
    """A checksum of the first `count` rows' ids and token ids: predictions are reused only for the very same inputs."""
    digest = hashlib.sha256()
    for number in range(count):
        row = rows.row(number)
        digest.update(f"{row.id}\t{row.input_ids}\n".encode())
    return digest.hexdigest()[:16]
