"""The whole run, from top to bottom: configuration, data, model, engine, loop, results.

deepspeed hdscale/train.py --config configs/glue_large.yaml key=value ...     one node
srun python hdscale/train.py --config ... key=value ...                       under SLURM (see slurm/)
hdscale train --config ... key=value ...                                      one process
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

if __name__ == "__main__":
    # `deepspeed hdscale/train.py` puts hdscale/ itself first on the path: the repository's root belongs there,
    # so that the checkout runs without being installed
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from hdscale.commands.train import main

    sys.exit(main())

import dataclasses
import math
from functools import partial
from itertools import islice
from typing import Any, cast

import torch

from hdscale.bases.sizes import tokenizer_name
from hdscale.config import Config, load_config, to_dict
from hdscale.data.batches import Row, collate
from hdscale.data.checks import check_labels, check_rouge, losses_of
from hdscale.data.feed import Feed
from hdscale.data.micro_batches import deal
from hdscale.data.mixture import Mixture
from hdscale.data.sources import check_split, check_splits, load_split
from hdscale.data.tasks import Task
from hdscale.data.tokenize import load_tokenizer, tokenized_split
from hdscale.engine.checkpoint import load_newest_checkpoint, save_checkpoint
from hdscale.engine.checks import WrongGradient, compare_gradients, plain_gradient
from hdscale.engine.deepspeed_engine import Engine, build_engine, parameter_counts
from hdscale.engine.determinism import cost_of_determinism, operators_are_named, prepare_determinism
from hdscale.engine.devices import OutOfGpuMemory, bf16_warning
from hdscale.engine.environment import read_environment, set_interface
from hdscale.engine.preemption import Preemption
from hdscale.engine.ranks import Ranks
from hdscale.engine.rendezvous import RendezvousError
from hdscale.engine.settings import TrainSettings
from hdscale.engine.steps import Steps
from hdscale.engine.tuning import SMALLEST, choose_backend, compile_for_training, find_token_budget, timed
from hdscale.errors import EXIT_BROKEN, EXIT_DONE, EXIT_PREEMPTED, EXIT_USER_ERROR, UserError, report
from hdscale.evaluation.evaluator import Evaluation, EvaluationStopped, Evaluator
from hdscale.evaluation.settings import EvalSettings
from hdscale.evaluation.summary import score_summary
from hdscale.files import write_json
from hdscale.modeling.export import read_trainables
from hdscale.modeling.model import AdaptedModel, build_model
from hdscale.ops.precision import DTYPES
from hdscale.resolve import ResolvedTasks, resolve
from hdscale.runs.folder import RunFolder
from hdscale.runs.log import RunLog
from hdscale.runs.progress import RowProgress
from hdscale.runs.provenance import provenance
from hdscale.runs.results import RESULTS_FORMAT, print_results
from hdscale.runs.scores import Score, task_score
from hdscale.runs.settled import Settled
from hdscale.runs.state import RunState

TOKENS_KEY = "tokens_per_micro_batch"
"""Entry of `settled.json`: most tokens per pass, or null for all of a rank's rows in one pass."""
ROUGE_ROWS = 1000
"""Training targets in which ROUGE must find something to read."""


