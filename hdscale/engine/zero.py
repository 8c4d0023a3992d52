"""DeepSpeed's sharded masters and optimizer states, read and written as whole tensors: ZeRO stages 1, 2, 3 and offload.

Reading is DeepSpeed's public `safe_get_*`. Writing into a fresh optimizer is not public in 0.19 for stages 1 and 2
(its state does not exist before the first step); the package pins deepspeed to that minor version for it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

# deepspeed is imported inside the functions: it chooses its accelerator at its first import, and
# `Ranks.start` says which one that is

STATE_KEYS = ("exp_avg", "exp_avg_sq")


def gather_layers_whole(model: nn.Module) -> None:
    """Let stage 3 gather the weights of a layer together, so that every rank's passes have the same collectives.

    Called before DeepSpeed gets the model; modules say it by their attribute `gathered_whole`.
    """
    from deepspeed.utils import set_z3_leaf_module

    for module in model.modules():
        if getattr(module, "gathered_whole", False):
            set_z3_leaf_module(module, True)


def full_master(parameter: nn.Parameter) -> torch.Tensor:
    """The whole fp32 master of a trainable, on its device. Collective."""
    from deepspeed.utils import safe_get_full_fp32_param

    return safe_get_full_fp32_param(parameter)


def full_state(parameter: nn.Parameter, key: str) -> torch.Tensor:
    """The whole AdamW moment `key` of a trainable, on its device. Collective."""
    from deepspeed.utils import safe_get_full_optimizer_state

    return safe_get_full_optimizer_state(parameter, key)


def set_full(parameter: nn.Parameter, value: torch.Tensor, key: str | None = None) -> None:
    """Write this rank's part of a whole tensor into the master (key None) or a moment."""
    from deepspeed import utils

    if hasattr(parameter, "ds_id"):
        part = local_part(parameter, value)
        if key is None:
            utils.safe_set_local_fp32_param(parameter, part)
        else:
            utils.safe_set_local_optimizer_state(parameter, part, key)
    elif key is None:
        utils.safe_set_full_fp32_param(parameter, value)
    else:
        utils.safe_set_full_optimizer_state(parameter, value, key)


def local_part(parameter: nn.Parameter, value: torch.Tensor) -> torch.Tensor:
    """This rank's piece of a tensor under ZeRO-3: equal pieces, the last ones padded with zeros.

    DeepSpeed's own setter of whole tensors does not pad and fails where the ranks do not divide the size.
    """
    partitioned: Any = parameter  # DeepSpeed's ZeRO-3 puts attributes on it
    size = partitioned.ds_tensor.numel()
    group = partitioned.ds_process_group
    start = size * torch.distributed.get_rank(group=group)
    piece = value.flatten()[start : start + size]
    return torch.nn.functional.pad(piece, (0, size - piece.numel()))


def master_partitions(optimizer: Any) -> list[torch.Tensor]:
    """This rank's flat fp32 tensors, one for each parameter group (stages 1, 2) or sub-group (stage 3)."""
    for name in (
        "single_partition_of_fp32_groups",  # stages 1 and 2
        "fp32_groups_flat_partition",  # stage 1 in bf16, which has a separate optimizer class
        "fp32_partitioned_groups_flat",  # stage 3
    ):
        if hasattr(optimizer, name):
            return list(getattr(optimizer, name))
    raise TypeError(f"{type(optimizer).__name__} is none of DeepSpeed 0.19's ZeRO optimizers")


def create_states(optimizer: Any, step: int) -> None:
    """Give AdamW the state that it has after `step` updates, with zero moments, so that they can be set."""
    adamw = optimizer.optimizer
    for partition in master_partitions(optimizer):
        fused = adamw.defaults.get("fused")
        adamw.state[partition] = {
            "step": torch.tensor(float(step), dtype=torch.float32, device=partition.device if fused else "cpu"),
            **{key: torch.zeros_like(partition) for key in STATE_KEYS},
        }
    link_states(optimizer)


def link_states(optimizer: Any) -> None:
    """Let `safe_get_*` and `safe_set_*` find AdamW's present states (stages 1 and 2).

    DeepSpeed links them once, after the first update of the first parameter group, when the other groups have none.
    """
    if hasattr(optimizer, "_lazy_init_hp_params_optimizer_state"):
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()


