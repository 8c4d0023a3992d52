"""The whole run, from top to bottom: configuration, data, model, engine, loop, results.

deepspeed hdscale/train.py --config configs/glue_large.yaml key=value ...     one node
srun python hdscale/train.py --config ... key=value ...                       under SLURM (see slurm/)
hdscale train --config ... key=value ...                                      one process
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

if __name__ == "__main__":
    # `deepspeed hdscale/train.py` puts hdscale/ itself first on the path: the repository's root belongs there,
    # so that the checkout runs without being installed
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import dataclasses
import math
from typing import Any

import torch

from hdscale.bases.base import base_config, tokenizer_name
from hdscale.config import Config, load_config, model_config, to_dict
from hdscale.data.batches import Row, collate
from hdscale.data.feed import Feed
from hdscale.data.micro_batches import deal
from hdscale.data.mixture import Mixture
from hdscale.data.sources import check_splits
from hdscale.data.tasks import Task, expand_tasks
from hdscale.data.tokenize import load_tokenizer, tokenized_split
from hdscale.engine.checkpoint import load_newest_checkpoint, save_checkpoint
from hdscale.engine.compilation import compile_for_training, parse_compile
from hdscale.engine.deepspeed_config import resolve_deepspeed_config
from hdscale.engine.deepspeed_engine import Engine, build_engine
from hdscale.engine.environment import read_environment, set_interface
from hdscale.engine.preemption import Preemption
from hdscale.engine.ranks import Ranks
from hdscale.engine.rendezvous import RendezvousError
from hdscale.engine.settings import TrainSettings
from hdscale.engine.steps import Steps
from hdscale.engine.token_budget import AUTO, SMALLEST, find_token_budget, parse_token_budget
from hdscale.errors import EXIT_BROKEN, EXIT_DONE, EXIT_PREEMPTED, EXIT_USER_ERROR, UserError, report
from hdscale.evaluation.averages import check_select
from hdscale.evaluation.evaluator import Evaluation, EvaluationStopped, Evaluator
from hdscale.evaluation.metrics import check_metrics
from hdscale.evaluation.settings import EvalSettings
from hdscale.modeling.export import read_trainables
from hdscale.modeling.hypernetwork import GeneratedAdapterHeads
from hdscale.modeling.methods import method_class
from hdscale.modeling.model import AdaptedModel, build_model
from hdscale.ops.backend import availability
from hdscale.runs.folder import RunFolder
from hdscale.runs.log import RunLog
from hdscale.runs.results import final_results, print_results
from hdscale.runs.scores import task_score
from hdscale.runs.settled import Settled


@dataclasses.dataclass
class Progress:
    """What a run has to remember beside weights and moments; saved in each checkpoint's `state.json`.

    Attributes:
        evaluated: step of the last evaluation on the validation sets.
        best: {what is selected by: {"score", "step"}}; one entry, or one a task with `eval.select=per_task`.
        validation: metrics of the last evaluation.
        seconds, samples, tokens: spent on training so far, over all sessions.
    """

    evaluated: int = 0
    best: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    validation: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    seconds: float = 0.0
    samples: int = 0
    tokens: int = 0


def train(config: Config, ranks: Ranks, fresh: bool = False) -> int:
    """Train, evaluate and test; or go on where an earlier session of the same run stopped.

    Args:
        config: the run.
        ranks: this process's place among the ranks.
        fresh: start anew, the earlier run of this name moved aside.

    Returns:
        exit code: 0 done, 75 pre-empted with a checkpoint.

    Raises:
        UserError: for whatever the user can mend, before anything expensive where it can be known there.
    """
    tasks = check(config, ranks.world_size)
    ranks.on_main(check_splits, tasks, config.data)
    folder = RunFolder(Path(config.run.dir) / config.run.name)
    continued = ranks.on_main(folder.open, to_dict(config), fresh)
    if results := ranks.on_main(folder.finished):
        if ranks.is_main:
            print(f"{folder.path} is done already (--fresh starts anew)")
            print_results(results)
        return EXIT_DONE

    with RunLog(folder.path, config, ranks) as log, Preemption(ranks) as preemption:
        log.info(str(ranks.launch))

        # ---- data: one global order of all tasks' rows
        tokenizer = load_tokenizer(tokenizer_name(config.model), config.model.revision)
        trained = [task for task in tasks if task.trains]
        task_ids = {task.name: trained.index(task) if task in trained else -1 for task in tasks}
        mixture = Mixture(
            [tokenized_split(task, "train", tokenizer, config.data) for task in trained],
            config.run.seed,
            config.data.temperature,
            config.data.fraction,
            single_task=config.data.single_task_batches,
        )
        log.info("mixture: " + ", ".join(f"{name} {share:.1%}" for name, share in mixture.proportions.items()))
        if config.train.epochs is not None:
            config.train.max_steps = max(
                1, math.ceil(config.train.epochs * len(mixture) / config.train.global_batch_size)
            )
            log.info(f"{config.train.epochs:g} epochs of {len(mixture):,} rows: {config.train.max_steps:,} steps")

        # ---- model and engine: a frozen base, float32 masters of what trains
        dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[config.train.dtype]
        model = build_model(
            model_config(config), dtype, ranks.device, seed=config.run.seed, trainable_dtype=torch.float32
        )
        model.label_smoothing = config.train.label_smoothing
        engine = build_engine(model, config, ranks)
        log.info(engine_line(engine, config))

        # ---- what is found out once and kept with the run
        settled = Settled(folder.settled, ranks)
        keep_backend(model, settled, log)
        budget = parse_token_budget(config.train.tokens_per_micro_batch, engine.stage)
        pad_id = tokenizer.pad_token_id
        sample = mixture.rows(0, config.train.global_batch_size)
        passes = micro_batches_of(sample, ranks, config.train, SMALLEST if budget == AUTO else budget)
        compile_for_training(engine, config.train.compile, [collate(rows, pad_id) for rows in passes], settled, log)
        if budget == AUTO:
            longest = (config.data.max_source_length, config.data.max_target_length)
            budget = settled.once(
                "tokens_per_micro_batch", lambda: find_token_budget(engine, sample, pad_id, config.train, longest, log)
            )

        # ---- the checkpoint to go on from
        progress = Progress()
        if continued and (state := load_newest_checkpoint(engine, folder.checkpoints, log)):
            progress = Progress(**state["progress"])
        log.start(engine.step, config.train.max_steps)

        evaluator = Evaluator(
            model=model,
            tokenizer=tokenizer,
            task_ids=task_ids,
            settings=config.eval,
            data=config.data,
            folder=folder.predictions,
            ranks=ranks,
            should_stop=preemption.agreed,
            lockstep=engine.stage == 3,
        )
        evaluate = LoggedEvaluator(engine, evaluator, folder, log)

        # ---- the loop: evaluate when due, save when due or asked to stop, else one more step
        with Feed(
            lambda step: mixture.rows(step, config.train.global_batch_size),
            lambda rows: micro_batches_of(rows, ranks, config.train, budget),
            pad_id,
            engine.step,
            config.train.max_steps,
            pin=ranks.device.type == "cuda",
        ) as feed:
            steps = Steps(engine, feed, log, progress)
            while True:
                step = engine.step
                if evaluation_due(config, step) and progress.evaluated < step:
                    steps.finish()
                    try:
                        evaluate_and_keep_best(evaluate, trained, progress)
                    except EvaluationStopped:
                        save_state(engine, folder, config, progress, log)
                        return preempted(log, step)
                stop = preemption.agreed()
                last = step == config.train.max_steps
                if step > 0 and (stop or last or step % config.train.checkpoint_every == 0):
                    steps.finish()
                    save_state(engine, folder, config, progress, log)
                if stop:
                    return preempted(log, step)
                if last:
                    break
                steps.take()

        # ---- the best model's test, its export, the results
        log.info("test" if config.eval.test else "no test (eval.test=false)")
        try:
            final, notes = final_evaluation(evaluate, tasks, progress)
        except EvaluationStopped:
            # no save: the last step's checkpoint is there, and the engine may hold the best weights by now
            return preempted(log, engine.step)
        export(engine, folder.adapter)
        results = ranks.on_main(
            final_results, config, ranks, model, tasks, final, notes, progress, engine.step, folder.results
        )
        log.close()
        if ranks.is_main:
            print_results(results)
    return EXIT_DONE


def check(config: Config, world_size: int) -> list[Task]:
    """What can be wrong with a configuration by itself, before anything is loaded or overwritten; the run's tasks."""
    tasks = expand_tasks(config.data.tasks, config.data)
    for task in tasks:
        check_metrics(task)
    check_select(config.eval.select, [task for task in tasks if task.trains] or tasks)
    model = model_config(config)
    method_class(model.method).check(model)
    base_config(model.model)
    resolved = resolve_deepspeed_config(config.deepspeed, config.train, world_size)
    stage = resolved["zero_optimization"]["stage"]
    parse_token_budget(config.train.tokens_per_micro_batch, stage)
    parse_compile(config.train.compile, stage)
    for key in ("checkpoint_every", "keep_checkpoints", "log_every"):
        if getattr(config.train, key) < 1:
            raise UserError(f"train.{key}={getattr(config.train, key)} must be at least 1")
    return tasks


