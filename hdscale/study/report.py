"""`hdscale study report`: one self-contained HTML page, with the pictures as PNG and the numbers as CSV beside it."""

from __future__ import annotations

import html
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

from hdscale.errors import UserError
from hdscale.files import write_text
from hdscale.report.page import figure, heading, link, number_cell, page, quiet, table
from hdscale.report.pictures import Picture
from hdscale.runs.folder import CONFIG, METRICS, RESULTS
from hdscale.study import figures
from hdscale.study.forecast import predict_run
from hdscale.study.rows import RunRow, axes_of, budget_axes, moved_keys, read_rows, seed_axes, splits_of, write_csv
from hdscale.study.status import statuses
from hdscale.study.store import RunStatus, Store

COLUMNS: tuple[tuple[str, Callable[[RunRow], float | None], str], ...] = (
    ("parameters", lambda row: row.parameters, "{:,.0f}"),
    ("trainable", lambda row: row.trainable, "{:,.0f}"),
    ("share, %", lambda row: row.percent, "{:.2f}"),
    ("average", lambda row: row.average, "{:.2f}"),
    ("training loss", lambda row: row.loss, "{:.3f}"),
    ("steps", lambda row: row.steps, "{:,}"),
    ("rows seen", lambda row: row.samples, "{:,.0f}"),
    ("PFLOP", lambda row: row.flops and row.flops / 1e15, "{:.3g}"),
    ("training, s", lambda row: row.seconds, "{:,.0f}"),
    ("device-hours", lambda row: row.device_hours, "{:.3g}"),
    ("rows/s", lambda row: row.samples_per_second, "{:.3g}"),
    ("memory, GB", lambda row: row.memory_gb, "{:.2f}"),
)


def write_report(store: Store) -> Path:
    """Write `<study>/report/`: index.html, runs.csv and a PNG for each picture.

    Returns:
        the page.

    Raises:
        UserError: if no run of the study is done, or the folder cannot be written.
    """
    record = store.read()
    found = statuses(store)
    rows = read_rows(store, predict_run)
    if not rows:
        raise UserError(f"no run of {store.folder} is done yet; see hdscale study {store.folder} --status")
    pictures, missing = draw(rows, record["runs"])
    folder = store.folder / "report"
    try:
        folder.mkdir(exist_ok=True)
        for old in folder.glob("*.png"):
            old.unlink()
        write_csv(rows, folder / "runs.csv")
        shown = [(picture, picture.png()) for picture in pictures]
        for picture, png in shown:
            (folder / f"{picture.name}.png").write_bytes(png)
        write_text(folder / "index.html", page_of(record["title"], found, rows, shown, missing))
    except OSError as error:
        raise UserError(f"cannot write to {folder} ({error.strerror}); correct its permissions") from error
    return folder / "index.html"


def draw(rows: list[RunRow], runs: dict[str, dict[str, Any]]) -> tuple[list[Picture], list[str]]:
    """The pictures that the rows are enough for, and the names of the others."""
    moved = moved_keys(runs)
    seeds = seed_axes(moved)
    sizes = axes_of(moved, "model.name")
    budgets = budget_axes(moved)
    data = axes_of(moved, "data.fraction", "data.tasks", "train.max_steps", "train.epochs")
    methods = axes_of(moved, "method.name")

    def group(*own: list[str]) -> Callable[[RunRow], str]:
        """The points of all other axes: what a colour stands for."""
        hidden = {axis for part in own for axis in part} | set(seeds)
        return lambda row: " · ".join(point for axis, point in row.point.items() if axis not in hidden) or "all runs"

    wanted: list[tuple[str, Picture | None]] = []
    by_x = (
        (figures.PARAMETERS, group(sizes)),
        (figures.TRAINABLE, group(budgets or sizes)),
        (figures.SAMPLES, group(data)),
        (figures.FLOPS, group(sizes, data)),
    )
    for x, colours in by_x:
        for y in (figures.LOSS, figures.ERROR):
            wanted.append((f"{y.name} against {x.name}", figures.scaling(rows, x, y, colours)))
    if tasks := axes_of(moved, "data.tasks"):
        picture = figures.scaling(rows, figures.TASKS, figures.COMMON, group(tasks))
        wanted.append(("error on common tasks against number of tasks", picture))
    for quantity in (figures.THROUGHPUT, figures.MEMORY):
        wanted.append((f"{quantity.name} against model size", figures.against_plan(rows, quantity, group(sizes))))
    if methods:
        picture = figures.side_by_side(rows, group(methods), lambda row: by_axes(row, methods))
        wanted.append(("methods side by side", picture))
    wanted.append(("Pareto front", figures.pareto_front(rows, group([]))))
    pictures = [picture for _, picture in wanted if picture is not None]
    missing = [name for name, picture in wanted if picture is None]
    return pictures, missing


def by_axes(row: RunRow, axes: list[str]) -> str:
    """A row's points on some axes."""
    return " · ".join(row.point[axis] for axis in axes)


def page_of(
    title: str,
    found: dict[str, RunStatus],
    rows: list[RunRow],
    shown: list[tuple[Picture, bytes]],
    missing: list[str],
) -> str:
    """The page of a study."""
    counts = Counter(status.state for status in found.values())
    hours = sum(row.device_hours for row in rows)
    devices = ", ".join(f"{count} runs on {name}" for name, count in Counter(row.device for row in rows).items())
    parts = [
        quiet(
            f"{len(found)} runs: {', '.join(f'{n} {state}' for state, n in counts.most_common())}. "
            f"{hours:.3g} device-hours of training; {html.escape(devices)}. Written {time.strftime('%Y-%m-%d %H:%M')}. "
            f"All numbers: {link('runs.csv', 'runs.csv')}."
        ),
        *(figure(picture, png) for picture, png in shown),
    ]
    if len({row.split for row in rows}) > 1:
        without = ", ".join(html.escape(row.name) for row in rows if row.split == "validation")
        parts.append(
            quiet(f"Not comparable: these runs have validation scores only, the others test scores: {without}.")
        )
    if missing:
        names = html.escape(", ".join(missing))
        parts.append(quiet(f"Not drawn, since this study does not vary or record it: {names}."))
    return page(title, [*parts, heading("Runs"), table_of(found, rows)])


def table_of(found: dict[str, RunStatus], rows: list[RunRow]) -> str:
    """All runs, with links to their configurations, results and logs."""
    by_name = {row.name: row for row in rows}
    split = splits_of(rows)
    names = [f"{split} average" if name == "average" else name for name, _, _ in COLUMNS]
    header = [f'<th class="number">{html.escape(name)}</th>' for name in names]
    lines = []
    for name, status in found.items():
        row = by_name.get(name)
        folder = f"../{quote(name)}"
        links = [link(f"{folder}/{CONFIG}", "config")] if row or status.step else []
        if row is None:
            note = html.escape(status.note or f"step {status.step}")
            kind = "failed" if status.state == "failed" else ""
            cells = f'<td colspan="{len(COLUMNS) + 1}" class="{kind}">{html.escape(status.state)}: {note}</td>'
        else:
            links += [link(f"{folder}/{RESULTS}", "results"), link(f"{folder}/{METRICS}", "metrics")]
            cells = "".join(number_cell(read(row), form) for _, read, form in COLUMNS)
            cells += f"<td>{html.escape(row.scores_of)}</td>"
        lines.append(f"<td>{html.escape(name)}</td>{cells}<td>{' '.join(links)}</td>")
    return table(["<th>run</th>", *header, "<th>scores of</th>", "<th>files</th>"], lines)
