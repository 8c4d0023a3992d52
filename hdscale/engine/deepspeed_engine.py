"""The training step under DeepSpeed: one global batch's gradient, however it is cut into ranks and micro-batches."""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy
import torch
from torch import nn

from hdscale.data.batches import IGNORED
from hdscale.engine import zero
from hdscale.engine.deepspeed_config import limit_buckets
from hdscale.engine.optimizer import build_optimizer, learning_rate_factor, trainable_parameters, uncorrected_epsilon
from hdscale.engine.ranks import Ranks
from hdscale.engine.settings import TrainSettings
from hdscale.errors import UserError
from hdscale.requirements import require
from hdscale.runs.log import StepResult

Batch = Mapping[str, torch.Tensor]

IDS_SHOWN = 16


class NonFiniteError(UserError):
    """The loss, a gradient or a weight is infinite or not a number: training cannot continue."""


class PendingStep:
    """A step that was started; `result()` waits for its numbers, and is best called once the next step is started.

    Args:
        step: its number, counted from 1.
        numbers: float64 [3] on the device: loss, target tokens, gradient norm.
        learning_rate: of the step.
        skipped: whether DeepSpeed has left the weights as they were for a non-finite gradient.
        failure: makes the error; collective.
    """

    def __init__(
        self,
        step: int,
        numbers: torch.Tensor,
        learning_rate: float,
        skipped: bool,
        failure: Callable[[str], NonFiniteError],
    ) -> None:
        self._step, self._learning_rate, self._skipped, self._failure = step, learning_rate, skipped, failure
        self._numbers, self._ready = numbers, None
        if numbers.is_cuda:
            self._numbers = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            self._numbers.copy_(numbers, non_blocking=True)
            self._ready = torch.cuda.Event()
            self._ready.record()

    def result(self) -> StepResult:
        """The step's numbers, once the device has computed them.

        Raises:
            NonFiniteError: on every rank, if the loss or the gradient was not finite. The update may have been made
                with it: neither save the engine nor train on.
        """
        if self._ready is not None:
            self._ready.synchronize()
        loss, tokens, norm = self._numbers.tolist()
        if not math.isfinite(loss):
            raise self._failure(f"the loss is {loss}")
        # DeepSpeed reports a norm that is not finite as infinite or as -1
        if self._skipped or not math.isfinite(norm) or norm < 0:
            raise self._failure("the gradient is not finite")
        return StepResult(self._step, loss, int(tokens), norm, self._learning_rate)


def build_engine(model: nn.Module, train: TrainSettings, deepspeed: dict[str, Any], ranks: Ranks, seed: int) -> Engine:
    """Hand the model to DeepSpeed.

    Args:
        model: called with a batch's tensors, it returns a tuple or mapping of (`loss_sum`, `tokens`); its frozen
            parameters have `requires_grad=False`. Trainable parameters in fp32 keep their exact values as masters
            under bf16.
        deepspeed: what `resolve_deepspeed_config` gives.
        seed: of dropout.

    Raises:
        UserError: for a model with nothing to train.
    """
    count = sum(parameter.numel() for parameter in trainable_parameters(model).values())
    return Engine(model, train, limit_buckets(deepspeed, count), ranks, seed)


def parameter_counts(model: nn.Module) -> tuple[int, int]:
    """Trainable parameters of an adapted model, and all parameters of its base."""
    trainable = sum(parameter_size(parameter) for parameter in model.parameters() if parameter.requires_grad)
    return trainable, sum(parameter_size(parameter) for parameter in model.get_submodule("base").parameters())