def engine_line(engine: Engine, config: Config) -> str:
    """One line of the log: what trains, and how."""
    trainable = sum(parameter.numel() for parameter in engine.parameters.values())
    return (
        f"{config.method.name} on {config.model.name}: {trainable:,} trainable parameters, ZeRO stage {engine.stage}, "
        f"{config.train.dtype}, {engine.ranks.world_size} ranks on {engine.ranks.device.type}, "
        f"{engine.ranks.threads} threads each"
    )


def micro_batches_of(rows: list[Row], ranks: Ranks, train: TrainSettings, budget: int | None) -> list[list[Row]]:
    """This rank's micro-batches of a global batch."""
    return deal(rows, ranks.world_size, train.micro_batch_size, train.sort_by_length, budget)[ranks.rank]


def keep_backend(model: AdaptedModel, settled: Settled, log: RunLog) -> None:
    """`method.backend=auto` is decided by the run's first session: another implementation has other bits."""
    generators = [
        module for module in model.modules() if isinstance(module, GeneratedAdapterHeads) and module.backend == "auto"
    ]
    if not generators:
        return
    device = next(model.parameters()).device.type
    kernels = {"cpu": "cpp", "cuda": "cuda"}.get(device, "torch")
    kept = settled.once("backend", lambda: kernels if availability(kernels).usable else "torch")
    log.info(f"generated adapters are computed by: {kept}")
    if kept == "torch":
        for module in generators:
            module.backend = kept
    elif kept != kernels or not availability(kernels).usable:
        log.warning(
            f"the run began with the {kept} kernels, which are not to be had here: losses will differ in their last bits"
        )


