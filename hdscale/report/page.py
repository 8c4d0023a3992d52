"""A self-contained HTML page: style and pictures are inside it, and it needs no network."""

from __future__ import annotations

import base64
import html
import math
from collections.abc import Iterable, Sequence

from hdscale.report.pictures import Picture

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


def page(title: str, parts: Iterable[str]) -> str:
    """The whole page.

    Args:
        title: text. parts: HTML, in order.
    """
    head = [
        "<!doctype html>",
        f'<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>',
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head><body>',
        f"<h1>{html.escape(title)}</h1>",
    ]
    return "\n".join([*head, *parts, "</body></html>"]) + "\n"


def heading(text: str) -> str:
    """A heading of a part."""
    return f"<h2>{html.escape(text)}</h2>"


def quiet(inner: str) -> str:
    """A small paragraph; `inner` is HTML."""
    return f'<p class="quiet">{inner}</p>'


def link(target: str, text: str) -> str:
    """A link; `target` is relative to the page, and quoted."""
    return f'<a href="{target}">{html.escape(text)}</a>'


def figure(picture: Picture, png: bytes) -> str:
    """A picture with its heading, its notes, and a link to the PNG beside the page."""
    source = base64.b64encode(png).decode()
    notes = "".join(f"<li>{html.escape(note)}</li>" for note in picture.notes)
    name = f"{picture.name}.png"
    return (
        heading(picture.title)
        + f'<figure><img alt="{html.escape(picture.title)}" src="data:image/png;base64,{source}"></figure>'
        + (f'<ul class="notes">{notes}</ul>' if notes else "")
        + quiet(link(name, name))
    )


def table(header: Sequence[str], rows: Iterable[str]) -> str:
    """A table that scrolls within the page.

    Args:
        header, rows: HTML of the cells of the header, and of each row.
    """
    lines = "".join(f"<tr>{row}</tr>" for row in rows)
    head = f"<thead><tr>{''.join(header)}</tr></thead>"
    return f'<div class="wide"><table>{head}<tbody>{lines}</tbody></table></div>'


def number_cell(value: float | None, form: str) -> str:
    """A number in a table's cell; nothing where there is none."""
    missing = value is None or (isinstance(value, float) and not math.isfinite(value))
    return f'<td class="number">{"" if missing else form.format(value)}</td>'
