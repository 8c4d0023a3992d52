"""Classifiers on a trained run's encoder, without the decoder (Table 7, Appendix C; `hdscale classify --run R`).

The encoder with its trained adapters stays frozen and runs once over the data, without dropout: an instance's masked
mean is all that the classifiers see of it. Trained anew are an MLP of Eq. 8's shape, shared by the tasks, and a linear
layer per task. Tasks without labels (STS-B) are left out, and the validation sets are evaluated, as in Table 7.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from hdscale.analysis.options import ClassifierOptions
from hdscale.config import Config
from hdscale.data.sample import sample_rows
from hdscale.data.sources import check_splits, load_examples
from hdscale.data.tasks import Task, expand_tasks
from hdscale.data.tokenize import tokenized_split
from hdscale.engine.optimizer import learning_rate_factor
from hdscale.errors import UserError
from hdscale.evaluation.averages import averages
from hdscale.evaluation.generation import UNKNOWN_TASK, global_batches, model_device, pad_sources
from hdscale.evaluation.metrics import compute
from hdscale.files import write_json
from hdscale.load import Choice, Loaded
from hdscale.modeling.conditioning import masked_mean
from hdscale.runs.folder import CLASSIFIER, RESULTS


class EncoderClassifier(nn.Module):
    """The MLP of Eq. 8's shape, then a linear layer for each task.

    Args:
        d_model: D. labels: {task: number of labels}.
    """

    def __init__(self, d_model: int, labels: dict[str, int]) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(d_model, d_model), nn.ReLU(), nn.Linear(d_model, d_model))
        self.heads = nn.ModuleDict({task: nn.Linear(d_model, count) for task, count in labels.items()})

    def forward(self, means: Tensor, task: str) -> Tensor:
        """means [M, D] -> logits [M, labels of the task]."""
        return self.heads[task](self.mlp(means))


@dataclass
class Pooled:
    """A task's split as the classifiers see it: means [M, D], numbers of the labels [M], and the examples."""

    task: Task
    means: Tensor
    labels: Tensor
    examples: list[Any]


def pool_split(loaded: Loaded, task: Task, split: str, config: Config, limit: int | None, batch_size: int) -> Pooled:
    """Run the frozen encoder over a split and keep each row's masked mean over the source tokens."""
    rows = tokenized_split(task, split, loaded.tokenizer, config.data)
    chosen = sample_rows(len(rows), limit)
    every = load_examples(task, split, config.data)
    examples = [every[row] for row in chosen]
    device = model_device(loaded.model)
    known = loaded.task_id(task.name)
    task_id = UNKNOWN_TASK if known is None else known
    means = torch.empty(len(chosen), loaded.model.base.sizes("encoder").d_model)
    for numbers in global_batches([len(rows.row(row).input_ids) for row in chosen], batch_size):
        sources = [rows.row(chosen[number]).input_ids for number in numbers]
        input_ids, mask = pad_sources(sources, loaded.tokenizer.pad_token_id, device)
        task_ids = torch.full((len(numbers),), task_id, dtype=torch.long, device=device)
        with torch.no_grad():
            encoded = loaded.model.encode(input_ids, mask, task_ids)
            means[numbers] = masked_mean(encoded.hidden, encoded.mask).float().cpu()
    labels = torch.tensor([task.labels.index(example.target) for example in examples])
    return Pooled(task, means, labels, examples)


def train_classifiers(sets: Sequence[Pooled], options: ClassifierOptions) -> EncoderClassifier:
    """Train MLP and linear layers on all tasks' rows, shuffled anew in each epoch, so mixed in proportion to size."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        model = EncoderClassifier(sets[0].means.shape[1], {one.task.name: len(one.task.labels) for one in sets})
    generator = torch.Generator().manual_seed(options.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate, weight_decay=0.0)
    owner = torch.cat([torch.full((len(one.labels),), number) for number, one in enumerate(sets)])
    place = torch.cat([torch.arange(len(one.labels)) for one in sets])
    steps, step = options.epochs * -(-len(owner) // options.batch_size), 0
    for _ in range(options.epochs):
        for chosen in torch.randperm(len(owner), generator=generator).split(options.batch_size):
            losses = []
            for number in owner[chosen].unique().tolist():
                one, mine = sets[number], place[chosen[owner[chosen] == number]]
                logits = model(one.means[mine], one.task.name)
                losses.append(functional.cross_entropy(logits, one.labels[mine], reduction="sum"))
            for group in optimizer.param_groups:
                group["lr"] = options.learning_rate * learning_rate_factor(step, options.warmup_steps, steps)
            optimizer.zero_grad()
            (torch.stack(losses).sum() / len(chosen)).backward()
            optimizer.step()
            step += 1
    return model.eval()


@torch.no_grad()
def evaluate_classifiers(model: EncoderClassifier, sets: Sequence[Pooled]) -> dict[str, dict[str, float]]:
    """{task: {metric: score x100}} by each task's own metrics."""
    found = {}
    for one in sets:
        predicted = model(one.means, one.task.name).argmax(dim=-1).tolist()
        found[one.task.name] = compute(one.task, [one.task.labels[number] for number in predicted], one.examples)
    return found


def encoder_decoder_scores(folder: Path, tasks: Sequence[Task]) -> dict[str, dict[str, float]]:
    """The whole model's scores on the validation sets, as its run wrote them (some tasks may be missing)."""
    path = folder / RESULTS
    written = json.loads(path.read_text()).get("validation", {}) if path.is_file() else {}
    return {task.name: written[task.name] for task in tasks if task.name in written}


@dataclass
class Classified:
    """Both models' validation scores {task: {metric: score}}, and what `classifier.json` records."""

    tasks: list[Task]
    encoder_only: dict[str, dict[str, float]]
    encoder_decoder: dict[str, dict[str, float]]
    results: dict[str, Any]
    path: Path


def classify(run_folder: str, options: ClassifierOptions) -> Classified:
    """Train and evaluate classifiers on a run's encoder; the results go into its folder.

    Raises:
        UserError: for a folder that is not a finished run, or a run without label tasks.
    """
    choice = Choice(run=run_folder, device=options.device)
    choice.check()
    config = choice.config(options.overrides)
    tasks = [task for task in expand_tasks(config.data.tasks, config.data) if task.kind == "label" and task.trains]
    if not tasks:
        raise UserError("none of the run's tasks has labels to classify")
    check_splits(tasks, config.data, ("train", "validation"))

    loaded = choice.load(config)
    pooled = {
        split: [pool_split(loaded, task, split, config, options.limit, options.batch_size) for task in tasks]
        for split in ("train", "validation")
    }
    model = train_classifiers(pooled["train"], options)
    only = evaluate_classifiers(model, pooled["validation"])
    whole = encoder_decoder_scores(Path(run_folder), tasks)
    results = {
        "tasks": only,
        "encoder_only": averages(tasks, only)["average"],
        "encoder_decoder": averages(tasks, whole)["average"] if len(whole) == len(tasks) else None,
        "limit": options.limit,
    }
    path = Path(run_folder) / CLASSIFIER
    write_json(path, results)
    return Classified(tasks, only, whole, results, path)
