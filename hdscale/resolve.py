"""What a configuration means, worked out once: tasks and their ids, the model, the DeepSpeed configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hdscale.bases.sizes import base_config
from hdscale.config import Config
from hdscale.data.tasks import Task, expand_tasks
from hdscale.engine.deepspeed_config import resolve_deepspeed_config, zero_stage
from hdscale.errors import UserError
from hdscale.evaluation.averages import check_select
from hdscale.evaluation.metrics import check_metrics
from hdscale.modeling.config import HyperdecoderConfig
from hdscale.modeling.methods import check_method
from hdscale.ops.backend import BF16_ONLY


@dataclass(frozen=True)
class ResolvedTasks:
    """The tasks of a run.

    Attributes:
        all: every task, in the order of `data.tasks`.
        trained: those with a training split; their order gives the ids that task-conditioned methods use.
    """

    all: list[Task]
    trained: list[Task]

    @property
    def ids(self) -> dict[str, int]:
        """{task: its id}; -1 for a task that is only evaluated (the mean of the learned task embeddings, Table 5)."""
        return {task.name: self.trained.index(task) if task in self.trained else -1 for task in self.all}


@dataclass(frozen=True)
class Resolved:
    """A configuration that was checked as far as that is possible before anything is loaded.

    Attributes:
        tasks: of the run. model: base, method and task names. deepspeed: the JSON handed to DeepSpeed. stage: of ZeRO.
    """

    tasks: ResolvedTasks
    model: HyperdecoderConfig
    deepspeed: dict[str, Any]
    stage: int


def resolve_tasks(config: Config) -> ResolvedTasks:
    """The tasks that `data.tasks` names."""
    tasks = expand_tasks(config.data.tasks, config.data)
    return ResolvedTasks(tasks, [task for task in tasks if task.trains])


def resolve_model(config: Config) -> HyperdecoderConfig:
    """The part of a configuration that defines the model; the ids of tasks count those that are trained."""
    return HyperdecoderConfig(config.model, config.method, [task.name for task in resolve_tasks(config).trained])


def resolve(config: Config, world_size: int) -> Resolved:
    """Work out a run's tasks, model and DeepSpeed configuration, and check them against each other.

    Raises:
        UserError: for a mistake that the configuration alone shows, before anything is loaded or overwritten.
    """
    tasks = resolve_tasks(config)
    for task in tasks.all:
        check_metrics(task)
    check_select(config.eval.select, tasks.trained or tasks.all)
    model = HyperdecoderConfig(config.model, config.method, [task.name for task in tasks.trained])
    check_method(model)
    base_config(model.model)
    if config.method.backend == "cuda" and config.train.dtype != "bf16":
        raise UserError(BF16_ONLY)
    deepspeed = resolve_deepspeed_config(config.deepspeed, config.train, world_size)
    stage = zero_stage(deepspeed)
    if config.train.tokens_found_automatically and stage == 3:
        raise UserError(
            "train.tokens_per_micro_batch=auto works with ZeRO stages 1 and 2; give a number of tokens with stage 3"
        )
    if config.train.compile == "on" and stage == 3:
        raise UserError(
            "train.compile=on works with ZeRO stages 1 and 2 (stage 3 gathers weights inside what would be compiled); "
            "use train.compile=off"
        )
    return Resolved(tasks, model, deepspeed, stage)
