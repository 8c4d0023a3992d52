"""`hdscale study report`: one self-contained HTML page, with the pictures as PNG and the numbers as CSV beside it."""

from __future__ import annotations

import base64
import html
import io
import math
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote

from hdscale.errors import UserError
from hdscale.study import figures
from hdscale.study.figures import Picture
from hdscale.study.forecast import predict_run
from hdscale.study.rows import Row, axes_of, budget_axes, moved_keys, read_rows, seed_axes, write_csv
from hdscale.study.status import statuses
from hdscale.study.store import RunStatus, Store

STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #1a1a1a; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: 0; } h2 { font-size: 1.15rem; margin: 2.2rem 0 0.4rem; }
p.quiet, .notes { color: #555; font-size: 0.87rem; } .notes { margin: 0.2rem 0 0 1.2rem; padding: 0; }
figure { margin: 0; } figure img { max-width: 100%; height: auto; display: block; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: 0.85rem; white-space: nowrap; }
th, td { padding: 0.25rem 0.7rem; border-bottom: 1px solid #ddd; text-align: left; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
.failed { color: #a33000; } a { color: #00558c; }
"""

COLUMNS: tuple[tuple[str, Callable[[Row], float | None], str], ...] = (
    ("parameters", lambda row: row.parameters, "{:,.0f}"),
    ("trainable", lambda row: row.trainable, "{:,.0f}"),
    ("share, %", lambda row: row.percent, "{:.2f}"),
    ("test average", lambda row: row.average, "{:.2f}"),
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
        shown = [(picture, png_of(picture)) for picture in pictures]
        for picture, png in shown:
            (folder / f"{picture.name}.png").write_bytes(png)
        page = folder / "index.html"
        temporary = folder / ".index.tmp"
        temporary.write_text(page_of(record["title"], found, rows, shown, missing), encoding="utf-8")
        temporary.replace(page)
    except OSError as error:
        raise UserError(f"cannot write to {folder} ({error.strerror}); mend its permissions") from error
    return page


def draw(rows: list[Row], runs: dict[str, dict]) -> tuple[list[Picture], list[str]]:
    """The pictures that the rows can carry, and a line for each that they cannot."""
    moved = moved_keys(runs)
    seeds = seed_axes(moved)
    sizes = axes_of(moved, "model.name")
    budgets = budget_axes(moved)
    data = axes_of(moved, "data.fraction", "data.tasks", "train.max_steps", "train.epochs")
    methods = axes_of(moved, "method.name")

    def group(*own: list[str]) -> Callable[[Row], str]:
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
    wanted.append(
        (
            "throughput against model size",
            figures.against_plan(
                rows, "samples_per_second", "planned_samples_per_second",
                "training throughput (rows per second, all ranks)", "Throughput against model size", group(sizes),
            ),
        )
    )  # fmt: skip
    wanted.append(
        (
            "memory against model size",
            figures.against_plan(
                rows,
                "memory_gb",
                "planned_memory_gb",
                "memory of a rank (GB)",
                "Memory against model size",
                group(sizes),
            ),
        )
    )
    if methods:
        wanted.append(
            ("methods side by side", figures.side_by_side(rows, group(methods), lambda r: by_axes(r, methods)))
        )
    wanted.append(("Pareto front", figures.pareto_front(rows, group([]))))
    pictures = [picture for _, picture in wanted if picture is not None]
    missing = [name for name, picture in wanted if picture is None]
    return pictures, missing


def by_axes(row: Row, axes: list[str]) -> str:
    """A row's points on some axes."""
    return " · ".join(row.point[axis] for axis in axes)


def png_of(picture: Picture) -> bytes:
    """The picture as a PNG."""
    buffer = io.BytesIO()
    # without a date and a version in it, the same study gives the same file
    picture.figure.savefig(buffer, format="png", dpi=150, metadata={"Software": None})
    return buffer.getvalue()


def page_of(
    title: str,
    found: dict[str, RunStatus],
    rows: list[Row],
    shown: list[tuple[Picture, bytes]],
    missing: list[str],
) -> str:
    """The page, whole: style and pictures inside."""
    counts = Counter(status.state for status in found.values())
    hours = sum(row.device_hours for row in rows)
    devices = ", ".join(f"{count} runs on {name}" for name, count in Counter(row.device for row in rows).items())
    parts = [
        "<!doctype html>",
        f'<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>',
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head><body>',
        f"<h1>{html.escape(title)}</h1>",
        f'<p class="quiet">{len(found)} runs: {", ".join(f"{n} {state}" for state, n in counts.most_common())}. '
        f"{hours:.3g} device-hours of training; {html.escape(devices)}. Written {time.strftime('%Y-%m-%d %H:%M')}. "
        'All numbers: <a href="runs.csv">runs.csv</a>.</p>',
    ]
    for picture, png in shown:
        source = base64.b64encode(png).decode()
        notes = "".join(f"<li>{html.escape(note)}</li>" for note in picture.notes)
        parts.append(
            f"<h2>{html.escape(picture.title)}</h2><figure>"
            f'<img alt="{html.escape(picture.title)}" src="data:image/png;base64,{source}"></figure>'
            + (f'<ul class="notes">{notes}</ul>' if notes else "")
            + f'<p class="quiet"><a href="{picture.name}.png">{picture.name}.png</a></p>'
        )
    if missing:
        parts.append(
            f'<p class="quiet">Not drawn, since this study does not vary or record it: {html.escape(", ".join(missing))}.</p>'
        )
    parts += ["<h2>Runs</h2>", table_of(found, rows), "</body></html>"]
    return "\n".join(parts) + "\n"


def table_of(found: dict[str, RunStatus], rows: list[Row]) -> str:
    """All runs, with links to their configurations, results and logs."""
    by_name = {row.name: row for row in rows}
    head = "".join(f'<th class="number">{html.escape(name)}</th>' for name, _, _ in COLUMNS)
    lines = []
    for name, status in found.items():
        row = by_name.get(name)
        folder = f"../{quote(name)}"
        links = f'<a href="{folder}/config.yaml">config</a>' if row or status.step else ""
        if row is None:
            note = html.escape(status.note or f"step {status.step}")
            kind = "failed" if status.state == "failed" else ""
            cells = f'<td colspan="{len(COLUMNS)}" class="{kind}">{html.escape(status.state)}: {note}</td>'
        else:
            links += f' <a href="{folder}/results.json">results</a> <a href="{folder}/metrics.jsonl">metrics</a>'
            cells = "".join(f'<td class="number">{cell(read(row), form)}</td>' for _, read, form in COLUMNS)
        lines.append(f"<tr><td>{html.escape(name)}</td>{cells}<td>{links}</td></tr>")
    return f'<div class="wide"><table><thead><tr><th>run</th>{head}<th>files</th></tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def cell(value: float | None, form: str) -> str:
    """A number for the table; nothing where there is none."""
    return "" if value is None or (isinstance(value, float) and not math.isfinite(value)) else form.format(value)
