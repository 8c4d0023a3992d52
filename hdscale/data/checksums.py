"""Where the cache is, and checksums of data files, computed once for each file and machine."""

from __future__ import annotations

import functools
import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from hdscale.data.settings import DataSettings
from hdscale.errors import UserError


def cache_folder(settings: DataSettings) -> Path:
    """`data.cache`, else $HDSCALE_CACHE, else ~/.cache/hdscale; made if it is not there.

    Raises:
        UserError: it cannot be written.
    """
    folder = Path(settings.cache or os.environ.get("HDSCALE_CACHE") or "~/.cache/hdscale").expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"no folder for tokenised data at {folder} ({error.strerror}); set data.cache to one"
        ) from error
    if not os.access(folder, os.W_OK):
        raise UserError(f"{folder}: no permission to write tokenised data there; set data.cache to another folder")
    return folder


def file_checksum(path: str | Path, settings: DataSettings) -> str:
    """SHA-256 of a file. Remembered in the cache under the file's place, size and time of change, so that a
    set of many gigabytes is read once, not at each start of each rank."""
    path = Path(path).resolve()
    stat = path.stat()
    return _remembered(str(path), stat.st_size, stat.st_mtime_ns, cache_folder(settings))


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


def sha256(path: str | Path, progress: Callable[[int], None] | None = None) -> str:
    """SHA-256 of a file's bytes, in hexadecimal; `progress` is told how many bytes each piece had."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(8 << 20):
            digest.update(piece)
            if progress:
                progress(len(piece))
    return digest.hexdigest()
