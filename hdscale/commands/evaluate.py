"""`hdscale evaluate`: evaluate a run, an export, any seq2seq checkpoint, or an extractive-QA checkpoint on MRQA.

One process, or one per rank under `srun` (not `torchrun`, which would take `--run` for its own option). What is decoded
stays in the output folder: after an interruption the same command resumes.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from hdscale.commands.predict import add_model_arguments, choice_of, positive
from hdscale.config import Config
from hdscale.data.sources import check_splits
from hdscale.data.tasks import SPLITS, Task, expand_tasks, registry
from hdscale.engine.environment import read_environment
from hdscale.engine.ranks import Ranks
from hdscale.errors import EXIT_DONE, UserError
from hdscale.evaluation.averages import averages
from hdscale.evaluation.evaluator import Evaluation, Evaluator, SplitEvaluator
from hdscale.evaluation.extractive import ExtractiveEvaluator, check_extractive
from hdscale.evaluation.metrics import check_metrics
from hdscale.files import write_json
from hdscale.load import Choice, Loaded
from hdscale.modeling.config import CONFIG_FILE
from hdscale.runs.progress import RowProgress
from hdscale.runs.ranks import RankGroup, SingleProcess
from hdscale.runs.results import RESULTS_FORMAT

CHECKPOINT_DEFAULTS = ["data.max_source_length=512", "data.max_target_length=64"]
"""For checkpoints that do not come with the configuration of a run."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument("--split", choices=SPLITS, default="test", help="default: test")
    parser.add_argument("--tasks", metavar="A,B", help="tasks or mixtures; default: the run's")
    parser.add_argument("--limit", type=positive, metavar="N", help="a seeded sample of N rows of each task")
    parser.add_argument(
        "--output",
        metavar="DIR",
        help="folder of predictions and results; default: RUN/evaluation, or ./evaluation/MODEL",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the results that the folder has already")


def run(args: argparse.Namespace) -> int:
    choice = choice_of(args)
    choice.check()
    config = choice.config(args.overrides if args.run_folder else [*CHECKPOINT_DEFAULTS, *args.overrides])
    if args.batch_size:
        config.eval.batch_size = args.batch_size
    tasks = tasks_of(args, config)
    if choice.kind() == "extractive":
        check_extractive(tasks)
    own = Path(args.run_folder) / "evaluation" if args.run_folder else Path("evaluation") / file_name(args.model)
    folder = Path(args.output) if args.output else own
    make_folder(folder)
    ranks = start_ranks(config, choice)
    try:
        ranks.on_main(check_splits, tasks, config.data, [args.split])
        if isinstance(ranks, Ranks):
            choice = dataclasses.replace(choice, device=str(ranks.device))
        path = folder / f"results.{args.split}.json"
        loaded = choice.load(config)
        for task in tasks:
            loaded.task_id(task.name, args.unseen_task)
        identity = {
            "model": args.run_folder or args.model,
            "weights": loaded.version,
            "split": args.split,
            "limit": args.limit,
            "num_beams": config.eval.num_beams,
            "mrqa_score": config.eval.mrqa_score,
            "mrqa_empty": config.eval.mrqa_empty,
            "count_start_token": config.eval.count_start_token,
            "unseen_task": args.unseen_task if loaded.conditioned_on_tasks else None,
        }
        earlier = {} if args.overwrite else ranks.on_main(check_folder, path, identity)
        evaluator = evaluator_of(loaded, config, folder, ranks)
        with RowProgress(ranks.rank == 0) as progress:
            evaluation = evaluator.evaluate(tasks, args.split, loaded.version, args.limit, progress)
        known = [*tasks, *known_tasks(earlier, config, tasks)]
        report = ranks.on_main(write_report, evaluation, path, identity, earlier, known)
        if ranks.rank == 0:
            print_report(evaluation, report, path)
    finally:
        ranks.close()
    return EXIT_DONE


def file_name(model: str) -> str:
    """A hub id or a path as the name of a folder."""
    return re.sub(r"[^\w.=+-]+", "_", str(model).strip("/")).strip("._") or "model"


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


def known_tasks(earlier: dict[str, Any], config: Config, tasks: list[Task]) -> list[Task]:
    """The tasks of earlier scores, as far as the configuration knows them."""
    named = {task.name for task in tasks}
    known, _ = registry(config.data)
    return [known[name] for name in earlier.get("tasks", {}) if name in known and name not in named]


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


def check_folder(path: Path, identity: dict[str, Any]) -> dict[str, Any]:
    """The results that a file has already, {} if there is none; its scores stay beside those of other tasks.

    Args:
        path: `results.<split>.json`. identity: model, weights, rows and settings of this evaluation.

    Raises:
        UserError: if the file has the results of another model, or of other rows or settings.
    """
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}); remove it, or choose another --output") from error
    for key, value in identity.items():
        if found.get(key) != value:
            raise UserError(
                f"{path} has results of another {key} ({found.get(key)}, now {value}); choose another --output, or "
                "replace them by --overwrite"
            )
    return found


def write_report(
    evaluation: Evaluation, path: Path, identity: dict[str, Any], earlier: dict[str, Any], tasks: list[Task]
) -> dict[str, Any]:
    """Write `results.<split>.json`: these scores, and those of other tasks that it has already."""
    scores = {score["task"]: score for score in earlier.get("scores", [])}
    scores |= {score.task: dataclasses.asdict(score) for score in evaluation.scores(None, "given")}
    known = {task.name: task for task in tasks}
    metrics = {name: score["metrics"] for name, score in scores.items()}
    report = {
        "format": RESULTS_FORMAT,
        **identity,
        "scores": list(scores.values()),
        "tasks": metrics,
        **averages([known[name] for name in metrics if name in known], metrics),
        "notes": earlier.get("notes", {}) | evaluation.notes(),
    }
    write_json(path, report, durable=True)
    return report


def print_report(evaluation: Evaluation, report: dict[str, Any], path: Path) -> None:
    """The table of what was evaluated now, and where it is written."""
    table = Table(title=f"{report['model']}: {report['split']}")
    for heading in ("task", "metric", "score", "rows"):
        table.add_column(heading, justify="left" if heading in ("task", "metric") else "right")
    for score in evaluation.scores(None, "given"):
        for metric, value in score.metrics.items():
            table.add_row(score.task, metric, f"{value:.2f}", score.rows_shown)
    table.add_section()
    for name, value in evaluation.averages().items():
        table.add_row(name, "", f"{value:.2f}", "")
    console = Console()
    console.print(table)
    notes = evaluation.notes().values()
    if splitters := {one["sentence_splitter"] for one in notes if "sentence_splitter" in one}:
        console.print(f"ROUGE-Lsum splits sentences with: {', '.join(sorted(splitters))}")
    console.print(f"written: {path}", soft_wrap=True)