def stop_waiting(optimizer: Any) -> None:
    """Let an update of ZeRO-1 or 2 in bf16 wait for nothing that the device has yet to compute.

    DeepSpeed 0.19 reads the gradient on the host three times an update: to look for an overflow, to mask the norm, and
    to clip by it. Here the norm stays on the device, as the factor that clips does, and the caller checks whether
    the norm is finite. Other stages, offload and fp32 keep DeepSpeed's own way.
    """
    from deepspeed.runtime import bf16_optimizer
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    if isinstance(optimizer, bf16_optimizer.BF16_Optimizer):
        # functions of its module: nothing else calls them there
        bf16_optimizer.get_global_norm_of_tensors = norm_on_device
        bf16_optimizer.is_invalid_grad_norm = lambda norm: False
        bf16_optimizer.clip_tensors_by_global_norm = clip_on_device
    if not isinstance(optimizer, DeepSpeedZeroOptimizer) or optimizer.cpu_offload or optimizer.dtype != torch.bfloat16:
        return

    def norm(norm_type: int = 2) -> torch.Tensor:
        """Norm of the whole gradient, a device scalar. Collective."""
        squares = [
            torch.linalg.vector_norm(gradient, dtype=torch.float32).square()
            for group in range(len(optimizer.bit16_groups))
            for gradient in optimizer.averaged_gradients[group]
            if not getattr(gradient, "_zero_padding", False)
        ]
        total = torch.stack(squares).sum() if squares else torch.zeros((), device=optimizer.device)
        torch.distributed.all_reduce(total, group=optimizer.dp_process_group)
        return total.sqrt()

    def clip(gradients: list[torch.Tensor], total_norm: torch.Tensor) -> None:
        """Scale the gradients so that their norm is at most `gradient_clipping` (0: any)."""
        if optimizer.clip_grad > 0.0:
            factor = 1.0 / torch.clamp((total_norm + 1e-6) / optimizer.clip_grad, min=1.0)
            for gradient in gradients:
                gradient.mul_(factor)

    optimizer.check_grad_overflow = False
    optimizer.scaled_global_norm = norm
    optimizer.unscale_and_clip_grads = clip


def norm_on_device(input_tensors: list[torch.Tensor], mpu: Any = None, norm_type: float = 2) -> torch.Tensor:
    """Norm of a whole gradient, a device scalar; every rank has the gradient. The names are DeepSpeed's."""
    norms = [gradient.detach().float().norm(norm_type) for gradient in input_tensors]
    return torch.stack(norms).pow(norm_type).sum().pow(1.0 / norm_type)


def clip_on_device(
    input_tensors: list[torch.Tensor], max_norm: float, global_norm: torch.Tensor, mpu: Any = None
) -> None:
    """Scale a gradient so that its norm is at most `max_norm`. The names are DeepSpeed's."""
    factor = torch.clamp(max_norm / (global_norm + 1e-6), max=1.0)
    for gradient in input_tensors:
        gradient.detach().mul_(factor)


def reduce_in_one_order(optimizer: Any, parameters: Iterable[nn.Parameter]) -> None:
    """Let every rank hand its gradients to the reduction in the same order: from the last trainable to the first.

    DeepSpeed 0.19 fills its buckets in the order in which the backward pass finishes the gradients, and then sums the
    buckets of all ranks. That order can depend on a rank's own lengths, since the way to compute a product does; with
    unlike orders one tensor's gradient would be added to another's, without an error.
    """
    if not hasattr(optimizer, "reduce_ready_partitions_and_remove_grads"):
        return  # ZeRO-1 in bf16 reduces all gradients after the backward pass, in the order of the parameters
    order = list(reversed(list(parameters)))
    places = {id(parameter): place for place, parameter in enumerate(order)}
    reduce, finish = (
        optimizer.reduce_ready_partitions_and_remove_grads,
        optimizer.independent_gradient_partition_epilogue,
    )
    waiting: dict[int, tuple[Any, ...]] = {}
    following = 0

    def take(parameter: nn.Parameter, *group: int) -> None:
        """Called when a gradient is ready; gradients before it in the order that are not ready hold it up."""
        nonlocal following
        waiting[places[id(parameter)]] = (parameter, *group)
        while following in waiting:
            reduce(*waiting.pop(following))
            following += 1

    def end() -> None:
        """Called after the backward pass; a trainable without a gradient has held up those after it.

        Where another rank has a gradient for it this one adds zeros, so that all ranks reduce the same tensors.
        """
        nonlocal following
        for place in range(following, len(order)):
            if place in waiting:
                reduce(*waiting.pop(place))
            else:
                with zero_gradient(optimizer, order[place]) as group:
                    reduce(order[place], *group)
        following = 0
        finish()

    optimizer.reduce_ready_partitions_and_remove_grads = take
    optimizer.independent_gradient_partition_epilogue = end


