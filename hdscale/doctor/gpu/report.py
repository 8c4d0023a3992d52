"""The report of an examination: JSON for programs, Markdown for people, and one line that says how it went."""

from __future__ import annotations

import datetime
import platform
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hdscale.bench.report import shown, spoken
from hdscale.doctor.gpu.lines import FAILED, NOT_FINISHED, NOT_POSSIBLE, PASSED, Line
from hdscale.doctor.gpu.runner import Result
from hdscale.files import write_json, write_text

JSON, MARKDOWN = "report.json", "report.md"
STATES = (PASSED, FAILED, NOT_FINISHED, NOT_POSSIBLE)


def default_folder(card: str) -> Path:
    """A folder that does not exist yet, named after the card and the date."""
    word = re.sub(r"[^A-Za-z0-9.]+", "-", card).strip("-") or "gpu"
    name = f"hdscale-doctor_{word}_{datetime.date.today().isoformat()}"
    number = 1
    while Path(name if number == 1 else f"{name}_{number}").exists():
        number += 1
    return Path(name if number == 1 else f"{name}_{number}")


def all_lines(results: Iterable[Result]) -> list[Line]:
    """The lines of all stages."""
    return [line for result in results for line in result.lines]


def healthy(results: Sequence[Result]) -> bool:
    """Whether nothing failed and everything was seen to its end."""
    return all(line.state in (PASSED, NOT_POSSIBLE) for line in all_lines(results))


def verdict(results: Sequence[Result]) -> str:
    """How it went, in one line: how many checks passed, and which did not."""
    counts = Counter(line.state for line in all_lines(results))
    numbers = ", ".join(f"{counts[state]} {state}" for state in STATES if counts[state]) or "nothing was checked"
    bad = [
        f"{result.name} ({line.name})"
        for result in results
        for line in result.lines
        if line.state in (FAILED, NOT_FINISHED)
    ]
    return f"{numbers}: {'nothing failed' if not bad else ', '.join(bad)}"


def write_report(folder: Path, gpus: list[str], results: Sequence[Result], version: str, command: str) -> None:
    """Write both files, whole or not at all; called after each stage, so that nothing is lost."""
    report = {
        "format": 1,
        "hdscale": version,
        "command": command,
        "host": platform.node(),
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "gpus": gpus,
        "healthy": healthy(results),
        "verdict": verdict(results),
        "seconds": round(sum(result.seconds for result in results), 1),
        "stages": [asdict(result) for result in results],
    }
    write_json(folder / JSON, report, indent=1)
    write_text(folder / MARKDOWN, markdown(report, results))


def markdown(report: dict[str, Any], results: Sequence[Result]) -> str:
    """The report as a page."""
    text = [
        f"# hdscale doctor --gpu: {', '.join(f'{count} x {name}' for name, count in Counter(report['gpus']).items())}",
        "",
        f"{report['verdict']}.",
        "",
        f"`{report['command']}`, hdscale {report['hdscale']}, {report['host']}, {report['date']}, "
        f"{report['seconds']:.0f} s.",
    ]
    for result in results:
        how = "" if result.ended == "done" else f"; {result.ended}"
        text += ["", f"## {result.title}", "", f"{result.seconds:.0f} s of at most {result.limit:.0f} s{how}.", ""]
        text += ["| check | result | what was found |", "|---|---|---|"]
        text += [f"| {cell(line.name)} | {line.state} | {cell(line.detail)} |" for line in result.lines]
        if rows := [row for line in result.lines for row in line.values.get("table", [])]:
            text += ["", *table(rows)]
        for line in result.lines:
            if line.state == FAILED and line.values.get("output"):
                text += ["", f"{line.name}:", "", "```text", *line.values["output"], "```"]
        if result.last_words:
            text += ["", "The last lines of stderr:", "", "```text", *result.last_words, "```"]
    return "\n".join(text) + "\n"


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Rows as a Markdown table with the columns of all of them."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    lines = ["| " + " | ".join(cell(spoken(key)) for key in keys) + " |", "|" + "---|" * len(keys)]
    return lines + ["| " + " | ".join(cell(shown(row.get(key))) for key in keys) + " |" for row in rows]


def cell(text: str) -> str:
    """Text that does not end a table's cell."""
    return text.replace("|", "\\|").replace("\n", " ")
