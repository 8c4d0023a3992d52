"""Examples as token ids: built once, kept in a cache that ranks map into memory together."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import operator
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import IO, Any

import numpy as np
from filelock import FileLock

from hdscale.data.batches import Row
from hdscale.data.settings import DataSettings
from hdscale.data.sources import load_split, reader, split_identity
from hdscale.data.task import Example, Task
from hdscale.errors import UserError
from hdscale.files import cache_folder

log = logging.getLogger(__name__)

FORMAT = 2
"""Version of the cache's layout and of the text-to-ids rules: old entries are left alone when it grows."""
BATCH_ROWS = 2000
MIN_VOCABULARY = 10
META = "meta.json"
COLUMNS = ("source", "target", "ids")
_FINGERPRINTS: weakref.WeakKeyDictionary[Any, tuple[int, str]] = weakref.WeakKeyDictionary()


def load_tokenizer(name: str | None, revision: str | None = None) -> Any:
    """A fast tokenizer from a folder or the hub; a folder with T5's `spiece.model` alone is enough.

    Args:
        name: folder or hub id (`model.tokenizer`, else `model.name`).

    Raises:
        UserError: there is none, or it needs its own program (never run).
    """
    # here, because tokenised splits are also read where no tokenizer is needed
    from transformers import AutoTokenizer

    advice = (
        "set model.tokenizer to a folder or hub id (T5's: google/t5-v1_1-base), or run `hdscale prepare "
        "--config F --to DIR` on a "
        "machine with internet and set model.tokenizer to the folder that it names"
    )
    if not name:
        raise UserError(f"no tokenizer is named; {advice}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, use_fast=True, trust_remote_code=False)
        # a folder with a config.json alone gives a tokenizer of special tokens, and no error
        if len(tokenizer.get_vocab().keys() - tokenizer.get_added_vocab().keys()) < MIN_VOCABULARY:
            raise ValueError("no vocabulary is there")
        return tokenizer
    except (OSError, ValueError, ImportError, KeyError) as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"no tokenizer can be loaded from '{name}' ({reason}); {advice}") from error


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """SHA-256 of what decides how a tokenizer cuts text: not its folder, nor how it was last called."""
    known = _FINGERPRINTS.get(tokenizer)
    # half a second for a large vocabulary, and asked for by every split
    if known and known[0] == len(tokenizer):
        return known[1]
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        # a call leaves its truncation and padding behind in the backend; every call of ours states its own
        described = json.loads(backend.to_str())
        described.pop("truncation", None)
        described.pop("padding", None)
    else:
        described = {"vocabulary": sorted(tokenizer.get_vocab().items())}
    described["special"] = {key: str(value) for key, value in sorted(tokenizer.special_tokens_map.items())}
    described["class"] = type(tokenizer).__name__
    fingerprint = hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()
    _FINGERPRINTS[tokenizer] = (len(tokenizer), fingerprint)
    return fingerprint


class TokenizedSplit:
    """A split as token ids, memory-mapped: rows of any number in the memory of the few that are looked at.

    Attributes:
        task: the task's name.
        split: `train`, `validation` or `test`.
        source_lengths, target_lengths: int64 [rows], tokens of each row, `</s>` included.
        counts: rows whose source or target is cut (`source_cut`, `target_cut`, at `source_length` and `target_length`
            tokens), and rows with unknown characters (`unknown`).
    """

    def __init__(self, folder: Path) -> None:
        """Open a cache entry.

        Raises:
            ValueError: it is incomplete: a file is missing or has another size than recorded.
        """
        try:
            meta = json.loads((folder / META).read_text())
            sizes = {name: (folder / name).stat().st_size for name in meta["files"]}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{folder}: {error}") from error
        if sizes != meta["files"]:
            raise ValueError(f"{folder}: file sizes differ from those noted")
        self.folder = folder
        self.task: str = meta["task"]
        self.split: str = meta["split"]
        self._length: int = meta["rows"]
        self.counts: dict[str, int] = meta["counts"]
        self._values = {name: map_file(folder / f"{name}.bin", meta["dtypes"][name]) for name in COLUMNS}
        self._ends = {name: map_file(folder / f"{name}_ends.bin", "int64") for name in COLUMNS}

    def __len__(self) -> int:
        return self._length

    @property
    def source_lengths(self) -> np.ndarray:
        """Tokens of each row's source."""
        return np.diff(self._ends["source"], prepend=0)

    @property
    def target_lengths(self) -> np.ndarray:
        """Tokens of each row's target."""
        return np.diff(self._ends["target"], prepend=0)

    def row(self, index: int, task_id: int = 0) -> Row:
        """One row, with the id that its task has in the run."""
        return Row(
            input_ids=self._cell("source", index).tolist(),
            labels=self._cell("target", index).tolist(),
            task_id=task_id,
            id=self.row_id(index),
            task=self.task,
        )

    def row_id(self, index: int) -> str:
        """The example's id."""
        return self._cell("ids", index).tobytes().decode()

    def _cell(self, name: str, index: int) -> np.ndarray:
        if not 0 <= index < self._length:
            raise IndexError(f"row {index} of {self._length}")
        ends = self._ends[name]
        return self._values[name][ends[index - 1] if index else 0 : ends[index]]


