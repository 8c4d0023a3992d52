"""`hdscale evaluate`: evaluate a run, an export, any seq2seq checkpoint, or an extractive-QA checkpoint on
MRQA.

One process, or one for each rank under `srun` (`torchrun` takes `--run` for an option of its own). What is
decoded is kept in the output folder: run again after an interruption, it goes on.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from hdscale.commands.predict import add_model_arguments, choice_of, positive
from hdscale.config import Config
from hdscale.data.sources import check_splits
from hdscale.data.tasks import SPLITS, Task, expand_tasks
from hdscale.errors import EXIT_DONE, UserError
from hdscale.evaluation.averages import averages
from hdscale.evaluation.decode import atomic_writer
from hdscale.evaluation.evaluate import SplitResult, evaluate_rows, evaluate_split
from hdscale.evaluation.extractive import SpanDecoder, windows_of
from hdscale.evaluation.metrics import check_metrics
from hdscale.load import Choice, Loaded
from hdscale.runs.ranks import RankGroup, SingleProcess

CHECKPOINT_DEFAULTS = ["data.max_source_length=512", "data.max_target_length=64"]
"""For checkpoints that no run's configuration stands behind."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument("--split", choices=SPLITS, default="test", help="default: test")
    parser.add_argument("--tasks", metavar="A,B", help="tasks or mixtures; default: the run's")
    parser.add_argument("--limit", type=positive, metavar="N", help="only the first N rows of each task")
    parser.add_argument(
        "--output",
        metavar="DIR",
        help="folder of predictions and results; default: RUN/evaluation, or ./evaluation",
    )


def run(args: argparse.Namespace) -> int:
    choice = choice_of(args)
    choice.check()
    config = choice.config(args.overrides if args.run_folder else [*CHECKPOINT_DEFAULTS, *args.overrides])
    if args.batch_size:
        config.eval.batch_size = args.batch_size
    tasks = tasks_of(args, config)
    if choice.kind() == "extractive":
        for task in tasks:
            if task.reader != "hdscale.data.tasks.mrqa.read":
                raise UserError(f"task {task.name}: an extractive checkpoint can only be evaluated on MRQA tasks")
    folder = Path(args.output or (Path(args.run_folder) / "evaluation" if args.run_folder else "evaluation"))
    make_folder(folder)
    ranks = start_ranks(config, choice)
    try:
        ranks.on_main(check_splits, tasks, config.data, [args.split])
        if ranks.world_size > 1:
            choice = Choice(args.run_folder, args.model, args.tokenizer, str(ranks.device), args.dtype)
        loaded = choice.load(config)
        results = evaluate_loaded(loaded, tasks, args.split, config, folder, args.limit, ranks)
        ranks.on_main(report, results, tasks, args, folder)
    finally:
        close = getattr(ranks, "close", None)
        if close is not None:
            close()
    return EXIT_DONE


def tasks_of(args: argparse.Namespace, config: Config) -> list[Task]:
    """The tasks asked for, each with the split and with metrics that can be computed.

    Raises:
        UserError: an unknown task, a checkpoint without `--tasks`, a split that a task lacks.
    """
    names: list[Any] = config.data.tasks
    if args.tasks is not None:
        names = [name.strip() for name in args.tasks.split(",") if name.strip()]
    elif args.run_folder is None:
        exported = Path(args.model) / "hdscale_config.json"
        if not exported.is_file():
            raise UserError("say which tasks to evaluate on: --tasks rte,mnli (or a mixture: glue, mrqa, summ_nli)")
        names = json.loads(exported.read_text()).get("tasks", [])
    tasks = expand_tasks(names, config.data)
    for task in tasks:
        check_metrics(task)
        if args.split not in task.splits:
            raise UserError(f"task {task.name} has no {args.split} split; it has: {', '.join(task.splits)}")
    return tasks


