"""`train.self_check`: the gradient that DeepSpeed forms, against that of plain backward passes over the same rows.

DeepSpeed sums gradients over micro-batches and ranks in ways that depend on the stage, the number type and the version,
and has lost or mixed some of them without an error more than once. The first step of a run shows whether it does here.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from hdscale.data.batches import IGNORED
from hdscale.engine.deepspeed_engine import Batch, Engine, dropout_seed, loss_of

SKIPPED = "self-check skipped"
"""How the line begins that says why nothing was compared."""
TOLERANCE = {"fp32": 1e-4, "bf16": 5e-2}
"""Largest difference in relation to a tensor's norm: the sums are formed in another order, and in bf16 each pass's
gradient is rounded to eight bits."""
LEAST_NORM = {"fp32": 1e-3, "bf16": 1e-5}
"""A tensor's norm counts as at least this share of the whole gradient's: some gradients are zero but for rounding.

A tensor that is lost is noticed if its share is above `TOLERANCE` times this. At the start of a run most tensors of a
hyperdecoder have less than a thousandth of the gradient, the quick start's smallest 6e-6 of it.
"""


class WrongGradient(RuntimeError):
    """DeepSpeed's gradient is not that of the rows; one line names the tensor."""


@dataclass(frozen=True)
class PlainGradient:
    """The gradient of a step by plain backward passes of one process, without DeepSpeed.

    Attributes:
        tensors: {trainable: float32 on the CPU}, on rank 0; empty on the others.
        seconds: that it took.
        skipped: why there is none; None where there is one.
    """

    seconds: float
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    skipped: str | None = None


def plain_gradient(engine: Engine, passes: Sequence[Sequence[Callable[[], Batch]]]) -> PlainGradient:
    """The gradient of the engine's next step, formed on rank 0 while the others wait. Collective.

    Every rank's micro-batches run on it one after the other, with the dropout that they will have in the step; their
    gradients are summed in float32. Neither the engine nor the random state is changed.

    Args:
        passes: [rank][micro-batch] -> makes the batch.
    """
    start = time.monotonic()
    if reason := missing_memory(engine):
        return PlainGradient(0.0, skipped=reason)
    tensors: dict[str, torch.Tensor] = {}
    failure = None
    device = engine.ranks.device
    with (
        torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
        engine.whole_weights(),
    ):
        if engine.ranks.is_main:
            try:
                tensors = sum_of_passes(engine, passes)
            except torch.OutOfMemoryError:
                failure = "plain backward passes do not fit into this GPU's memory beside DeepSpeed's buffers"
    if failure and device.type == "cuda":
        # after the handler: the error's traceback held the tensors of the pass
        torch.cuda.empty_cache()
    reason = engine.ranks.broadcast_object(failure)
    return PlainGradient(time.monotonic() - start, tensors, reason)


def missing_memory(engine: Engine) -> str | None:
    """Why the whole model does not fit on some rank, with one pass's gradients and their sums; None if it does."""
    device = engine.ranks.device
    needed = 0
    if device.type == "cuda":
        if engine.stage == 3:
            needed += sum(size_of(parameter) * parameter.element_size() for parameter in engine.module.parameters())
        needed += sum(size_of(parameter) * (parameter.element_size() + 4) for parameter in engine.parameters.values())
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        fits = needed < torch.cuda.mem_get_info(device)[0] + unused
    else:
        fits = True
    return None if engine.ranks.all_true(fits) else f"would need {needed / 1e9:.1f} GB more on each GPU"


