"""The averages of the paper's tables, the number by which checkpoints are compared, and the majority-class baseline."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from hdscale.data.tasks import Example, Task
from hdscale.data.tasks.mrqa.tasks import IN_DOMAIN, OUT_OF_DOMAIN
from hdscale.errors import UserError
from hdscale.evaluation.metrics import compute
from hdscale.runs.scores import task_score


def averages(tasks: Sequence[Task], results: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """All averages that apply to these tasks.

    Args:
        tasks: the tasks that were evaluated.
        results: {task name: {metric: value x100}}.

    Returns:
        `average`: the mean over tasks of `task_score` (the tables' average). With both summarisation and label tasks,
        Table 6's `summarisation` (ROUGE-2), `nli` and `overall` (the mean of these two). With MRQA sets,
        `in_domain_f1`, `in_domain_em`, `out_of_domain_f1`, `out_of_domain_em`, each over the sets that were evaluated.
    """
    scores = {task.name: task_score(results[task.name]) for task in tasks}
    found = {"average": fmean(scores.values())}
    summaries = [scores[task.name] for task in tasks if task.kind == "text" and "rouge2" in results[task.name]]
    labels = [scores[task.name] for task in tasks if task.kind == "label"]
    if summaries and labels:
        found |= {"summarisation": fmean(summaries), "nli": fmean(labels)}
        found["overall"] = (found["summarisation"] + found["nli"]) / 2
    for domain in ("in_domain", "out_of_domain"):
        members = [task.name for task in tasks if task_domain(task) == domain]
        for metric in ("f1", "em"):
            if members and all(metric in results[name] for name in members):
                found[f"{domain}_{metric}"] = fmean(results[name][metric] for name in members)
    return found


def task_domain(task: Task) -> str | None:
    """`in_domain` or `out_of_domain` for a set of the MRQA shared task, None for any other task."""
    if task.kind != "qa":
        return None
    return "in_domain" if task.name in IN_DOMAIN else "out_of_domain" if task.name in OUT_OF_DOMAIN else None


def metrics_average(
    tasks: Sequence[Task],
    results: Mapping[str, Mapping[str, float]],
    notes: Mapping[str, Mapping[str, Any]] | None = None,
) -> float:
    """What the paper's release selects checkpoints by: the mean over all metrics of all tasks.

    As in the release, XSum counts with ROUGE-2 alone; the other summarisation tasks count with all ROUGE values and
    with their mean generation length in tokens (`generated_tokens` of the notes, if given).
    """
    values: list[float] = []
    for task in tasks:
        metrics = results[task.name]
        if task.kind == "text" and task.name == "xsum" and "rouge2" in metrics:
            values.append(metrics["rouge2"])
            continue
        values += metrics.values()
        length = (notes or {}).get(task.name, {}).get("generated_tokens")
        if task.kind == "text" and length is not None:
            values.append(float(length))
    return fmean(values)


def selection_score(
    select: str,
    tasks: Sequence[Task],
    results: Mapping[str, Mapping[str, float]],
    notes: Mapping[str, Mapping[str, Any]] | None = None,
) -> float:
    """The number by which `eval.select` compares checkpoints: higher is better.

    `average` and `per_task` use the tables' average (for `per_task` the caller compares `task_score` task by task),
    `metrics` uses the release's mean over metrics. Any other value names one of `averages` (`overall`,
    `in_domain_f1`), a metric (its mean over the tasks that have it) or `task.metric`.
    """
    check_select(select, tasks)
    if select == "metrics":
        return metrics_average(tasks, results, notes)
    known = averages(tasks, results)
    if select in ("average", "per_task", "last"):
        return known["average"]
    if select in known:
        return known[select]
    task_name, _, metric = select.rpartition(".")
    if task_name:
        return results[task_name][metric]
    return fmean(results[task.name][select] for task in tasks if select in task.metrics)


def check_select(select: str, tasks: Sequence[Task]) -> None:
    """Raise UserError if `eval.select` names no score of these tasks. Cheap: call it before training."""
    metrics = {metric for task in tasks for metric in task.metrics}
    dotted = {f"{task.name}.{metric}" for task in tasks for metric in task.metrics}
    example = {task.name: dict.fromkeys(task.metrics, 0.0) for task in tasks}
    known = {"average", "metrics", "per_task", "last", *averages(tasks, example), *metrics, *dotted}
    if select not in known:
        always = ["average", "metrics", "per_task", "last"]
        names = [*always, *sorted(known - dotted - {*always})]
        raise UserError(
            f"eval.select={select} is not a score of these tasks; choose one of {', '.join(names)}, or task.metric"
        )


def majority_predictions(train_targets: Sequence[str], rows: int) -> list[str]:
    """The most frequent training target (of equally frequent ones the first in sorted order), once per row."""
    counts = Counter(train_targets)
    if not counts:
        raise UserError("no training rows: the majority-class baseline needs them")
    most = max(sorted(counts), key=counts.__getitem__)
    return [most] * rows


def majority_baseline(task: Task, train_targets: Sequence[str], examples: Sequence[Example]) -> dict[str, float]:
    """The metrics of predicting the most frequent training target for every row: a model that learns must beat them."""
    return compute(task, majority_predictions(train_targets, len(examples)), examples)