def make_folder(folder: Path) -> None:
    """Create the output folder, or say why it cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"--output {folder}: cannot be written ({error.strerror})") from error


def start_ranks(config: Config, choice: Choice) -> Any:
    """The group that shares the work: this process alone, or the ranks that a launcher started."""
    from hdscale.engine.environment import read_environment

    launch = read_environment(os.environ)
    if launch.world_size == 1:
        return SingleProcess()
    from hdscale.engine.ranks import Ranks

    return Ranks.start(launch, config.run.threads, device=choice.device)


def evaluate_loaded(
    loaded: Loaded,
    tasks: list[Task],
    split: str,
    config: Config,
    folder: Path,
    limit: int | None,
    ranks: RankGroup,
) -> dict[str, SplitResult]:
    """{task: result} of a loaded model, whatever its kind."""
    results = {}
    with ProgressBars(ranks) as progress:
        for task in tasks:
            common = {
                "folder": folder, "step": loaded.version, "limit": limit, "ranks": ranks,
                "progress": functools.partial(progress, task.name),
            }  # fmt: skip
            if loaded.extractive:
                rows, examples = windows_of(task, split, loaded.tokenizer, config.data, limit)
                decoder = SpanDecoder(loaded.model, loaded.tokenizer)
                results[task.name] = evaluate_rows(
                    loaded.model, loaded.tokenizer, task, split, rows, examples, config.eval,
                    decoding=decoder.decoding, decoder=decoder, **common,
                )  # fmt: skip
            else:
                task_id = loaded.task_ids.get(task.name, -1) if loaded.task_ids else None
                results[task.name] = evaluate_split(
                    loaded.model,
                    loaded.tokenizer,
                    task,
                    split,
                    config.eval,
                    data=config.data,
                    task_id=task_id,
                    **common,
                )
    return results


class ProgressBars:
    """One bar a task on rank 0's standard error, where that is a terminal."""

    def __init__(self, ranks: RankGroup) -> None:
        from rich.progress import Progress

        console = Console(stderr=True)
        self.bar = Progress(console=console, disable=ranks.rank != 0 or not console.is_terminal)
        self.tasks: dict[str, Any] = {}

    def __enter__(self) -> ProgressBars:
        self.bar.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.bar.__exit__(*error)

    def __call__(self, name: str, done: int, total: int) -> None:
        if name not in self.tasks:
            self.tasks[name] = self.bar.add_task(name, total=total)
        self.bar.update(self.tasks[name], completed=done)


def report(results: dict[str, SplitResult], tasks: list[Task], args: argparse.Namespace, folder: Path) -> None:
    """Write `results.<split>.json` and print the table."""
    metrics = {name: result.metrics for name, result in results.items()}
    found = averages(tasks, metrics)
    path = folder / f"results.{args.split}.json"
    with atomic_writer(path) as stream:
        json.dump(
            {
                "model": args.run_folder or args.model,
                "split": args.split,
                "limit": args.limit,
                "tasks": metrics,
                **found,
                "notes": {name: result.notes for name, result in results.items()},
            },
            stream,
            indent=2,
        )
        stream.write("\n")
    table = Table(title=f"{args.run_folder or args.model}: {args.split}")
    for heading in ("task", "metric", "score", "rows"):
        table.add_column(heading, justify="left" if heading in ("task", "metric") else "right")
    for name, result in results.items():
        for metric, value in result.metrics.items():
            table.add_row(name, metric, f"{value:.2f}", str(result.notes["rows"]))
    table.add_section()
    for name, value in found.items():
        table.add_row(name, "", f"{value:.2f}", "")
    console = Console()
    console.print(table)
    splitters = {
        result.notes["sentence_splitter"] for result in results.values() if "sentence_splitter" in result.notes
    }
    if splitters:
        console.print(f"ROUGE-Lsum sentences by: {', '.join(sorted(splitters))}")
    console.print(f"written: {path}", soft_wrap=True)
