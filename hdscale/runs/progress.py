"""Progress bars of a command: rows done of all rows, rows per second, time left."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text


class RateColumn(ProgressColumn):
    """Rows per second."""

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:.0f} rows/s" if task.speed else "")


class RowProgress:
    """One bar for each name, on standard error. It shows nothing where standard error is not a terminal.

    Args:
        show: False shows nothing anywhere (`--quiet`, ranks other than 0).
        console: of standard error; lines printed to it appear above the bars.
    """

    def __init__(self, show: bool = True, console: Console | None = None) -> None:
        console = console or Console(stderr=True)
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            RateColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not (show and console.is_terminal),
        )
        self._ids: dict[str, TaskID] = {}

    def __enter__(self) -> RowProgress:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def __call__(self, name: str, done: int, total: int | None) -> None:
        """`done` rows of `total` are done (None: the number is unknown)."""
        if self._bars.disable:
            return
        if name not in self._ids:
            self._ids[name] = self._bars.add_task(name, total=total)
        self._bars.update(self._ids[name], completed=done)