def size_of(parameter: torch.nn.Parameter) -> int:
    """Number of elements, under ZeRO-3 too."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def sum_of_passes(engine: Engine, passes: Sequence[Sequence[Callable[[], Batch]]]) -> dict[str, torch.Tensor]:
    """{trainable: gradient of the loss over all passes}, float32 on the CPU."""
    device, parameters = engine.ranks.device, engine.parameters
    targets = sum(int((make()["labels"] != IGNORED).sum()) for of_rank in passes for make in of_rank)
    # times the number of ranks as in DeepSpeed's passes, and divided by it below: so that bf16 rounds alike, also the
    # gradients that are nothing but rounding
    count = engine.ranks.world_size
    scale = count / max(targets, 1) if engine.train.loss_reduction == "mean" else float(count)
    sums = {name: torch.zeros(engine.shapes[name], device=device) for name in parameters}
    engine.module.train()
    for rank, of_rank in enumerate(passes):
        for index, make in enumerate(of_rank):
            batch = {name: tensor.to(device) for name, tensor in make().items()}
            torch.manual_seed(dropout_seed(engine.seed, engine.step, rank, index))
            # neither the module's call nor `backward`: they would set off collectives of DeepSpeed's
            loss = loss_of(engine.module.forward(**batch)).float() * scale
            found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
            for total, gradient in zip(sums.values(), found, strict=True):
                if gradient is not None:
                    total += gradient.float()
    return {name: (total / count).cpu() for name, total in sums.items()}


def compare_gradients(engine: Engine, plain: PlainGradient) -> str:
    """Compare the gradient that AdamW was given in the first step with the plain one. Collective.

    AdamW's first moment is the clipped gradient times 1 - beta1 after the first update, at every stage.

    Args:
        plain: of the step, formed before it.

    Returns:
        one line for the log.

    Raises:
        WrongGradient: on every rank, naming the tensor that differs most.
    """
    if plain.skipped:
        return f"{SKIPPED}: {plain.skipped}"
    start = time.monotonic()
    clipping = engine.train.gradient_clipping
    norm = engine.grad_norm
    clipped = min(1.0, clipping / (norm + 1e-6)) if clipping else 1.0
    whole = sum(float(tensor.double().square().sum()) for tensor in plain.tensors.values()) ** 0.5
    differences: dict[str, float] = {}
    for name, moment in engine.optimizer_tensors():
        key, _, tensor = name.partition(".")
        if key == "exp_avg" and engine.ranks.is_main:
            gradient = moment.double() / ((1.0 - engine.first_beta) * clipped)
            expected = plain.tensors[tensor].double()
            least = max(float(expected.norm()), LEAST_NORM[engine.train.dtype] * whole)
            differences[tensor] = float((gradient - expected).norm()) / least if least else float(gradient.norm())
    if engine.ranks.is_main and whole:
        differences["the norm of the whole gradient"] = abs(norm - whole) / whole
    # not a number is neither more nor less than any other difference: the largest could not be found
    differences = {name: found if math.isfinite(found) else math.inf for name, found in differences.items()}
    differences = engine.ranks.broadcast_object(differences)
    worst = max(differences, key=lambda name: differences[name])
    tolerance = TOLERANCE[engine.train.dtype]
    wrong = [name for name in engine.parameters if not differences[name] <= tolerance]
    if not differences[worst] <= tolerance:
        more = f" and {len(wrong) - 1} more tensors" if len(wrong) > 1 else ""
        raise WrongGradient(
            f"self-check: the gradient that DeepSpeed formed in step 1 is wrong: {worst} differs by "
            f"{differences[worst]:.2g} of its norm{more} (ZeRO stage {engine.stage}, {engine.train.dtype}, "
            f"{engine.ranks.world_size} ranks). No checkpoint was saved. Try `hdscale doctor --engine` and another "
            "deepspeed=...; train.self_check=false with another run.name trains without this check"
        )
    seconds = plain.seconds + time.monotonic() - start
    least = tolerance * LEAST_NORM[engine.train.dtype] * whole
    unseen = engine.ranks.broadcast_object(sum(float(tensor.norm()) <= least for tensor in plain.tensors.values()))
    small = f" ({unseen} with a gradient of zero or too small to tell)" if unseen else ""
    return (
        f"self-check: the gradient of step 1 is that of plain backward passes over its rows: {len(engine.parameters)} "
        f"tensors{small}, largest difference {differences[worst]:.1e} of a norm ({worst}), {seconds:.1f} s"
    )