def evaluation_due(config: Config, step: int) -> bool:
    """Whether the validation sets are evaluated after this step: every so many, and at the end if the best is wanted."""
    if config.eval.every and step and step % config.eval.every == 0:
        return True
    return step == config.train.max_steps and config.eval.select != "last"


@dataclasses.dataclass
class LoggedEvaluator:
    """Evaluates the model that the engine trains, and logs the results."""

    engine: Engine
    evaluator: Evaluator
    folder: RunFolder
    log: RunLog

    @property
    def settings(self) -> EvalSettings:
        """`eval.*`"""
        return self.evaluator.settings

    def __call__(self, tasks: list[Task], split: str, step: int | str, limit: int | None) -> Evaluation:
        """Metrics of the tasks on a split, logged; `step` names what is evaluated.

        Raises:
            EvaluationStopped: if the run is to stop; what is decoded already is found again.
        """
        with self.engine.evaluating():
            evaluation = self.evaluator.evaluate(tasks, split, step, limit, self.log.evaluating(split))
        selection = evaluation.selection(self.settings.select)
        self.log.evaluation(self.engine.step, split, evaluation.metrics(), evaluation.averages(), selection)
        return evaluation


def evaluate_and_keep_best(evaluate: LoggedEvaluator, tasks: list[Task], progress: Progress) -> None:
    """Evaluate the validation sets; where a score is the best so far, export the trainables of this step."""
    engine, select = evaluate.engine, evaluate.settings.select
    evaluation = evaluate(tasks, "validation", engine.step, evaluate.settings.limit)
    progress.validation = evaluation.metrics()
    scores = {"average": evaluation.selection(select)}
    if select == "per_task":
        scores = {task: task_score(metrics) for task, metrics in progress.validation.items()}
    improved = [key for key, score in scores.items() if key not in progress.best or score > progress.best[key]["score"]]
    for key in improved:
        progress.best[key] = {"score": scores[key], "step": engine.step}
    if improved and select != "last":
        export(engine, evaluate.folder.best_folder(engine.step))
    progress.evaluated = engine.step


