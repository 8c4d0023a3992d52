"""The table of a study's runs: printed once, or kept up to date."""

from __future__ import annotations

import time
from collections import Counter

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from hdscale.study.rows import average_shown
from hdscale.study.store import RunStatus, Store
from hdscale.study.submit import live_runs

STYLES = {"done": "green", "running": "bold", "failed": "red", "interrupted": "yellow"}
LIVE_SECONDS = 1.0


def statuses(store: Store) -> dict[str, RunStatus]:
    """The state of every run of the study in a folder."""
    runs = store.read()["runs"]
    queued = live_runs(store)
    found = {}
    for name, run in runs.items():
        config = run["config"]
        status = store.status(name, 0 if config.get("train.epochs") else int(config["train.max_steps"]))
        if name in queued and status.state != "done":
            status = RunStatus(
                queued[name], status.step, status.max_steps, status.failures, status.loss, status.seconds
            )
        found[name] = status
    return found


def status_table(store: Store) -> Group:
    """One line per run, and one for all."""
    found = statuses(store)
    table = Table(title=store.read()["title"], title_justify="left")
    table.add_column("run", no_wrap=True)
    table.add_column("state")
    for column in ("step", "loss", "average", "time"):
        table.add_column(column, justify="right")
    table.add_column("failures", justify="right")
    table.add_column("note", overflow="fold")
    for name, status in found.items():
        average = average_shown(status.results) if status.results else ""
        table.add_row(
            name,
            Text(status.state, STYLES.get(status.state, "")),
            f"{status.step}/{status.max_steps}" if status.max_steps else str(status.step),
            "" if status.loss is None else f"{status.loss:.3f}",
            average,
            "" if status.seconds is None else clock(status.seconds),
            str(status.failures or ""),
            status.note,
        )
    counts = Counter(status.state for status in found.values())
    words = ", ".join(f"{count} {state}" for state, count in counts.most_common())
    return Group(table, Text(f"{len(found)} runs: {words}"))


def show_status(store: Store, console: Console | None = None) -> int:
    """Print the table; on a terminal keep it up to date until nothing runs any more (or Ctrl-C)."""
    # rows must not be cut where the output goes to a file
    console = console or Console()
    if not console.is_terminal:
        Console(width=max(140, console.width)).print(status_table(store))
        return 0
    try:
        with Live(status_table(store), console=console, auto_refresh=False) as live:
            while any(status.state in ("running", "queued") for status in statuses(store).values()):
                time.sleep(LIVE_SECONDS)
                live.update(status_table(store), refresh=True)
    except KeyboardInterrupt:
        pass
    return 0


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss or m:ss."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