def train(config: Config, ranks: Ranks, fresh: bool = False) -> int:
    """Train, evaluate and test; or resume where an earlier session of the same run stopped.

    Args:
        config: the run.
        ranks: this process's place among the ranks.
        fresh: start anew, the earlier run of this name moved aside.

    Returns:
        exit code: 0 done, 75 pre-empted with a checkpoint.

    Raises:
        UserError: for whatever the user can fix, before anything expensive where it can be known there.
    """
    resolved = resolve(config, ranks.world_size)
    tasks = resolved.tasks
    ranks.on_main(check_splits, tasks.all, config.data)
    folder = RunFolder(Path(config.run.dir) / config.run.name)
    continued = ranks.on_main(folder.open, to_dict(config), to_dict(Config()), fresh)
    if results := ranks.on_main(folder.finished):
        if ranks.is_main:
            print(f"{folder.path} is done already (--fresh starts anew)")
            print_results(results)
        return EXIT_DONE

    with open_log(folder, config, ranks) as log, Preemption(ranks) as preemption:
        log_machine(ranks, config, log)

        # ---- data: one global order of all tasks' rows
        tokenizer = load_tokenizer(tokenizer_name(config.model), config.model.revision)
        check_data(tasks, config, tokenizer, log)
        mixture = Mixture(
            [tokenized_split(task, "train", tokenizer, config.data) for task in tasks.trained],
            config.run.seed,
            config.data.temperature,
            config.data.fraction,
            single_task=config.data.single_task_batches,
        )
        log.info("mixture: " + ", ".join(f"{name} {share:.1%}" for name, share in mixture.proportions.items()))
        config = with_steps(config, len(mixture), log)

        # ---- model and engine: a frozen base, float32 masters of what trains
        model = build_model(
            resolved.model,
            DTYPES[config.train.dtype],
            ranks.device,
            seed=config.run.seed,
            trainable_dtype=torch.float32,
            label_smoothing=config.train.label_smoothing,
        )
        engine = build_engine(model, config.train, resolved.deepspeed, ranks, config.run.seed)
        log.info(engine_line(engine, config))

        # ---- what is measured once and kept with the run
        settled = Settled(folder.settled, ranks)
        choose_backend(model, settled, log)
        sample = mixture.rows(0, config.train.global_batch_size)
        begun = continued and ranks.on_main(folder.has_checkpoints)
        budget = tune(engine, sample, tokenizer.pad_token_id, config, settled, begun, log)

        # ---- the checkpoint to resume from
        state = RunState()
        if continued and (saved := load_newest_checkpoint(engine, folder.checkpoints, log)):
            state = RunState.from_dict(saved["progress"])
        log.start(engine.step, config.train.max_steps)

        evaluator = Evaluator(
            settings=config.eval,
            data=config.data,
            folder=folder.predictions,
            ranks=ranks,
            should_stop=preemption.agreed,
            lockstep=engine.stage == 3,
            model=model,
            tokenizer=tokenizer,
            task_ids=tasks.ids,
        )
        evaluate = LoggedEvaluator(engine, evaluator, folder, log)

        # ---- the loop: evaluate when due, save when due or asked to stop, else one more step
        with Feed(
            lambda step: mixture.rows(step, config.train.global_batch_size),
            lambda rows: micro_batches_of(rows, ranks, config.train, budget),
            tokenizer.pad_token_id,
            engine.step,
            config.train.max_steps,
            pin=ranks.device.type == "cuda",
        ) as feed:
            steps = Steps(engine, feed, log, state)
            check_first_step(steps, engine, sample, budget, tokenizer.pad_token_id, log)
            while True:
                step = engine.step
                if evaluation_due(config, step) and state.evaluated < step:
                    steps.finish()
                    try:
                        evaluate_and_keep_best(evaluate, tasks.trained, state)
                    except EvaluationStopped:
                        save_state(engine, folder, config, state, log)
                        return preempted(log, step)
                stop = preemption.agreed()
                last = step == config.train.max_steps
                if checkpoint_due(config, step, stop):
                    steps.finish()
                    save_state(engine, folder, config, state, log)
                if stop:
                    return preempted(log, step)
                if last:
                    break
                steps.next()

        # ---- the best model's test, its export, the results
        log.info("test" if config.eval.test else "no test (eval.test=false)")
        try:
            scores, notes = final_evaluation(evaluate, tasks.all, state)
        except EvaluationStopped:
            # no save: the last step's checkpoint is there, and the engine may have the best weights by now
            return preempted(log, engine.step)
        export(engine, folder.adapter)
        results = ranks.on_main(write_results, engine, config, tasks.all, scores, notes, state, folder.results)
        log.close()
        if ranks.is_main:
            print_results(results)
    return EXIT_DONE


def check_data(tasks: ResolvedTasks, config: Config, tokenizer: Any, log: RunLog) -> None:
    """Tokenise every split that the run will read, so that a mistake in any of their rows is found before training.

    What is in the cache already is not read again. The log says what the texts lose as tokens.

    Raises:
        UserError: for a missing split, a row that cannot be used, or labels that the tokenizer does not give back.
    """
    wanted = [(task, "train") for task in tasks.trained]
    if config.eval.every or config.eval.select != "last":
        wanted += [(task, "validation") for task in tasks.trained]
    if config.eval.test:
        wanted += [(task, "test" if "test" in task.splits else "validation") for task in tasks.all]
    for task in tasks.all:
        check_labels(task, tokenizer, config.data.max_target_length)
    with RowProgress(log.active) as progress:
        for number, (task, split) in enumerate(wanted, start=1):
            check_split(task, split)
            found = tokenized_split(task, split, tokenizer, config.data)
            progress("splits read", number, len(wanted))
            if split == "train":
                check_rouge(task, first_targets(task, config))
                if line := losses_of(task, found):
                    log.info(line)


def first_targets(task: Task, config: Config) -> list[str]:
    """Some of a task's training targets."""
    return [example.target for example in islice(load_split(task, "train", config.data), ROUGE_ROWS)]


def open_log(folder: RunFolder, config: Config, ranks: Ranks) -> RunLog:
    """The run's log, which rank 0 writes."""
    return RunLog(
        folder.path,
        config.run,
        config.train.log_every,
        active=ranks.is_main,
        memory=ranks.memory_gb,
        config=to_dict(config),
    )


