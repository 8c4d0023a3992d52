"""The runs of a study as rows of numbers, and which keys each axis changes."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from hdscale.runs.folder import METRICS
from hdscale.runs.results import UNRECORDED, scores_of
from hdscale.runs.scores import described, task_score
from hdscale.study.store import Store, read_lines

TAIL = 0.1
"""Share of a run's logged steps, the last ones, whose mean is its training loss."""


@dataclass(frozen=True)
class RunRow:
    """One finished run.

    Attributes:
        name: of the run. point: {axis: point}. method: name of the method.
        parameters: of the base. trainable: of the method. percent: trainable share.
        split: whose scores these are: test, or validation where a run has no test scores.
        scores_of: split, step, selection and rows of the scores, in words.
        average: score on that split, x100. error: 100 - average. loss: mean training loss at the end (nats per token).
        samples: training rows seen. tokens: source and target tokens seen. seconds: of training.
        devices: ranks. device_hours: ranks times hours of training. samples_per_second: of training.
        memory_gb: the largest in the log of a rank. flops: of training, by the plan's formula.
        tasks: number of tasks scored. common_error: 100 - mean score over the tasks that every run has scored, each
            by `hdscale.runs.scores.task_score`, as in `average`.
        planned_*: the plan's predictions for this run on its device (None where the plan has no figures for it).
    """

    name: str
    point: dict[str, str]
    method: str
    parameters: float
    trainable: float
    percent: float
    average: float | None
    error: float | None
    loss: float | None
    steps: int
    samples: float
    tokens: float
    seconds: float
    devices: int
    device: str
    device_hours: float
    samples_per_second: float | None
    memory_gb: float | None
    flops: float | None
    tasks: int = 0
    common_error: float | None = None
    planned_samples_per_second: float | None = None
    planned_memory_gb: float | None = None
    split: str = "test"
    scores_of: str = ""


@dataclass(frozen=True)
class Forecast:
    """What the plan predicts for a run: the attributes of `RunRow` of the same names."""

    flops: float | None = None
    planned_samples_per_second: float | None = None
    planned_memory_gb: float | None = None


Predict = Callable[[dict[str, Any], dict[str, Any]], Forecast]
"""(flat configuration, results) of a run -> the plan's predictions."""


def read_rows(store: Store, predict: Predict | None = None) -> list[RunRow]:
    """The finished runs of a study, in the order of its grid."""
    runs = store.read()["runs"]
    found = {name: results for name in runs if (results := store.results(name)) is not None}
    rows = [row_of(store, name, runs[name], results, predict) for name, results in found.items()]
    scores = [task_scores(results) for results in found.values()]
    common = set.intersection(*map(set, scores)) if scores else set()
    return [
        replace(
            row,
            tasks=len(own),
            common_error=100.0 - sum(own[task] for task in common) / len(common) if common else None,
        )
        for row, own in zip(rows, scores, strict=True)
    ]


def task_scores(results: dict[str, Any]) -> dict[str, float]:
    """{task: the score by which it counts in averages}, of the tasks that have one."""
    scores = {}
    for task, metrics in (results.get("tasks" if split_of(results) == "test" else "validation") or {}).items():
        known = {name: value for name, value in metrics.items() if finite(value)}
        if known:
            scores[task] = task_score(known)
    return scores


def split_of(results: dict[str, Any]) -> str:
    """`test`, or `validation` if a run has no test scores (results of hdscale 0.1 do not say: `test`)."""
    return "test" if "format" not in results or results.get("tasks") else "validation"


