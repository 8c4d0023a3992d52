"""What `hdscale predict` reads from and writes to: files, or standard input and output."""

from __future__ import annotations

import contextlib
import gzip
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, cast

from hdscale.errors import UserError


def open_input(name: str) -> IO[bytes]:
    """A stream of bytes: standard input for `-`, decompressed for a name that ends with `.gz`.

    Raises:
        UserError: there is no such file.
    """
    if name == "-":
        return sys.stdin.buffer
    path = Path(name)
    if not path.is_file():
        raise UserError(f"--input {name}: no such file")
    return cast(IO[bytes], gzip.open(path, "rb")) if path.suffix == ".gz" else path.open("rb")


def check_output(output: str, source: str, overwrite: bool) -> None:
    """Raise UserError if the output cannot be written, or exists and is not to be replaced; called before any work."""
    if output == "-":
        return
    path = Path(output)
    if path.is_dir() or not path.parent.is_dir():
        raise UserError(f"--output {output}: {'is a folder' if path.is_dir() else f'no folder {path.parent}'}")
    if source != "-" and path.resolve() == Path(source).resolve():
        raise UserError(f"--output {output}: is also the input; give another name")
    if path.is_file() and path.stat().st_size and not overwrite:
        raise UserError(f"--output {output}: exists; replace it by --overwrite, or give another name")
    try:
        with partial_path(path).open("a"):
            pass
        partial_path(path).unlink()
    except OSError as error:
        raise UserError(f"--output {output}: cannot be written ({error.strerror})") from error


def partial_path(path: Path) -> Path:
    """Where predictions are until all of them are written."""
    return path.with_name(path.name + ".partial")


@contextlib.contextmanager
def open_output(output: str) -> Iterator[IO[str]]:
    """A stream for the predictions: standard output for `-`.

    A file is called `NAME.partial` until everything is in it. It stays after an error: what it holds is good.
    """
    if output == "-":
        yield sys.stdout
        sys.stdout.flush()
        return
    path = Path(output)
    try:
        with partial_path(path).open("w", encoding="utf-8", newline="\n") as stream:
            yield stream
    except UserError as error:
        raise UserError(f"{error} (predictions so far: {partial_path(path)})") from error
    except OSError as error:
        raise UserError(f"{partial_path(path)}: {error.strerror or error}; free some space and run again") from error
    partial_path(path).replace(path)