def log_machine(ranks: Ranks, config: Config, log: RunLog) -> None:
    """What started the run, and whether its GPU suits the number type."""
    log.info(str(ranks.launch))
    if slow := bf16_warning(ranks.device, DTYPES[config.train.dtype]):
        log.warning(slow)


def with_steps(config: Config, rows: int, log: RunLog) -> Config:
    """The configuration with `train.max_steps` worked out from `train.epochs`, if that is given."""
    if config.train.epochs is None:
        return config
    steps = max(1, math.ceil(config.train.epochs * rows / config.train.global_batch_size))
    log.info(f"{config.train.epochs:g} epochs of {rows:,} rows: {steps:,} steps")
    return dataclasses.replace(config, train=dataclasses.replace(config.train, max_steps=steps))


def tune(
    engine: Engine, sample: list[Row], pad_id: int, config: Config, settled: Settled, begun: bool, log: RunLog
) -> int | None:
    """Compile the model if asked to, and find the number of tokens per pass; None where passes have a number of rows.

    Args:
        sample: the rows of the first global batch.
        begun: whether the run has checkpoints. One of version 0.1 has no entry for a number that the device decides: it
            goes on as it began, with all of a rank's rows in one pass.
    """
    train = config.train
    budget = SMALLEST if train.tokens_found_automatically else train.token_budget
    if train.passes_by_device:
        device = engine.ranks.device.type
        budget = settled.once(TOKENS_KEY, lambda: None if begun else train.default_token_budget(device))
    passes = [collate(rows, pad_id) for rows in micro_batches_of(sample, engine.ranks, train, budget)]
    compile_for_training(engine, train.compile, passes, settled, log)
    if train.deterministic and not begun and engine.ranks.device.type == "cuda" and engine.stage < 3:
        log.info(cost_of_determinism(lambda: timed(engine, passes[len(passes) // 2])))
    if not train.tokens_found_automatically:
        return budget
    longest = (config.data.max_source_length, config.data.max_target_length)
    return int(settled.once(TOKENS_KEY, lambda: find_token_budget(engine, sample, pad_id, train, longest, log)))


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


def check_first_step(
    steps: Steps, engine: Engine, sample: list[Row], budget: int | None, pad_id: int, log: RunLog
) -> None:
    """Take a new run's first step, and compare the gradient that DeepSpeed forms in it with plain backward passes'.

    Raises:
        WrongGradient: on every rank, if they differ by more than rounding.
    """
    train, world_size = engine.train, engine.ranks.world_size
    if not train.self_check or engine.step > 0:
        return
    parts = deal(sample, world_size, train.micro_batch_size, train.sort_by_length, budget)
    plain = plain_gradient(engine, [[partial(collate, rows, pad_id) for rows in of_rank] for of_rank in parts])
    steps.next()
    steps.finish()
    log.info(compare_gradients(engine, plain))


def evaluation_due(config: Config, step: int) -> bool:
    """Whether the validation sets are evaluated after this step: every `eval.every` steps, and at the end to select."""
    if config.eval.every and step and step % config.eval.every == 0:
        return True
    return step == config.train.max_steps and config.eval.select != "last"


def checkpoint_due(config: Config, step: int, stop: bool) -> bool:
    """Whether a checkpoint is saved after this step: every `train.checkpoint_every` steps, at the end, or to stop."""
    return step > 0 and (stop or step == config.train.max_steps or step % config.train.checkpoint_every == 0)


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
            EvaluationStopped: if the run is to stop; what is decoded already is kept.
        """
        with self.engine.evaluating():
            evaluation = self.evaluator.evaluate(tasks, split, step, limit, self.log.evaluating(split))
        selection = evaluation.selection(self.settings.select)
        self.log.evaluation(self.engine.step, split, evaluation.metrics(), evaluation.averages(), selection)
        return evaluation


def evaluate_and_keep_best(evaluate: LoggedEvaluator, tasks: list[Task], state: RunState) -> None:
    """Evaluate the validation sets; where a score is the best so far, export the trainables of this step."""
    engine, select = evaluate.engine, evaluate.settings.select
    evaluation = evaluate(tasks, "validation", engine.step, evaluate.settings.limit)
    compared = {"average": evaluation.selection(select)}
    if select == "per_task":
        compared = {task: task_score(metrics) for task, metrics in evaluation.metrics().items()}
    improved = [key for key, score in compared.items() if key not in state.best or score > state.best[key]["score"]]
    for key in improved:
        state.best[key] = {"score": compared[key], "step": engine.step}
    best, kept = evaluate.folder.best_folder(engine.step), select != "last"
    if improved and kept:
        export(engine, best)
    for score in evaluation.scores(
        engine.step, "best" if kept else "last", f"{best.parent.name}/{best.name}" if kept else None
    ):
        if not kept or "average" in improved or score.task in improved:
            state.selected[score.task] = dataclasses.asdict(score)
    state.evaluated = engine.step


def final_evaluation(
    evaluate: LoggedEvaluator, tasks: list[Task], state: RunState
) -> tuple[list[Score], dict[str, dict[str, Any]]]:
    """The scores of the selected weights, and notes: on validation as selected, and on test sets if they are wanted.

    A task without a test set is evaluated on all of its validation set in place of it. The engine is left with the
    weights of the overall best (the first task's, with `eval.select=per_task`).
    """
    engine, settings = evaluate.engine, evaluate.settings
    scores = {(score["task"], score["split"]): Score.from_dict(score) for score in state.selected.values()}
    notes: dict[str, dict[str, Any]] = {}
    overall = "average" if "average" in state.best else next(iter(state.best), "last")
    steps = {task.name: state.best.get(task.name, state.best.get(overall, {})).get("step") for task in tasks}
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
                at = int(step or engine.step)
                evaluation = evaluate(members, split, f"best-{at}", settings.test_limit)
                kept = step is not None
                place = f"best/{evaluate.folder.best_folder(at).name}" if kept else None
                found = evaluation.scores(at, "best" if kept else "last", place)
                scores |= {(score.task, score.split): score for score in found}
                notes |= evaluation.notes()
    order = {task.name: number for number, task in enumerate(tasks)}
    return sorted(scores.values(), key=lambda score: (order[score.task], score.split != "validation")), notes


def export(engine: Engine, folder: Path) -> None:
    """Write the float32 masters of the trainables as an export, on rank 0."""
    # gathering is collective, keeping is not
    tensors = {name: tensor for name, tensor in engine.trainable_tensors() if engine.ranks.is_main}
    engine.ranks.on_main(cast(AdaptedModel, engine.module).save_pretrained, str(folder), tensors)


def save_state(engine: Engine, folder: RunFolder, config: Config, state: RunState, log: RunLog) -> None:
    """Save a checkpoint, and then drop exports that nothing refers to any more."""
    saved = {"progress": dataclasses.asdict(state)}
    path = save_checkpoint(engine, folder.checkpoints, saved, keep=config.train.keep_checkpoints)
    log.info(f"step {engine.step}: saved {path}")
    if engine.ranks.is_main:
        folder.prune_best({int(best["step"]) for best in state.best.values()})


def preempted(log: RunLog, step: int) -> int:
    """The exit code when asked to stop; the checkpoint is written."""
    log.info(f"step {step}: asked to stop; run the same command again to resume")
    return EXIT_PREEMPTED


def write_results(
    engine: Engine,
    config: Config,
    tasks: list[Task],
    scores: list[Score],
    notes: dict[str, dict[str, Any]],
    state: RunState,
    path: Path,
) -> dict[str, Any]:
    """Put the results together and write `results.json`, complete or not at all."""
    trainable, base = parameter_counts(engine.module)
    results = {
        "format": RESULTS_FORMAT,
        "name": config.run.name,
        **score_summary(tasks, scores, notes, config.data, config.eval.test_limit),
        "best": state.best,
        "steps": engine.step,
        "seconds": round(state.seconds, 3),
        "samples": state.samples,
        "tokens": state.tokens,
        "trainable": trainable,
        "base_parameters": base,
        "trainable_percent": 100.0 * trainable / base,
        "provenance": provenance(engine.ranks.computation, config.run.seed, config.train.dtype),
        "config": to_dict(config),
    }
    write_json(path, results)
    return results


def run(config_file: str, overrides: list[str], fresh: bool = False) -> int:
    """One rank's whole life, from its environment to its exit code; only rank 0 prints what is wrong."""
    ranks, rank = None, 0
    try:
        launch = read_environment(os.environ)
        rank = launch.rank
        config = load_config(config_file, overrides)
        set_interface(config.cluster.interface)
        if config.train.deterministic:
            prepare_determinism()
        ranks = Ranks.start(launch, config.run.threads, rendezvous_seconds=config.cluster.rendezvous_timeout)
        with operators_are_named():
            return train(config, ranks, fresh)
    except UserError as error:
        report(error, show=rank == 0)
        return EXIT_USER_ERROR
    except WrongGradient as error:
        # another node or version may be right, and the command can't tell
        if rank == 0:
            print(f"hdscale: {error}", file=sys.stderr, flush=True)
        return EXIT_BROKEN
    except (RendezvousError, OutOfGpuMemory) as error:
        # no mistake in the command for sure, so a job tries again; each rank prints its own, which another may not have
        print(f"hdscale: {error}", file=sys.stderr, flush=True)
        return EXIT_BROKEN
    finally:
        if ranks is not None:
            ranks.close()
