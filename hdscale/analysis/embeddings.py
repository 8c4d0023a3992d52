"""`hdscale analyze embeddings --run R`: what conditions the decoder (e of Eq. 8), seen through t-SNE and PCA (Figures 2-4)."""

from __future__ import annotations

import argparse
import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hdscale.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.figure import Figure

# Okabe and Ito's palette; tasks beyond it get other markers
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D31")
MARKERS = ("o", "^", "s", "D", "v", "P")
LARGEST_LEGEND = 24
PERPLEXITY = 30.0
SPLIT = "validation"


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
        name: of the file. title: of the figure. groups: one text an instance, None to leave it out.
    """

    name: str
    title: str
    groups: list[str | None]


def embed_tasks(
    loaded: Any, tasks: Sequence[Any], config: Any, split: str, limit: int, batch_size: int
) -> tuple[np.ndarray, list[Embedded]]:
    """Embeddings [M, D] and predictions of the first `limit` rows of each task's split.

    Args:
        loaded: a `hdscale.load.Loaded` model of hdscale's own. config: of its run.
    """
    import numpy as np
    import torch

    from hdscale.data.tokenize import tokenized_split
    from hdscale.evaluation.generation import Decoder, model_device, pad_sources, task_decoding

    vectors, instances = [], []
    device = model_device(loaded.model)
    for task in tasks:
        rows = tokenized_split(task, split, loaded.tokenizer, config.data)
        decoding = task_decoding(task, loaded.tokenizer, config.eval, config.data.max_target_length)
        task_id = loaded.task_ids.get(task.name, -1)
        decoder = Decoder(loaded.model, loaded.tokenizer, decoding, task_id=task_id)
        count = min(limit, len(rows))
        for start in range(0, count, batch_size):
            numbers = list(range(start, min(start + batch_size, count)))
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
    """Two coordinates an instance by PCA and by t-SNE: vectors [M, D] -> {"pca": [M, 2], "tsne": [M, 2]}."""
    import numpy as np
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    if len(vectors) < 4:
        raise UserError(f"{len(vectors)} instances are too few to draw; raise --limit")
    vectors = vectors.astype(np.float64)
    perplexity = min(PERPLEXITY, (len(vectors) - 1) / 3)
    # a task-conditioned model has one point a task: t-SNE's default start divides by a spread that may be 0
    spread = bool(vectors.std(axis=0).max() > 0)
    start = "pca" if spread else "random"
    return {
        "pca": PCA(2, random_state=seed).fit_transform(vectors),
        "tsne": TSNE(2, perplexity=perplexity, init=start, random_state=seed).fit_transform(vectors),
    }


def colourings(instances: Sequence[Embedded]) -> list[Colouring]:
    """By task; by predicted label where tasks have labels (Figure 3 leaves numbers out); by empty answers (Figure 4)."""
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
    import numpy as np
    from matplotlib.figure import Figure

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
        axes.scatter(
            chosen[:, 0],
            chosen[:, 1],
            s=size,
            c="#999999" if name == "(others)" else COLOURS[number % len(COLOURS)],
            marker=MARKERS[number // len(COLOURS) % len(MARKERS)],
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
    """One line an instance: task, id, prediction, and its two coordinates by each projection."""
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        names = list(projections)
        writer.writerow(["task", "id", "prediction", *(f"{name}_{axis}" for name in names for axis in "xy")])
        for index, one in enumerate(instances):
            numbers = [f"{value:.6g}" for name in names for value in projections[name][index]]
            writer.writerow([one.task, one.id, one.prediction, *numbers])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    # `args.run` is the function of the verb
    parser.add_argument("--run", dest="run_folder", metavar="DIR", required=True, help="folder of a finished run")
    parser.add_argument("--tasks", nargs="+", metavar="TASK", help="tasks or mixtures; default: the run's")
    parser.add_argument("--split", default=SPLIT, choices=["train", "validation", "test"], help=f"default: {SPLIT}")
    parser.add_argument("--limit", type=int, default=500, metavar="N", help="instances of each task (default: 500)")
    parser.add_argument("--batch-size", type=int, default=32, metavar="N", help="instances at once (default: 32)")
    parser.add_argument("--seed", type=int, default=0, help="of t-SNE (default: 0)")
    parser.add_argument("--output", metavar="DIR", help="default: the run's folder, analysis/embeddings")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: a GPU where there is one")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings over the run's (data.root=...)")


def run(args: argparse.Namespace) -> int:
    from hdscale.data.tasks import expand_tasks
    from hdscale.load import Choice

    for name in ("limit", "batch_size"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1")
    choice = Choice(run=args.run_folder, device=args.device)
    choice.check()
    config = choice.config(args.overrides)
    tasks = expand_tasks(args.tasks or config.data.tasks, config.data)
    skipped = [task.name for task in tasks if args.split not in task.splits]
    tasks = [task for task in tasks if args.split in task.splits]
    if not tasks:
        raise UserError(f"none of {', '.join(skipped)} has a {args.split} split; choose another with --split")
    folder = Path(args.output) if args.output else Path(args.run_folder) / "analysis" / "embeddings"
    folder.mkdir(parents=True, exist_ok=True)

    vectors, instances = embed_tasks(choice.load(config), tasks, config, args.split, args.limit, args.batch_size)
    projections = project(vectors, args.seed)
    write_coordinates(folder / "coordinates.csv", instances, projections)
    print(folder / "coordinates.csv")
    if skipped:
        print(f"without {', '.join(skipped)}: no {args.split} split")
    for method, points in projections.items():
        for colouring in colourings(instances):
            name = {"pca": "PCA", "tsne": "t-SNE"}[method]
            title = f"{name} of the hypernetwork's embeddings, {args.split}, {colouring.title}\n{config.run.name}"
            path = folder / f"{method}_by_{colouring.name}.png"
            draw(points, colouring, method, title).savefig(path, dpi=150)
            print(path)
    return 0
