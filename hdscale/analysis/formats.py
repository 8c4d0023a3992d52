"""Tables of text as Markdown, CSV or LaTeX."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, field

FORMS = ("markdown", "csv", "latex")
LATEX_SPECIAL = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "†": r"$\dagger$", "–": "--", "*": r"$^{*}$",
    "<": r"$<$", ">": r"$>$",
}  # fmt: skip


@dataclass
class TextTable:
    """A table whose cells are text.

    Attributes:
        title: above it. header: one text per column; the first column is aligned left, the others right.
        rows: as many texts as the header. notes: lines below it.
    """

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: list[str] = field(default_factory=list)


def render(table: TextTable, form: str) -> str:
    """The table as "markdown", "csv" or "latex", with a newline at its end."""
    return {"markdown": markdown, "csv": as_csv, "latex": latex}[form](table)


def markdown(table: TextTable) -> str:
    """GitHub's Markdown, columns padded so that the source is readable too."""
    rows = [[cell.replace("|", r"\|") for cell in row] for row in (table.header, *table.rows)]
    widths = [max(3, *(len(row[column]) for row in rows)) for column in range(len(table.header))]

    def line(cells: Sequence[str]) -> str:
        padded = [
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(cells, widths, strict=True))
        ]
        return "| " + " | ".join(padded) + " |"

    rule = "| " + " | ".join("-" * w if i == 0 else "-" * (w - 1) + ":" for i, w in enumerate(widths)) + " |"
    lines = [f"**{table.title}**", "", line(rows[0]), rule, *map(line, rows[1:])]
    if table.notes:
        lines += ["", *(f"- {note}" for note in table.notes)]
    return "\n".join(lines) + "\n"


def as_csv(table: TextTable) -> str:
    """Header and rows; title and notes are comments after `#`."""
    output = io.StringIO()
    writer = csv.writer(output, lineterminator="\n")
    writer.writerow(table.header)
    writer.writerows(table.rows)
    return output.getvalue() + "".join(f"# {text}\n" for text in (table.title, *table.notes))


def latex(table: TextTable) -> str:
    """A `table` environment with booktabs rules."""

    def line(cells: Sequence[str]) -> str:
        return " & ".join(map(escape_latex, cells)) + r" \\"

    lines = [
        r"\begin{table}",
        r"\centering",
        rf"\begin{{tabular}}{{l{'r' * (len(table.header) - 1)}}}",
        r"\toprule",
        line(table.header),
        r"\midrule",
        *map(line, table.rows),
        r"\bottomrule",
        r"\end{tabular}",
        rf"\caption{{{escape_latex('. '.join([table.title, *table.notes]))}.}}",
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"


def escape_latex(text: str) -> str:
    """Text in which nothing is a command of LaTeX."""
    return "".join(LATEX_SPECIAL.get(character, character) for character in text)


def render_all(tables: Sequence[TextTable], form: str) -> str:
    """Several tables in a form of `FORMS`, an empty line between them."""
    return "\n".join(render(table, form) for table in tables)
