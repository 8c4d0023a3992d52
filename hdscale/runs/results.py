"""The results of a run: `results.json`, with where they come from, and the table at the end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from hdscale.config import Config, to_dict
from hdscale.data.sources import load_examples, load_split
from hdscale.data.tasks import Task
from hdscale.runs.provenance import provenance
from hdscale.evaluation.averages import averages, majority_baseline


def final_results(
    config: Config,
    ranks: Any,
    model: Any,
    tasks: list[Task],
    final: dict[str, dict[str, float]],
    notes: dict[str, dict[str, Any]],
    progress: Any,
    steps: int,
    path: Path,
) -> dict[str, Any]:
    """Put the results together and write them, whole or not at all.

    Args:
        final: {task: {metric: value x100}} of the test splits.
        notes: {task: what a reader must know beside the metrics: rows, unreadable predictions, the sentence splitter}.
        progress: what the run remembers (best scores, validation metrics, time).
        steps: optimizer steps done.
        path: `results.json`.
    """
    trainable = sum(parameter_size(parameter) for parameter in model.parameters() if parameter.requires_grad)
    base = sum(parameter_size(parameter) for parameter in model.base.parameters())
    results = {
        "name": config.run.name,
        "tasks": final,
        **average_of(tasks, final),
        "baseline": (baseline := majority_baselines(config, tasks)),
        "baseline_average": average_of(tasks, baseline)["average"],
        "notes": notes,
        "validation": progress.validation,
        "best": progress.best,
        "steps": steps,
        "seconds": round(progress.seconds, 3),
        "samples": progress.samples,
        "tokens": progress.tokens,
        "trainable": trainable,
        "base_parameters": base,
        "trainable_percent": 100.0 * trainable / base,
        "provenance": provenance(ranks, config),
        "config": to_dict(config),
    }
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(results, indent=2))
    temporary.replace(path)
    return results


def average_of(tasks: list[Task], metrics: dict[str, dict[str, float]]) -> dict[str, float | None]:
    """All averages over the tasks that were evaluated; `average` is None where none was."""
    evaluated = [task for task in tasks if task.name in metrics]
    return averages(evaluated, metrics) if evaluated else {"average": None}


def parameter_size(parameter: Any) -> int:
    """Elements of a parameter; ZeRO-3 leaves an empty one behind and keeps the number beside it."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def majority_baselines(config: Config, tasks: list[Task]) -> dict[str, dict[str, float]]:
    """{task: metrics} of always answering the most frequent training target, for tasks with labels or numbers."""
    found = {}
    for task in tasks:
        if task.kind in ("label", "number") and task.trains:
            split = "test" if "test" in task.splits else "validation"
            targets = [example.target for example in load_split(task, "train", config.data)]
            examples = load_examples(task, split, config.data)
            limit = config.eval.test_limit
            found[task.name] = majority_baseline(task, targets, examples[:limit] if limit else examples)
    return found


def print_results(results: dict[str, Any]) -> None:
    """The table of scores: one row a task, the majority-class baseline beside each."""
    table = Table(title=f"{results['name']}: {results['steps']:,} steps, {results['trainable_percent']:.2f}% trainable")
    table.add_column("task")
    table.add_column("metric")
    for column in ("majority class", "validation", "test"):
        table.add_column(column, justify="right")

    def cell(split: dict[str, dict[str, float]], task: str, metric: str) -> str:
        value = (split or {}).get(task, {}).get(metric)
        return "" if value is None else f"{value:.1f}"

    for task, metrics in results["tasks"].items():
        for index, metric in enumerate(metrics):
            table.add_row(
                task if index == 0 else "",
                metric,
                cell(results["baseline"], task, metric),
                cell(results["validation"], task, metric),
                cell(results["tasks"], task, metric),
            )
    table.add_section()
    averages_shown = ["" if results[key] is None else f"{results[key]:.1f}" for key in ("baseline_average", "average")]
    table.add_row("average", "", averages_shown[0], "", averages_shown[1])
    Console().print(table)
