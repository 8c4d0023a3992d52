"""What conditions the decoder (e of Eq. 8), seen through t-SNE and PCA (Figures 2-4; `hdscale analyze embeddings`)."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE

from hdscale.analysis.options import EmbeddingOptions
from hdscale.config import Config
from hdscale.data.sample import sample_rows
from hdscale.data.tasks import Task, expand_tasks
from hdscale.data.tokenize import tokenized_split
from hdscale.errors import UserError
from hdscale.evaluation.generation import UNKNOWN_TASK, Decoder, model_device, pad_sources, task_decoding
from hdscale.load import Choice, Loaded
from hdscale.report.palette import PALE, style

LARGEST_LEGEND = 24
PERPLEXITY = 30.0


@dataclass(frozen=True)
class Embedded:
    """One instance: its task, id and the text that the model predicts for it."""

    task: str
    id: str
    kind: str
    prediction: str


@dataclass(frozen=True)
class Colouring:
    """A way to colour the points.

    Attributes:
        name: of the file. title: of the figure. groups: one text per instance, None to leave it out.
    """

    name: str
    title: str
    groups: list[str | None]


def embed_tasks(
    loaded: Loaded, tasks: Sequence[Task], config: Config, options: EmbeddingOptions
) -> tuple[np.ndarray, list[Embedded]]:
    """Embeddings [M, D] and predictions of a sample of `options.limit` rows of each task's split.

    Args:
        loaded: a model of hdscale, not any checkpoint.
        config: of its run.
    """
    vectors: list[np.ndarray] = []
    instances: list[Embedded] = []
    device = model_device(loaded.model)
    for task in tasks:
        rows = tokenized_split(task, options.split, loaded.tokenizer, config.data)
        decoding = task_decoding(task, loaded.tokenizer, config.eval, config.data.max_target_length)
        known = loaded.task_id(task.name)
        task_id = UNKNOWN_TASK if known is None else known
        decoder = Decoder(loaded.model, loaded.tokenizer, decoding, task_id=task_id)
        chosen = sample_rows(len(rows), options.limit)
        for start in range(0, len(chosen), options.batch_size):
            numbers = chosen[start : start + options.batch_size]
            batch = [rows.row(number) for number in numbers]
            input_ids, mask = pad_sources([row.input_ids for row in batch], loaded.tokenizer.pad_token_id, device)
            task_ids = torch.full((len(batch),), task_id, dtype=torch.long, device=device)
            vectors.append(loaded.model.embed(input_ids, mask, task_ids).float().cpu().numpy())
            instances += [
                Embedded(task.name, str(row.id), task.kind, prediction.text.strip())
                for row, prediction in zip(batch, decoder(batch, numbers), strict=True)
            ]
    return np.concatenate(vectors), instances


def project(vectors: np.ndarray, seed: int = 0) -> dict[str, np.ndarray]:
    """Two coordinates per instance by PCA and by t-SNE: vectors [M, D] -> {"pca": [M, 2], "tsne": [M, 2]}."""
    if len(vectors) < 4:
        raise UserError(f"{len(vectors)} instances are too few to draw; raise --limit")
    vectors = vectors.astype(np.float64)
    perplexity = min(PERPLEXITY, (len(vectors) - 1) / 3)
    # a task-conditioned model has one point per task: t-SNE's default start divides by a spread that may be 0
    spread = bool(vectors.std(axis=0).max() > 0)
    start = "pca" if spread else "random"
    return {
        "pca": PCA(2, random_state=seed).fit_transform(vectors),
        "tsne": TSNE(2, perplexity=perplexity, init=start, random_state=seed).fit_transform(vectors),
    }


def colourings(instances: Sequence[Embedded]) -> list[Colouring]:
    """By task; by predicted label where tasks have labels (Figure 3: no numbers); by empty answers (Figure 4)."""
    found = [Colouring("task", "by task", [one.task for one in instances])]
    labels = [one.prediction if one.kind == "label" else None for one in instances]
    if any(label is not None for label in labels):
        found.append(Colouring("label", "by predicted label", [None if x is None else x or "(empty)" for x in labels]))
    answers = [
        ("non-empty answer" if one.prediction else "empty answer") if one.kind == "qa" else None for one in instances
    ]
    if any(answer is not None for answer in answers):
        found.append(Colouring("answer", "by empty and non-empty predicted answer", answers))
    return found


def draw(points: np.ndarray, colouring: Colouring, method: str, title: str) -> Figure:
    """A scatter plot with a legend beside it: points [M, 2]."""
    groups: dict[str, list[int]] = {}
    for index, group in enumerate(colouring.groups):
        if group is not None:
            groups.setdefault(group, []).append(index)
    kept = sorted(groups, key=lambda name: (-len(groups[name]), name))
    if len(kept) > LARGEST_LEGEND:
        rest = [index for name in kept[LARGEST_LEGEND - 1 :] for index in groups[name]]
        kept = kept[: LARGEST_LEGEND - 1]
        groups["(others)"] = rest
    names = sorted(kept) + (["(others)"] if "(others)" in groups else [])
    figure = Figure(figsize=(8.0, 5.2), layout="constrained")
    axes = figure.add_subplot()
    total = sum(len(groups[name]) for name in names)
    size = float(np.clip(4000.0 / total, 4.0, 30.0))
    for number, name in enumerate(names):
        chosen = points[groups[name]]
        colour, marker = style(number)
        axes.scatter(
            chosen[:, 0],
            chosen[:, 1],
            s=size,
            c=PALE if name == "(others)" else colour,
            marker=marker,
            alpha=0.7,
            linewidths=0,
            label=f"{name if len(name) <= 24 else name[:23] + '…'} ({len(groups[name])})",
        )
    label = {"pca": "principal component", "tsne": "t-SNE dimension"}[method]
    axes.set_xlabel(f"{label} 1")
    axes.set_ylabel(f"{label} 2")
    axes.set_title(title, fontsize=11)
    figure.legend(loc="outside right upper", frameon=False, fontsize=9, markerscale=(30.0 / size) ** 0.5)
    return figure


def write_coordinates(path: Path, instances: Sequence[Embedded], projections: dict[str, np.ndarray]) -> None:
    """One line per instance: task, id, prediction, and its two coordinates by each projection."""
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        names = list(projections)
        writer.writerow(["task", "id", "prediction", *(f"{name}_{axis}" for name in names for axis in "xy")])
        for index, one in enumerate(instances):
            numbers = [f"{value:.6g}" for name in names for value in projections[name][index]]
            writer.writerow([one.task, one.id, one.prediction, *numbers])


def analyze_embeddings(run_folder: str, options: EmbeddingOptions) -> tuple[list[Path], list[str]]:
    """Embed a run's rows, and write coordinates and figures.

    Returns:
        paths written, and names of the tasks that lack the split.

    Raises:
        UserError: for a folder that is not a finished run, or if no task has the split.
    """
    choice = Choice(run=run_folder, device=options.device)
    choice.check()
    config = choice.config(options.overrides)
    tasks = expand_tasks(options.tasks or config.data.tasks, config.data)
    skipped = [task.name for task in tasks if options.split not in task.splits]
    tasks = [task for task in tasks if options.split in task.splits]
    if not tasks:
        raise UserError(f"none of {', '.join(skipped)} has a {options.split} split; choose another with --split")
    folder = Path(options.output) if options.output else Path(run_folder) / "analysis" / "embeddings"
    folder.mkdir(parents=True, exist_ok=True)

    vectors, instances = embed_tasks(choice.load(config), tasks, config, options)
    projections = project(vectors, options.seed)
    written = [folder / "coordinates.csv"]
    write_coordinates(written[0], instances, projections)
    for method, points in projections.items():
        for colouring in colourings(instances):
            name = {"pca": "PCA", "tsne": "t-SNE"}[method]
            title = f"{name} of the hypernetwork's embeddings, {options.split}, {colouring.title}\n{config.run.name}"
            written.append(folder / f"{method}_by_{colouring.name}.png")
            draw(points, colouring, method, title).savefig(written[-1], dpi=150)
    return written, skipped
