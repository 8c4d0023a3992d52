"""The modular task hypernetwork (Ponti et al. 2022; A.3): each task mixes skills; a skill is a LoRA of every linear.

As in its authors' code, the mixture is drawn separately for every linear and every instance: a relaxed Bernoulli sample
in training, its probability in evaluation, divided by the sum over the skills. A and B are averaged separately. The
allocation Z has its own learning rate.
"""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributions import RelaxedBernoulli

from hdscale.bases.interface import Adaptation, Base, StackSizes
from hdscale.errors import UserError
from hdscale.modeling.conditioning import task_rows, with_unseen_task
from hdscale.modeling.config import HyperdecoderConfig
from hdscale.modeling.lora import CachedLoraAdaptation, adapted_linears, apply_low_rank, check_lora, linear_key
from hdscale.modeling.methods.interface import Method, RunEncoder, required
from hdscale.modeling.settings import MethodSettings

LOGITS_BOUND = 1e-3
SMALLEST_SUM = 1e-12


class SkillLora(nn.Module):
    """The skills of one linear, averaged by each instance's weights."""

    def __init__(self, skills: int, d_in: int, d_out: int, rank: int, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.down = nn.Parameter(torch.empty(skills, d_in, rank))
        self.up = nn.Parameter(torch.zeros(skills, rank, d_out))
        bound = 1.0 / math.sqrt(3 * d_in)
        nn.init.uniform_(self.down, -bound, bound)

    def combine(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """weights [B, skills] -> A [B, in, r] and B [B, r, out], the scale in B."""
        weights = weights.to(self.down.dtype)
        down = (weights @ self.down.flatten(1)).unflatten(-1, self.down.shape[1:])
        return down, (weights @ self.up.flatten(1)).unflatten(-1, self.up.shape[1:]) * self.scale

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        """x [N, in], weights [B, skills] -> [N, out]."""
        return apply_low_rank(x, *self.combine(weights))


class SkillAllocation(nn.Module):
    """Z of one stack: how much of each skill a task uses, separately for every adapted linear."""

    def __init__(self, linears: int, tasks: int, skills: int, temperature: float) -> None:
        super().__init__()
        self.temperature = temperature
        self.logits = nn.Parameter(torch.empty(linears, tasks, skills).uniform_(-LOGITS_BOUND, LOGITS_BOUND))

    def forward(self, task_ids: Tensor) -> Tensor:
        """task_ids [B] -> weights [linears, B, skills] with rows of sum 1; task id -1: from the mean of the logits."""
        by_task = self.logits.float().transpose(0, 1)  # [tasks, linears, skills]
        logits = with_unseen_task(by_task)[task_rows(task_ids, by_task.shape[0])].transpose(0, 1)
        if self.training:
            weights = RelaxedBernoulli(
                logits.new_tensor(self.temperature), logits=logits, validate_args=False
            ).rsample()
        else:
            weights = torch.sigmoid(logits)
        return weights / (weights.sum(dim=-1, keepdim=True) + SMALLEST_SUM)


class SkillStack(nn.Module):
    """Skills and allocation of one stack."""

    def __init__(self, config: HyperdecoderConfig, sizes: StackSizes) -> None:
        super().__init__()
        lora, modular = config.method.lora, config.method.modular
        linears = adapted_linears(sizes, lora.targets or "qkvo", lora.attention or "all")
        scale = (1.0 if lora.alpha is None else lora.alpha) / lora.rank
        self.keys = [linear.key for linear in linears]
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {key: SkillLora(modular.skills, d_in, d_out, lora.rank, scale) for key, d_in, d_out in linears}
            )
            for _ in range(sizes.layers)
        )
        self.allocation = SkillAllocation(
            sizes.layers * len(linears), len(config.tasks), modular.skills, modular.temperature
        )

    def adaptation(self, task_ids: Tensor) -> SkillAdaptation | None:
        """The stack's adaptation for a batch of tasks [B]; None if none of its linears is adapted."""
        return SkillAdaptation(self, self.allocation(task_ids)) if self.keys else None

    def skills_of(self, layer: int, key: str) -> SkillLora:
        """The skills of one linear."""
        return cast(SkillLora, cast(nn.ModuleDict, self.layers[layer])[key])


class SkillAdaptation(Adaptation):
    """Averages of skills, for weights [linears, B, skills]; the linears of a layer are adjacent."""

    adapts_attention = True

    def __init__(self, stack: SkillStack, weights: Tensor) -> None:
        self.stack, self.weights = stack, weights

    def weights_of(self, layer: int, key: str) -> Tensor:
        """The weights [B, skills] of one linear."""
        return self.weights[layer * len(self.stack.keys) + self.stack.keys.index(key)]

    def projection(self, layer: int, attention: str, name: str, x: Tensor, y: Tensor) -> Tensor:
        key = linear_key(attention, name)
        if key not in self.stack.keys:
            return y
        return y + self.stack.skills_of(layer, key)(x, self.weights_of(layer, key))

    def for_generation(self) -> CachedLoraAdaptation:
        return CachedLoraAdaptation(
            [
                {key: self.stack.skills_of(layer, key).combine(self.weights_of(layer, key)) for key in self.stack.keys}
                for layer in range(len(self.stack.layers))
            ]
        )


class Modular(Method):
    """Task-conditioned averages of LoRA skills in both stacks."""

    needs_tasks = True

    def __init__(self, config: HyperdecoderConfig, base: Base) -> None:
        super().__init__(config, base)
        self.rate = config.method.modular.learning_rate
        self.encoder = SkillStack(config, base.sizes("encoder"))
        self.decoder = SkillStack(config, base.sizes("decoder"))

    @classmethod
    def options(cls, settings: MethodSettings) -> list[str]:
        return ["lora", "modular"]

    @classmethod
    def sizes(cls, settings: MethodSettings) -> list[list[str]]:
        return [["lora.rank"], ["modular.skills"]]

    @classmethod
    def check_values(cls, config: HyperdecoderConfig) -> None:
        check_lora(config.method.lora)
        modular = config.method.modular
        if modular.skills < 1:
            raise UserError(f"method.modular.skills={modular.skills} must be at least 1")
        if not modular.temperature > 0.0:
            raise UserError(f"method.modular.temperature={modular.temperature} must be above 0")
        if not modular.learning_rate > 0.0:
            raise UserError(f"method.modular.learning_rate={modular.learning_rate} must be above 0")
        if not config.tasks:
            raise UserError("method.name=modular needs the names of the tasks that it is trained on")

    def encode(self, run_encoder: RunEncoder, mask: Tensor, task_ids: Tensor | None) -> Tensor:
        return run_encoder(self.encoder.adaptation(required(task_ids)))

    def decoder_adaptation(self, hidden: Tensor, mask: Tensor, task_ids: Tensor | None) -> Adaptation | None:
        return self.decoder.adaptation(required(task_ids))

    def learning_rates(self, default: float) -> dict[str, float]:
        return {name: self.rate for name, _ in self.named_parameters() if name.endswith("allocation.logits")}