def map_file(path: Path, dtype: str) -> np.ndarray:
    """A file of numbers as a read-only array (an empty file cannot be mapped)."""
    if path.stat().st_size == 0:
        return np.empty(0, dtype=dtype)
    # a plain view of the mapping: numpy's own class makes each small slice several times as slow
    return np.asarray(np.memmap(path, dtype=dtype, mode="r"))


def tokenized_split(task: Task, split: str, tokenizer: Any, settings: DataSettings) -> TokenizedSplit:
    """A split as token ids, from the cache, or built into it.

    The first process that comes builds, under a file lock; the others wait and map the same files. The entry
    appears by a rename, complete or not at all; an incomplete one (a full disk, a copied cache) is built again.

    Raises:
        UserError: a row that cannot be used, a cache that cannot be written, lengths below 2 tokens.
    """
    settings.validate("data.")
    key = cache_key(task, split, tokenizer, settings)
    folder = cache_folder(settings.cache) / "tokenized" / f"{task.name}.{split}.{key[:20]}"
    with contextlib.suppress(ValueError):
        return TokenizedSplit(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(folder.with_name(f"{folder.name}.lock")) as alone:
        try:
            return TokenizedSplit(folder)
        except ValueError:
            if folder.exists():
                log.warning("the tokenised data in %s are incomplete; building them again", folder)
        return build(folder, task, split, tokenizer, settings, alone)


def cache_key(task: Task, split: str, tokenizer: Any, settings: DataSettings) -> str:
    """SHA-256 of everything that decides the token ids: declaration, content of the files, tokenizer,
    lengths."""
    declared = dataclasses.asdict(task)
    for name in ("metrics", "rouge_tokenizer", "decoding", "sizes", "repo", "configs", "revision", "files", "splits"):
        declared.pop(name)
    declared["reader"] = reader(task).name
    content = {
        "format": FORMAT,
        "task": declared,
        "split": [split, dataclasses.asdict(task.splits[split])] if split in task.splits else None,
        "data": split_identity(task, split, settings),
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "lengths": [settings.max_source_length, settings.max_target_length],
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


@contextlib.contextmanager
def locked(path: Path) -> Iterator[bool]:
    """Hold a lock on `path` that the system frees when its holder dies; gives whether it is held.

    On a file system without locks the body just runs: several processes may then build the same entry, each
    in its own folder, and the first rename wins.
    """
    lock = FileLock(path)
    try:
        lock.acquire()
    except (NotImplementedError, OSError) as error:
        log.warning("no file lock at %s (%s); continuing without", path, error)
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def build(folder: Path, task: Task, split: str, tokenizer: Any, settings: DataSettings, alone: bool) -> TokenizedSplit:
    """Tokenise a split into `folder`, by way of a temporary one beside it.

    Args:
        alone: no other process builds this entry now, so that temporary folders are those of killed ones.
    """
    log.info("tokenising %s %s", task.name, split)
    if alone:
        for leftover in folder.parent.glob(f".{folder.name}.*"):
            shutil.rmtree(leftover, ignore_errors=True)
    try:
        made = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
        try:
            write(made, task, split, load_split(task, split, settings, tokenizer), tokenizer, settings)
            made.chmod(0o755)
            with contextlib.suppress(ValueError):
                return TokenizedSplit(folder)  # without locks another process may have been faster
            shutil.rmtree(folder, ignore_errors=True)
            os.rename(made, folder)
        finally:
            shutil.rmtree(made, ignore_errors=True)
    except OSError as error:
        raise UserError(
            f"tokenised data cannot be written to {folder.parent} ({error.strerror or error}); free some "
            "space, or set data.cache"
        ) from error
    return TokenizedSplit(folder)


def write(
    folder: Path, task: Task, split: str, examples: Iterable[Example], tokenizer: Any, settings: DataSettings
) -> None:
    """Write the columns of a cache entry, in bounded memory, and at last what a reader checks."""
    narrow = "uint16" if len(tokenizer) <= 1 << 16 else "int32"
    dtypes = {"source": narrow, "target": narrow, "ids": "uint8"}
    with contextlib.ExitStack() as stack:
        files = {name: Column(folder, name, dtype, stack) for name, dtype in dtypes.items()}
        counts = {"source_length": settings.max_source_length, "target_length": settings.max_target_length}
        counts |= dict.fromkeys(("source_cut", "target_cut", "unknown"), 0)
        rows = iter(examples)
        while batch := list(islice(rows, BATCH_ROWS)):
            sources, cut = source_ids(tokenizer, batch, settings.max_source_length)
            targets, cut_targets = encode(tokenizer, [row.target for row in batch], settings.max_target_length)
            counts["source_cut"] += cut
            counts["target_cut"] += cut_targets
            unknown = tokenizer.unk_token_id
            counts["unknown"] += sum(unknown in ids for ids in map(operator.add, sources, targets))
            files["source"].extend(sources)
            files["target"].extend(targets)
            files["ids"].extend([np.frombuffer(row.id.encode(), dtype=np.uint8) for row in batch])
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    meta = {"task": task.name, "split": split, "rows": files["ids"].rows, "dtypes": dtypes, "files": sizes}
    meta["counts"] = counts
    with open(folder / META, "w") as file:
        json.dump(meta, file)
        sync(file)


def source_ids(tokenizer: Any, examples: list[Example], length: int) -> tuple[list[list[int]], int]:
    """(token ids of the sources, how many are cut); chunks, which were cut by tokens already, stay as they are."""
    ids, cut = encode(tokenizer, [row.source for row in examples if row.input_ids is None], length)
    encoded = iter(ids)
    return [next(encoded) if row.input_ids is None else list(row.input_ids) for row in examples], cut


def encode(tokenizer: Any, texts: list[str], length: int) -> tuple[list[list[int]], int]:
    """(token ids of texts, cut at `length` with `</s>` kept as the last; how many are cut)."""
    if not texts:
        return [], 0
    encoded = tokenizer(texts, truncation=True, max_length=length, padding=False, return_attention_mask=False)
    if encoded.encodings:
        return encoded["input_ids"], sum(bool(one.overflowing) for one in encoded.encodings)
    # a slow tokenizer does not say: those that are as long as may be are read once more
    longest = [text for text, ids in zip(texts, encoded["input_ids"], strict=True) if len(ids) == length]
    whole = tokenizer(longest, return_attention_mask=False)["input_ids"] if longest else []
    return encoded["input_ids"], sum(len(ids) > length for ids in whole)


class Column:
    """A file of numbers of all rows, end to end, and a file of where each row ends."""

    def __init__(self, folder: Path, name: str, dtype: str, stack: contextlib.ExitStack) -> None:
        self.dtype, self.rows, self._end = dtype, 0, 0
        self._values = stack.enter_context(open(folder / f"{name}.bin", "wb"))
        self._ends = stack.enter_context(open(folder / f"{name}_ends.bin", "wb"))
        stack.callback(sync, self._values)
        stack.callback(sync, self._ends)

    def extend(self, rows: list[Any]) -> None:
        """Append rows of numbers."""
        ends = self._end + np.cumsum([len(row) for row in rows], dtype=np.int64)
        self._values.write(np.concatenate([np.asarray(row, dtype=self.dtype) for row in rows]).tobytes())
        self._ends.write(ends.tobytes())
        self._end, self.rows = int(ends[-1]), self.rows + len(rows)


def sync(file: IO[Any]) -> None:
    """Bring a file's content to the disk: a rename must never be there before it."""
    file.flush()
    os.fsync(file.fileno())
