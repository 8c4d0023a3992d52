"""The lines of a report, written by a stage as it goes: what it has found is kept when it is cut off or crashes."""

from __future__ import annotations

import contextlib
import json
import sys
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hdscale.errors import one_line

PASSED, FAILED = "passed", "failed"
NOT_POSSIBLE, NOT_FINISHED = "not possible here", "not finished"
BEGUN = "begun"
LONGEST = 500
"""Characters of a reason."""
MOST_OUTPUT = 30
"""Lines of a traceback or of a process's output that are kept."""


class Wrong(Exception):
    """A check has failed; the message says what was expected and what was found.

    Attributes:
        output: the last lines of a process that failed.
    """

    def __init__(self, message: str, output: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.output = list(output)


class NotPossible(Exception):
    """A check cannot be made on this machine; the message says why."""


@dataclass
class Line:
    """One line of the report.

    Attributes:
        name: what was checked. state: passed, failed, not possible here, not finished. detail: what was found, or why.
        values: numbers for programs; `table`, a list of rows, is also shown to people; `output` is what a process or a
            traceback has said.
    """

    name: str
    state: str
    detail: str = ""
    values: dict[str, Any] = field(default_factory=dict)


@dataclass
class Finding:
    """What a check that passes has to say."""

    detail: str = ""
    values: dict[str, Any] = field(default_factory=dict)

    def say(self, detail: str, **values: Any) -> None:
        """What was found, in words and in numbers."""
        self.detail = detail
        self.values |= values


class Lines:
    """Writes a stage's lines to a file of JSON lines.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @contextlib.contextmanager
    def check(self, name: str) -> Iterator[Finding]:
        """One check, which becomes one line: failed where its block raises, with what it has said so far in the values.

        What is not expected leaves its traceback.
        """
        self._write({"name": name, "state": BEGUN})
        finding = Finding()
        state, detail = PASSED, None
        try:
            yield finding
        except NotPossible as reason:
            state, detail = NOT_POSSIBLE, str(reason)
        except Wrong as error:
            state, detail = FAILED, str(error)
            if error.output:
                finding.values["output"] = error.output
        except Exception as error:
            traceback.print_exc(file=sys.stderr)
            out_of_memory = type(error).__name__ == "OutOfMemoryError"
            state = NOT_POSSIBLE if out_of_memory else FAILED
            detail = f"{type(error).__name__}: {error}"
            finding.values["output"] = traceback.format_exc().splitlines()[-MOST_OUTPUT:]
        text = one_line(finding.detail if detail is None else detail)[:LONGEST]
        self._write(asdict(Line(name, state, text, finding.values)))

    def _write(self, record: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(record, default=str) + "\n")


def read_lines(path: Path) -> tuple[list[Line], str | None]:
    """The lines of a stage, and the check that it had begun and not finished, if any."""
    found: list[Line] = []
    begun = None
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            record = json.loads(text)
        except ValueError:
            continue  # the process was killed while it wrote this line
        if record["state"] == BEGUN:
            begun = record["name"]
        else:
            found.append(Line(**record))
            begun = None
    return found, begun
