"""`hdscale evaluate`: evaluate a run, an export, any seq2seq checkpoint, or an extractive-QA checkpoint on MRQA.

One process, or one per rank under `srun` (not `torchrun`, which would take `--run` for its own option). What is decoded
stays in the output folder: after an interruption the same command resumes.
"""

from __future__ import annotations

import argparse
import dataclasses
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
from hdscale.engine.environment import read_environment
from hdscale.engine.ranks import Ranks
from hdscale.errors import EXIT_DONE, UserError
from hdscale.evaluation.evaluator import Evaluation, Evaluator, SplitEvaluator
from hdscale.evaluation.extractive import ExtractiveEvaluator, check_extractive
from hdscale.evaluation.metrics import check_metrics
from hdscale.files import write_json
from hdscale.load import Choice, Loaded
from hdscale.modeling.config import CONFIG_FILE
from hdscale.runs.progress import RowProgress
from hdscale.runs.ranks import RankGroup, SingleProcess

CHECKPOINT_DEFAULTS = ["data.max_source_length=512", "data.max_target_length=64"]
"""For checkpoints that do not come with the configuration of a run."""


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
        check_extractive(tasks)
    folder = Path(args.output or (Path(args.run_folder) / "evaluation" if args.run_folder else "evaluation"))
    make_folder(folder)
    ranks = start_ranks(config, choice)
    try:
        ranks.on_main(check_splits, tasks, config.data, [args.split])
        if isinstance(ranks, Ranks):
            choice = dataclasses.replace(choice, device=str(ranks.device))
        loaded = choice.load(config)
        evaluator = evaluator_of(loaded, config, folder, ranks)
        with RowProgress(ranks.rank == 0) as progress:
            evaluation = evaluator.evaluate(tasks, args.split, loaded.version, args.limit, progress)
        ranks.on_main(report, evaluation, args, folder)
    finally:
        ranks.close()
    return EXIT_DONE


def tasks_of(args: argparse.Namespace, config: Config) -> list[Task]:
    """The tasks asked for, each with the split and with metrics that can be computed.

    Raises:
        UserError: an unknown task, a checkpoint without `--tasks`, a split that a task does not have.
    """
    names: list[Any] = config.data.tasks
    if args.tasks is not None:
        names = [name.strip() for name in args.tasks.split(",") if name.strip()]
    elif args.run_folder is None:
        exported = Path(args.model) / CONFIG_FILE
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
    """Create the output folder, or say why that fails."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"--output {folder}: cannot be written ({error.strerror}); choose another folder") from error


def start_ranks(config: Config, choice: Choice) -> Ranks | SingleProcess:
    """The ranks that a launcher started, or this process alone."""
    launch = read_environment(os.environ)
    if launch.world_size == 1:
        return SingleProcess()
    return Ranks.start(launch, config.run.threads, device=choice.device)


def evaluator_of(loaded: Loaded, config: Config, folder: Path, ranks: RankGroup) -> SplitEvaluator:
    """The evaluator of a loaded model, whatever its kind."""
    if loaded.extractive:
        return ExtractiveEvaluator(
            model=loaded.model,
            tokenizer=loaded.tokenizer,
            settings=config.eval,
            data=config.data,
            folder=folder,
            ranks=ranks,
        )
    return Evaluator(
        model=loaded.model,
        tokenizer=loaded.tokenizer,
        task_ids=loaded.task_ids,
        settings=config.eval,
        data=config.data,
        folder=folder,
        ranks=ranks,
    )


def report(evaluation: Evaluation, args: argparse.Namespace, folder: Path) -> None:
    """Write `results.<split>.json` and print the table."""
    model, averages, results = args.run_folder or args.model, evaluation.averages(), evaluation.results
    path = folder / f"results.{args.split}.json"
    write_json(
        path,
        {
            "model": model,
            "split": args.split,
            "limit": args.limit,
            "tasks": evaluation.metrics(),
            **averages,
            "notes": evaluation.notes(),
        },
        durable=True,
    )
    table = Table(title=f"{model}: {args.split}")
    for heading in ("task", "metric", "score", "rows"):
        table.add_column(heading, justify="left" if heading in ("task", "metric") else "right")
    for name, result in results.items():
        for metric, value in result.metrics.items():
            table.add_row(name, metric, f"{value:.2f}", str(result.notes["rows"]))
    table.add_section()
    for name, value in averages.items():
        table.add_row(name, "", f"{value:.2f}", "")
    console = Console()
    console.print(table)
    splitters = {
        result.notes["sentence_splitter"] for result in results.values() if "sentence_splitter" in result.notes
    }
    if splitters:
        console.print(f"ROUGE-Lsum splits sentences by: {', '.join(sorted(splitters))}")
    console.print(f"written: {path}", soft_wrap=True)