def parameter_size(parameter: nn.Parameter) -> int:
    """Number of elements; ZeRO-3 leaves an empty parameter and keeps the number beside it."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


class Engine:
    """A model under DeepSpeed's ZeRO with AdamW on its trainables.

    Attributes:
        step: optimizer steps done.
        module: the model (for evaluation: use it inside `evaluating()`).
        parameters: {name: parameter} of the trainables, in the model's order.
    """

    def __init__(
        self, model: nn.Module, train: TrainSettings, json_config: dict[str, Any], ranks: Ranks, seed: int
    ) -> None:
        require("deepspeed")
        import deepspeed

        self.ranks, self.train, self.seed = ranks, train, seed
        self.step = 0
        offload = "offload_optimizer" in json_config["zero_optimization"]
        optimizer = build_optimizer(model, train, fused=ranks.device.type == "cuda" and not offload)
        self.parameters = trainable_parameters(model)
        self.shapes = {name: tuple(parameter.shape) for name, parameter in self.parameters.items()}
        exact = exact_masters(self.parameters) if train.dtype == "bf16" else {}
        if json_config["zero_optimization"]["stage"] == 3:
            zero.gather_layers_whole(model)
        # ZeRO-1 in bf16 prints reports of memory while it is set up
        with contextlib.redirect_stdout(io.StringIO()):
            self._deepspeed, *_ = deepspeed.initialize(
                model=model, optimizer=optimizer, config=json_config, dist_init_required=False
            )
        self.module: nn.Module = self._deepspeed.module
        self.stage: int = self._deepspeed.zero_optimization_stage()
        zero.stop_waiting(self._deepspeed.optimizer)
        zero.reduce_in_one_order(self._deepspeed.optimizer, self.parameters.values())
        if exact:
            self.load_trainables(exact)

    def train_step(self, micro_batches: Sequence[Batch], rows: Sequence[Any] = ()) -> PendingStep:
        """One optimizer step over this rank's share of a global batch.

        The loss is the mean over the global batch's target tokens (labels other than -100): counted over all ranks
        and micro-batches first, so that the gradient does not depend on how the batch was cut. Dropout is seeded by
        (seed, step, rank, micro-batch), so that a resumed run draws the same masks.

        On a GPU this call only queues work (ZeRO-1 and 2 in bf16): the host continues with the next step while the
        device computes, and reads the step's numbers when `result()` is asked for.

        Args:
            micro_batches: the same number on every rank (ZeRO reduces gradients at each backward pass): see
                `hdscale.data.micro_batches.deal`. Tensors may lie on the CPU (pinned, nothing waits for their copy).
            rows: the rows of these micro-batches (with `task` and `id`), named if the step fails.
        """
        ranks, step = self.ranks, self.step
        rate = self._set_learning_rate(learning_rate_factor(step, self.train.warmup_steps, self.train.max_steps))
        moved = [{name: tensor.to(ranks.device, non_blocking=True) for name, tensor in batch.items()}
                 for batch in micro_batches]  # fmt: skip
        tokens = torch.stack([(batch["labels"] != IGNORED).sum() for batch in moved]).sum()
        ranks.sum_(tokens)
        # DeepSpeed averages over the ranks; the loss wanted is a sum over them
        scale = torch.full((), float(ranks.world_size), dtype=torch.float32, device=ranks.device)
        if self.train.loss_reduction == "mean":
            scale = scale / tokens.clamp(min=1)

        self.module.train()
        total = torch.zeros((), dtype=torch.float32, device=ranks.device)
        for index, batch in enumerate(moved):
            torch.manual_seed(dropout_seed(self.seed, step, ranks.rank, index))
            loss_sum = loss_of(self._deepspeed(**batch))
            total += loss_sum.detach()
            self._deepspeed.backward(loss_sum.float() * scale, scale_wrt_gas=False)
        ranks.sum_(total)
        loss = (total / tokens.clamp(min=1)) if self.train.loss_reduction == "mean" else total
        self._deepspeed.step()
        # DeepSpeed may skip an update with a non-finite gradient, and says nothing
        skipped = bool(getattr(self._deepspeed.optimizer, "overflow", False))
        if step == 0 and not skipped:
            zero.link_states(self._deepspeed.optimizer)
        self.step = step + 1
        norm = torch.as_tensor(self._deepspeed.get_global_grad_norm(), dtype=torch.float64, device=ranks.device)
        numbers = torch.stack([loss.double(), tokens.double(), norm])
        return PendingStep(self.step, numbers, rate, skipped, lambda what: self._failure(step, what, rows))

    @property
    def first_beta(self) -> float:
        """AdamW's beta1."""
        return float(self._deepspeed.optimizer.param_groups[0]["betas"][0])

    @property
    def grad_norm(self) -> float:
        """Norm of the last step's global gradient before clipping; waits for it."""
        return float(self._deepspeed.get_global_grad_norm())

    @contextlib.contextmanager
    def whole_weights(self) -> Iterator[None]:
        """All weights on every rank, for plain passes through `module`. Collective."""
        with zero.whole_weights(self._deepspeed):
            yield

    def _set_learning_rate(self, factor: float) -> float:
        groups = self._deepspeed.optimizer.param_groups
        for group in groups:
            group["lr"] = group["peak_lr"] * factor
            if self.train.adam_epsilon == "uncorrected":
                group["eps"] = uncorrected_epsilon(self.step, group["betas"][1])
        return groups[0]["lr"]

    def _failure(self, step: int, what: str, rows: Sequence[Any]) -> NonFiniteError:
        """The error that names the step and, gathered from all ranks, the batch's tasks and ids."""
        named = [(row.task, str(row.id)) for row in rows]
        everyone = [pair for part in self.ranks.gather_objects(named) for pair in part]
        message = f"step {step + 1}: {what}"
        if everyone:
            ids = [identity for _, identity in everyone]
            more = f" and {len(ids) - IDS_SHOWN} more" if len(ids) > IDS_SHOWN else ""
            message += (
                f"; tasks {', '.join(sorted({task for task, _ in everyone}))}; ids {', '.join(ids[:IDS_SHOWN])}{more}"
            )
        return NonFiniteError(
            f"{message}; the last checkpoint is untouched: lower train.learning_rate, or look at these rows"
        )

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[nn.Module]:
        """The model, in evaluation mode and with whole weights, for any number of forward passes per rank."""
        self.module.eval()
        try:
            with torch.no_grad(), self.whole_weights():
                yield self.module
        finally:
            self.module.train()

    def trainable_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, fp32 master on the CPU) of each trainable in turn. Collective: every rank must iterate."""
        for name, parameter in self.parameters.items():
            yield name, zero.full_master(parameter).detach().cpu()

    def optimizer_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """("exp_avg.<name>" or "exp_avg_sq.<name>", fp32 on the CPU). Collective. Nothing before the first step."""
        if self.step == 0:
            return
        for name, parameter in self.parameters.items():
            for key in zero.STATE_KEYS:
                yield f"{key}.{name}", zero.full_state(parameter, key).detach().cpu()

    def load_trainables(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Set the masters, and the working copies of the weights, from full fp32 tensors (the same on every rank)."""
        for name, parameter in self.parameters.items():
            zero.set_full(parameter, tensors[name])
        zero.masters_to_weights(self._deepspeed, self.parameters.values())

    def load_optimizer(self, tensors: Mapping[str, torch.Tensor], step: int) -> None:
        """Set AdamW's moments as they were after `step` updates (none for step 0)."""
        self.step = step
        if step == 0:
            return
        zero.create_states(self._deepspeed.optimizer, step)
        for name, parameter in self.parameters.items():
            for key in zero.STATE_KEYS:
                zero.set_full(parameter, tensors[f"{key}.{name}"], key)

    def close(self) -> None:
        """Free what DeepSpeed holds (hooks and buffers)."""
        self._deepspeed.destroy()


def exact_masters(parameters: Mapping[str, nn.Parameter]) -> dict[str, torch.Tensor]:
    """Copies of the fp32 trainables, or {} where any is kept in fewer bits already.

    DeepSpeed would otherwise make the masters from weights that were rounded to bf16.
    """
    if any(parameter.dtype != torch.float32 for parameter in parameters.values()):
        return {}
    return {name: parameter.detach().to("cpu", copy=True) for name, parameter in parameters.items()}


def dropout_seed(seed: int, step: int, rank: int, micro_batch: int) -> int:
    """A 63-bit seed that is different for each (seed, step, rank, micro-batch)."""
    sequence = numpy.random.SeedSequence([seed & 0xFFFFFFFF, step, rank, micro_batch])
    return int(sequence.generate_state(1, numpy.uint64)[0] >> numpy.uint64(1))


def loss_of(output: Any) -> torch.Tensor:
    """`loss_sum` of a model's output. DeepSpeed finds the loss in tuples and mappings only, where its hooks start."""
    if isinstance(output, Mapping):
        return output["loss_sum"]
    if isinstance(output, tuple):
        return output[0]
    raise TypeError(f"the model must return a tuple or a mapping with loss_sum first, not {type(output).__name__}")