@contextlib.contextmanager
def zero_gradient(optimizer: Any, parameter: nn.Parameter) -> Iterator[tuple[int, ...]]:
    """Give a trainable that took no part in the backward pass a gradient of zeros, to be reduced.

    Yields:
        what DeepSpeed's reduction is told beside the parameter: its group under stages 1 and 2, nothing under stage 3.
    """
    if hasattr(parameter, "ds_id"):
        # a gradient has the shape of its parameter, of which a rank holds a part at this time
        partitioned: Any = parameter
        part = parameter.data
        parameter.data = part.new_zeros(partitioned.ds_shape)
        parameter.grad = torch.zeros_like(parameter)
        yield ()
        parameter.data = part
        return
    parameter.grad = torch.zeros_like(parameter)
    if optimizer.use_grad_accum_attribute:
        optimizer._fill_param_grad_accum_attribute(parameter)
    yield (next(i for i, group in enumerate(optimizer.bit16_groups) if any(one is parameter for one in group)),)


def masters_to_weights(engine: Any, parameters: Iterable[nn.Parameter]) -> None:
    """Round the masters into the weights that the forward pass uses. Collective."""
    if engine.zero_optimization_stage() < 3:
        engine.optimizer.update_lp_params()
        return
    from deepspeed.runtime.zero import GatheredParameters

    for parameter in parameters:
        master = full_master(parameter)
        with GatheredParameters([parameter], modifier_rank=0):
            parameter.data.copy_(master)
    gather_persistent(engine)


@contextlib.contextmanager
def whole_weights(engine: Any) -> Iterator[None]:
    """All weights gathered on every rank, without collectives in the forward pass.

    Under ZeRO-3 a forward pass is collective, but ranks evaluate different numbers of batches of different lengths.
    """
    if engine.zero_optimization_stage() < 3:
        yield
        return
    from deepspeed.runtime.zero import GatheredParameters

    offload = engine.optimizer.parameter_offload
    with GatheredParameters(list(engine.module.parameters()), modifier_rank=None):
        for hook in (*offload.forward_hooks, *offload.backward_hooks):
            hook.remove()
        offload.forward_hooks, offload.backward_hooks = [], []
        for parameter in engine.module.parameters():
            parameter.ds_active_sub_modules.clear()
        try:
            with without_leaf_reduction(engine):
                yield
        finally:
            offload._register_deepspeed_module(offload.module)
    gather_persistent(engine)


@contextlib.contextmanager
def without_leaf_reduction(engine: Any) -> Iterator[None]:
    """Backward passes reduce no gradients of the layers that stage 3 gathers whole.

    DeepSpeed reduces these in a hook of the module, which `torch.autograd.grad` runs as well: a pass of one rank alone
    would start collectives, or fail.
    """
    own = {handle.id for handle in engine.optimizer._leaf_module_hooks}
    taken = [
        (module._backward_hooks, identity, module._backward_hooks.pop(identity))
        for module in engine.module.modules()
        for identity in list(module._backward_hooks)
        if identity in own
    ]
    try:
        yield
    finally:
        for hooks, identity, hook in taken:
            hooks[identity] = hook


def gather_persistent(engine: Any) -> None:
    """Bring back the small weights that ZeRO-3 keeps whole: leaving `GatheredParameters` has partitioned them."""
    persistent = engine.optimizer.persistent_parameters
    if persistent:
        persistent[0].all_gather(persistent)
