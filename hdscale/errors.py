"""The one exception for a user's mistake, and the exit codes of every hdscale command."""

from __future__ import annotations

import contextlib
import difflib
import os
import sys
from collections.abc import Callable, Iterable

EXIT_DONE = 0
EXIT_BROKEN = 1
"""Something broke that no change of the command would correct: a batch job starts again."""
EXIT_USER_ERROR = 2
EXIT_PREEMPTED = 75
"""Pre-empted, checkpointed: run the same command again."""


class UserError(ValueError):
    """A mistake that the user can correct. One line says what is wrong and how to correct it.

    Commands print it without a traceback and exit with 2.
    """


ERROR_FILE = "HDSCALE_ERROR_FILE"
"""Environment variable of a batch job: the file in which its ranks write down a user's mistake."""


def report(error: UserError, show: bool = True) -> None:
    """Print a user's mistake to stderr; in a batch job, write it down for the shell that decides on a requeue.

    That shell sees only the highest exit code of all ranks, and a rank that ends with 2 has the others killed.

    Args:
        show: print it; of several ranks one is enough.
    """
    if show:
        print(f"hdscale: error: {error}", file=sys.stderr, flush=True)
    path = os.environ.get(ERROR_FILE)
    if path:
        with contextlib.suppress(OSError), open(path, "a") as file:
            file.write(f"{error}\n")


def guarded(function: Callable[..., int], *arguments: object) -> int:
    """The exit code of a command; a user's mistake becomes one line on stderr and exit code 2."""
    try:
        return function(*arguments)
    except UserError as error:
        report(error)
        return EXIT_USER_ERROR
    except BrokenPipeError:
        return EXIT_DONE


def one_line(error: Exception | str) -> str:
    """A message without line breaks."""
    return " ".join(str(error).split())


def nearest(word: str, known: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` for the known word nearest to `word`, or all known words where none is near."""
    known = [str(name) for name in known]
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    if close:
        return f"; did you mean '{close[0]}'?"
    return f"; known: {', '.join(sorted(known))}"