def row_of(store: Store, name: str, run: dict[str, Any], results: dict[str, Any], predict: Predict | None) -> RunRow:
    """A run's numbers, from its results and its log."""
    lines = [line for line in read_lines(store.run_folder(name) / METRICS) if line.get("kind") == "train"]
    losses = [line["loss"] for line in lines if finite(line.get("loss"))]
    tail = losses[-max(1, math.ceil(TAIL * len(losses))) :] if losses else []
    memory = [line["memory_gb"] for line in lines if finite(line.get("memory_gb"))]
    seconds = float(results.get("seconds") or 0.0)
    provenance = results.get("provenance", {})
    devices = int(provenance.get("world_size") or 1)
    forecast = predict(run["config"], results) if predict else Forecast()
    split, scores = split_of(results), scores_of(results)
    average = number(results.get("average" if split == "test" else "validation_average"))
    return RunRow(
        name=name,
        point=run["point"],
        method=str(run["config"].get("method.name")),
        parameters=float(results["base_parameters"]),
        trainable=float(results["trainable"]),
        percent=float(results["trainable_percent"]),
        average=average,
        error=None if average is None else 100.0 - average,
        loss=sum(tail) / len(tail) if tail else None,
        steps=int(results["steps"]),
        samples=float(results["samples"]),
        tokens=float(results["tokens"]),
        seconds=seconds,
        devices=devices,
        device=str(provenance.get("device") or "unknown"),
        device_hours=seconds * devices / 3600,
        samples_per_second=results["samples"] / seconds if seconds > 0 else None,
        memory_gb=max(memory, default=None),
        flops=forecast.flops,
        planned_samples_per_second=forecast.planned_samples_per_second,
        planned_memory_gb=forecast.planned_memory_gb,
        split=split,
        scores_of=described([score for score in scores if score.split == split]) if "format" in results else UNRECORDED,
    )


def number(value: Any) -> float | None:
    """The value as a number that can be drawn; None where it is none."""
    return float(value) if finite(value) else None


def finite(value: Any) -> bool:
    """Whether a value is a number that can be drawn."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def average_shown(results: dict[str, Any]) -> str:
    """A run's average with its split: `test average 80.1`; empty where nothing was evaluated."""
    split = split_of(results)
    average = number(results.get("average" if split == "test" else "validation_average"))
    return "" if average is None else f"{split} average {average:.1f}"


def splits_of(rows: Sequence[RunRow]) -> str:
    """`test` or `validation`; both words where runs differ in it, which cannot be compared."""
    return " or ".join(sorted({row.split for row in rows}, key=("test", "validation").index))


def moved_keys(runs: dict[str, dict[str, Any]]) -> dict[str, set[str]]:
    """{axis: the keys that differ between runs which differ in that axis alone}."""
    moved: dict[str, set[str]] = {}
    points = {name: run["point"] for name, run in runs.items()}
    for axis in next(iter(points.values()), {}):
        groups: dict[tuple[str, ...], list[str]] = {}
        for name, point in points.items():
            groups.setdefault(tuple(value for key, value in point.items() if key != axis), []).append(name)
        keys: set[str] = set()
        for members in groups.values():
            first = runs[members[0]]["config"]
            for other in members[1:]:
                config = runs[other]["config"]
                keys |= {key for key in {*first, *config} if first.get(key) != config.get(key)}
        moved[axis] = keys - {"run.name", "run.dir"}
    return moved


def axes_of(moved: dict[str, set[str]], *prefixes: str) -> list[str]:
    """Axes that change a key with one of these beginnings."""
    return [axis for axis, keys in moved.items() if any(key.startswith(prefixes) for key in keys)]


def seed_axes(moved: dict[str, set[str]]) -> list[str]:
    """Axes that repeat a run: they change the seed alone, or nothing."""
    return [axis for axis, keys in moved.items() if keys <= {"run.seed"}]


def budget_axes(moved: dict[str, set[str]]) -> list[str]:
    """Axes that change the sizes of a method, but not the method."""
    return [
        axis for axis, keys in moved.items() if "method.name" not in keys and any(k.startswith("method.") for k in keys)
    ]


def write_csv(rows: list[RunRow], path: Path) -> None:
    """One line per run: its points, then its numbers."""
    axes = list(rows[0].point) if rows else []
    numbers = [field.name for field in fields(RunRow) if field.name not in ("name", "point")]
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["name", *[f"axis:{axis}" for axis in axes], *numbers])
        for row in rows:
            values = [getattr(row, name) for name in numbers]
            writer.writerow([row.name, *row.point.values(), *["" if value is None else value for value in values]])


def pareto(costs: list[float], scores: list[float]) -> list[int]:
    """The indices, by cost, of those for which no other is both as cheap and as good (one of equals is kept)."""
    front: list[int] = []
    best = -math.inf
    for index in sorted(range(len(costs)), key=lambda i: (costs[i], -scores[i])):
        if scores[index] > best:
            front.append(index)
            best = scores[index]
    return front
