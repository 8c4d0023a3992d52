"""Jobs of tests/doctor/test_nodes.py: an examination in which each rank is a node of its own."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hdscale.doctor.nodes import network, shared_folder
from hdscale.doctor.nodes.examination import Place, examine
from hdscale.doctor.nodes.facts import own_facts


def examined(
    ranks: Any,
    names: list[str],
    folders: list[dict[str, str]],
    ahead: tuple[float, ...] = (),
    versions: tuple[dict[str, str], ...] = (),
    wrong_sums: int | None = None,
    no_locks: int | None = None,
) -> dict[str, Any]:
    """The report of an examination, and what was said.

    Args:
        names: each rank's node. folders: and what its folders are, by title.
        ahead: seconds by which each rank's clock is ahead. versions: what differs from the machine's.
        wrong_sums: the rank that hands in other numbers than it should. no_locks: the rank on which locks do nothing.
    """
    name = names[ranks.rank]
    facts = own_facts(ranks.launch, name)
    if versions:
        facts = dataclasses.replace(facts, versions=facts.versions | versions[ranks.rank])
    if ranks.rank == wrong_sums:
        size_of = network.run_sizes
        network.run_sizes = lambda speed, sizes, index, *rest: size_of(speed, sizes, index + 1, *rest)
    if ranks.rank == no_locks:
        shared_folder.locked = lambda path, timeout=-1: contextlib.nullcontext()
    offset = ahead[ranks.rank] if ahead else 0.0
    place = Place(name, lambda: time.time() + offset, patience=1.0)
    said: list[str] = []
    limits: list[str] = []

    @contextlib.contextmanager
    def limit(seconds: float, what: str) -> Iterator[None]:
        limits.append(what)
        yield

    ours = {title: Path(path) for title, path in folders[ranks.rank].items()}
    report = examine(ranks, ours, said.extend, limit, place, facts)
    return {
        "ready": report.ready,
        "verdict": report.verdict,
        "notes": report.notes,
        "clocks": report.clocks,
        "within": [(speed.where, speed.processes, sorted(speed.bandwidths)) for speed in report.within],
        "across": report.across and sorted(report.across.bandwidths),
        "said": said,
        "limits": limits,
    }
