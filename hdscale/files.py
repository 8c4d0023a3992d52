"""Files that are whole or not there: atomic writes, checksums, locks, JSON, and the one cache folder."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import filelock

from hdscale.errors import UserError


def cache_folder(chosen: str | None = None) -> Path:
    """The folder of everything that is made once per machine: tokenised data, checksums, compiled kernels.

    Args:
        chosen: a folder from the settings (`data.cache`); otherwise $HDSCALE_CACHE, else $XDG_CACHE_HOME/hdscale,
            else ~/.cache/hdscale.

    Raises:
        UserError: if it cannot be made or written.
    """
    named = chosen or os.environ.get("HDSCALE_CACHE")
    folder = Path(named) if named else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "hdscale"
    folder = folder.expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot make the cache folder {folder} ({error.strerror}); "
            "set data.cache or HDSCALE_CACHE to another folder"
        ) from error
    if not os.access(folder, os.W_OK):
        raise UserError(
            f"no permission to write to the cache folder {folder}; set data.cache or HDSCALE_CACHE to another folder"
        )
    return folder


def package_root() -> Path:
    """The folder that holds the package `hdscale` (the checkout, or site-packages)."""
    return Path(__file__).resolve().parents[1]


@contextlib.contextmanager
def atomic_path(path: str | Path, durable: bool = False) -> Iterator[Path]:
    """A temporary path beside `path`, renamed to it when the block ends without an error and removed otherwise.

    Args:
        durable: wait until the file and its name are on the disk.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        if durable:
            sync(temporary)
        temporary.replace(path)
        if durable:
            sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_writer(path: str | Path, durable: bool = False) -> Iterator[IO[str]]:
    """A UTF-8 text stream whose file appears under its name only when it is whole."""
    with atomic_path(path, durable) as temporary, temporary.open("w", encoding="utf-8", newline="\n") as stream:
        yield stream


def write_text(path: str | Path, text: str, durable: bool = False) -> None:
    """Write a text file, whole or not at all."""
    with atomic_writer(path, durable) as stream:
        stream.write(text)


def write_json(path: str | Path, value: Any, indent: int | None = 2, durable: bool = False) -> None:
    """Write a JSON file, whole or not at all."""
    write_text(path, json.dumps(value, indent=indent, ensure_ascii=False) + "\n", durable)


def json_line(record: Any) -> str:
    """A value as one line of a JSONL file, its line break included."""
    return json.dumps(record, ensure_ascii=False) + "\n"


def sync(path: str | Path) -> None:
    """Wait until a file's bytes, or a folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def locked(path: str | Path, timeout: float = -1) -> Iterator[None]:
    """Hold a lock file, which the kernel frees when its holder ends, however it ends.

    Args:
        timeout: seconds to wait for another holder; -1 waits as long as it takes, 0 does not wait.

    Raises:
        filelock.Timeout: if another process holds it for longer than that.
    """
    with filelock.FileLock(path, timeout=timeout):
        yield


def sha256(path: str | Path, progress: Callable[[int], None] | None = None) -> str:
    """SHA-256 of a file's bytes, in hexadecimal; `progress` is told how many bytes each piece had."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(8 << 20):
            digest.update(piece)
            if progress:
                progress(len(piece))
    return digest.hexdigest()


def remembered_sha256(path: str | Path, cache: Path) -> str:
    """SHA-256 of a file, remembered in the cache folder under the file's path, size and time of change.

    A data set of many gigabytes is read once, not at each start of each rank.
    """
    path = Path(path).resolve()
    stat = path.stat()
    return _remembered(str(path), stat.st_size, stat.st_mtime_ns, cache)


@functools.lru_cache(maxsize=4096)
def _remembered(path: str, size: int, changed: int, cache: Path) -> str:
    key = hashlib.sha256(f"{path}\0{size}\0{changed}".encode()).hexdigest()
    note = cache / "checksums" / key
    if note.is_file():
        digest = note.read_text()
        if len(digest) == 64:
            return digest
    digest = sha256(path)
    note.parent.mkdir(exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=note.parent, delete=False) as file:
        file.write(digest)
    os.replace(file.name, note)
    return digest