def final_evaluation(
    evaluate: LoggedEvaluator, tasks: list[Task], progress: Progress
) -> tuple[dict[str, dict[str, float]], dict[str, dict[str, Any]]]:
    """Metrics of each task's test split (its validation split where it has none) by the best model for it, and notes.

    The engine is left with the weights of the overall best (the first task's, with `eval.select=per_task`).
    """
    engine, settings = evaluate.engine, evaluate.settings
    final: dict[str, dict[str, float]] = {}
    notes: dict[str, dict[str, Any]] = {}
    overall = "average" if "average" in progress.best else next(iter(progress.best), "last")
    steps = {task.name: progress.best.get(task.name, progress.best.get(overall, {})).get("step") for task in tasks}
    if settings.select == "last":
        steps = dict.fromkeys(steps)
    # the overall best comes last, so that it is what the engine holds in the end
    last = steps[tasks[0].name]
    for step in sorted(set(steps.values()), key=lambda step: (step == last, step or 0)):
        if step is not None:
            engine.load_trainables(read_trainables(evaluate.folder.best_folder(int(step))))
        for split in ("test", "validation"):
            own = [task for task in tasks if ("test" if "test" in task.splits else "validation") == split]
            members = [task for task in own if steps[task.name] == step]
            if members and settings.test:
                evaluation = evaluate(members, split, f"best-{int(step or engine.step)}", settings.test_limit)
                final |= evaluation.metrics()
                notes |= evaluation.notes()
    return final or progress.validation, notes


def export(engine: Engine, folder: Path) -> None:
    """Write the float32 masters of the trainables as an export, on rank 0."""
    # gathering is collective, keeping is not
    tensors = {name: tensor for name, tensor in engine.trainable_tensors() if engine.ranks.is_main}
    engine.ranks.on_main(engine.module.save_pretrained, str(folder), tensors)


def save_state(engine: Engine, folder: RunFolder, config: Config, progress: Progress, log: RunLog) -> None:
    """Save a checkpoint, and then drop exports that nothing refers to any more."""
    state = {"progress": dataclasses.asdict(progress)}
    path = save_checkpoint(engine, folder.checkpoints, state, keep=config.train.keep_checkpoints)
    log.info(f"step {engine.step}: saved {path}")
    if engine.ranks.is_main:
        folder.prune_best({int(best["step"]) for best in progress.best.values()})


def preempted(log: RunLog, step: int) -> int:
    """The way out when asked to stop: the checkpoint is written."""
    log.info(f"step {step}: asked to stop; run the same command again to go on")
    return EXIT_PREEMPTED


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from hdscale.commands.arguments import add_config_arguments

    add_config_arguments(parser)
    parser.add_argument("--fresh", action="store_true", help="start anew; an earlier run of this name is moved aside")
    # the deepspeed launcher passes it; the environment says the same
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)


def run(args: argparse.Namespace) -> int:
    """One rank's whole life, from its environment to its exit code; only rank 0 prints what is wrong."""
    ranks, rank = None, 0
    try:
        launch = read_environment(os.environ)
        rank = launch.rank
        config = load_config(args.config, args.overrides)
        set_interface(config.cluster.interface)
        ranks = Ranks.start(launch, config.run.threads, rendezvous_seconds=config.cluster.rendezvous_timeout)
        return train(config, ranks, args.fresh)
    except UserError as error:
        report(error, show=rank == 0)
        return EXIT_USER_ERROR
    except RendezvousError as error:
        # each rank has its own view of who is missing; not a mistake of the user's, so a job tries again
        print(f"hdscale: {error}", file=sys.stderr, flush=True)
        return EXIT_BROKEN
    finally:
        if ranks is not None:
            ranks.close()


def main() -> int:
    """For `deepspeed hdscale/train.py` and `srun python hdscale/train.py`."""
    parser = argparse.ArgumentParser(
        prog="train.py", description="Train, evaluate and test a model.", allow_abbrev=False
    )
    add_arguments(parser)
    return run(parser.parse_args())


if __name__ == "__main__":
    sys.exit(main())
