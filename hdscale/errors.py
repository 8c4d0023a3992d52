"""The one exception for a user's mistake, and the exit codes of every hdscale command."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

EXIT_DONE = 0
EXIT_USER_ERROR = 2
EXIT_PREEMPTED = 75
"""Pre-empted, checkpointed: run the same command again."""


class UserError(ValueError):
    """A mistake that the user can mend. One line that says what is wrong and how to mend it.

    Commands print it without a traceback and exit with 2.
    """


def nearest(word: str, known: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` for the known word nearest to `word`, or all known words where none is near."""
    known = [str(name) for name in known]
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    if close:
        return f"; did you mean '{close[0]}'?"
    return f"; known: {', '.join(sorted(known))}"
