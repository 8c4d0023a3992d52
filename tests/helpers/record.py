"""The summary of a whole test run, kept in the tree: what ran, where, and for how long."""

from __future__ import annotations

import datetime
import os
import subprocess
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from hdscale.requirements import BOUNDS
from hdscale.runs.machine import processor_name

SLOWEST = 15
KINDS = ("passed", "failed", "error", "skipped", "xfailed", "xpassed")


def summary(reports: Mapping[str, Sequence[Any]], seconds: float, root: Path, target: str) -> str:
    """Markdown: counts, machine, each room's minutes, the slowest tests, and why tests were skipped.

    Args:
        reports: pytest's reports by outcome (`terminalreporter.stats`).
        seconds: duration of the whole run.
        root: of the checkout.
        target: of the Makefile, which ran the tests.
    """
    commit = subprocess.run(["git", "-C", str(root), "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    counts = {kind: len(reports[kind]) for kind in KINDS if reports.get(kind)}
    timed = [one for kind in ("passed", "failed", "error") for one in reports.get(kind, ()) if hasattr(one, "duration")]
    rooms: dict[str, float] = {}
    for one in timed:
        room = "/".join(one.nodeid.split("::")[0].split("/")[1:2])
        rooms[room] = rooms.get(room, 0.0) + one.duration
    lines = [
        f"# The last run of `make {target}`",
        "",
        f"{datetime.date.today().isoformat()}, after commit {commit.stdout.strip()}; torch {torch.__version__}, "
        f"{os.cpu_count()} CPUs ({processor_name()}), GPUs: {torch.cuda.device_count()}.",
        "",
        f"Libraries: {', '.join(f'{name} {version(name)}' for name in BOUNDS)}.",
        "",
        f"{', '.join(f'{count} {kind}' for kind, count in counts.items())} in {seconds / 60:.1f} minutes.",
        "",
        "| tests | minutes |",
        "|---|---|",
        *(f"| {room} | {spent / 60:.1f} |" for room, spent in sorted(rooms.items(), key=lambda row: -row[1])),
        "",
        "Slowest:",
        "",
        *(f"- {one.duration:.0f} s {one.nodeid}" for one in sorted(timed, key=lambda one: -one.duration)[:SLOWEST]),
    ]
    lines += listed("Failed", [one.nodeid for kind in ("failed", "error") for one in reports.get(kind, ())])
    lines += listed("Skipped", sorted({reason(one) for one in reports.get("skipped", ())}))
    return "\n".join(lines) + "\n"


def listed(title: str, entries: Sequence[str]) -> list[str]:
    """A Markdown list under a title, or nothing."""
    return ["", f"{title}:", "", *(f"- {entry}" for entry in entries)] if entries else []


def reason(report: Any) -> str:
    """Why a test was skipped."""
    return str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr).removeprefix("Skipped: ")
