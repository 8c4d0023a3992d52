"""Plans a run before it costs a GPU hour: memory, time and communication. docs/plan.md has the formulas.

`hdscale plan` (`hdscale/commands/plan.py`) prints what `make_plan` finds.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field

from hdscale.config import Config
from hdscale.errors import UserError
from hdscale.study import compute
from hdscale.study.compute import Communication, Flops
from hdscale.study.hardware import Device
from hdscale.study.inputs import architecture, counted, work_of
from hdscale.study.memory_model import Architecture, Memory, Sharding, Work, step_memory
from hdscale.study.plan_length import evaluation_hours, steps_of

HEADROOM = 0.92
"""Share of a GPU's memory that a plan fills."""

STAGES = ((1, False), (2, False), (2, True), (3, False), (3, True))
"""(ZeRO stage, optimizer offload) in the order in which they are tried."""

SHIPPED = {
    (1, False, "bf16"): "zero1_bf16",
    (2, False, "bf16"): "zero2_bf16",
    (2, False, "fp32"): "zero2_fp32",
    (2, True, "bf16"): "zero2_offload_bf16",
    (3, False, "bf16"): "zero3_bf16",
}
"""(stage, offload, dtype): file of ds_configs/."""


@dataclass
class Plan:
    """All that `hdscale plan` says; bytes, seconds and FLOP.

    Attributes:
        parameters: of the base. trainable: what the method trains, by part in `parts`.
        fits: whether any layout fits; if none does, the figures are those of the smallest.
        stage: of ZeRO. offload: masters and moments are in host memory. checkpointing: of activations.
        accumulation: micro-batches per step and rank.
        memory_other_checkpointing: {activation checkpointing: peak} of the other choices.
        generated_by_backend: {backend: bytes of generated adapters that it keeps}.
        loading_host: host memory per rank while the weights are loaded.
        steps, training_hours, gpu_hours: None where the length of the run is unknown. evaluation_hours: None where
            the sizes of the data are.
        communication_seconds: of `step_seconds`.
        efficiency: assumed share of the GPU's dense peak. command: starts the run. advice: sentences.
    """

    model: str
    method: str
    gpu: str
    gpus: int
    parameters: int
    trainable: int
    parts: dict[str, int]
    fits: bool
    stage: int
    offload: bool
    checkpointing: str
    micro_batch_size: int
    accumulation: int
    memory: Memory
    memory_other_checkpointing: dict[str, float]
    generated_by_backend: dict[str, float]
    loading_host: float
    flops_a_row: Flops
    step_flops: float
    step_seconds: float
    steps: int | None
    training_hours: float | None
    evaluation_hours: float | None
    gpu_hours: float | None
    communication: Communication
    communication_seconds: float
    efficiency: float
    command: str
    advice: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Layout:
    """How a step is laid out: ZeRO stage, optimizer offload, activation checkpointing, rows of a micro-batch."""

    stage: int
    offload: bool
    checkpointing: str
    rows: int


class StepMemory:
    """The memory of a rank's step for any layout of one configuration on some GPUs.

    Attributes:
        base: shape of the base. count, sides, heads: as from `counted`.
    """

    def __init__(self, config: Config, gpus: int) -> None:
        self.config, self.gpus = config, gpus
        self.base: Architecture = architecture(config)
        self.count, self.sides, self.heads = counted(config)

    def work(self, layout: Layout) -> Work:
        """What a rank computes for one micro-batch."""
        work = work_of(self.config, layout.rows, "cuda", self.sides)
        return dataclasses.replace(work, checkpointing=layout.checkpointing)

    def sharding(self, layout: Layout) -> Sharding:
        """How DeepSpeed distributes the trainable parameters."""
        return Sharding(self.gpus, layout.stage, layout.offload)

    def of(self, layout: Layout, backend: str | None = None) -> Memory:
        """The memory of a layout; `backend` replaces the configured backend of the operator."""
        work = self.work(layout)
        if backend is not None:
            work = dataclasses.replace(work, keeps_generated=backend == "torch")
        return step_memory(self.base, work, self.sharding(layout), self.count.base, self.count.trainable, self.heads)


def make_plan(config: Config, gpu: Device, gpus: int, efficiency: float = compute.EFFICIENCY) -> Plan:
    """Plan a run.

    The ZeRO stage is the lowest that fits; with trainables of a few per cent that is usually stage 1 or 2, where only
    the optimizer's shards differ. Activation checkpointing is switched on only where a micro-batch of one row does not
    fit without it.

    Args:
        efficiency: assumed share of the GPU's dense peak.

    Raises:
        UserError: for a global batch that the GPUs do not divide.
    """
    memory = StepMemory(config, gpus)
    if config.train.global_batch_size % gpus:
        raise UserError(
            f"train.global_batch_size={config.train.global_batch_size} cannot be divided by {gpus} GPUs; "
            "choose a number of GPUs that divides it"
        )
    share = config.train.global_batch_size // gpus
    found = find_layout(memory, HEADROOM * gpu.memory, share)
    smallest = Layout(3 if gpus > 1 else 2, True, "all", 1)
    advice = layout_advice(memory, found, share) if found else [refusal(memory.of(smallest), gpu)]
    layout = found or smallest
    accumulation = math.ceil(share / layout.rows)
    layout = dataclasses.replace(layout, rows=math.ceil(share / accumulation))
    chosen = memory.of(layout)
    work = memory.work(layout)
    trained = memory.count.trainable

    flops = compute.row_flops(memory.base, work, config.method.hypernet.bottleneck if work.generated else 0)
    step_flops = flops.training * config.train.global_batch_size
    frozen = chosen.frozen * (gpus if layout.stage == 3 else 1)
    sent = compute.communication(trained, frozen, work, memory.sharding(layout), accumulation)
    line = gpu.link if gpus <= gpu.gpus_per_node else gpu.network
    seconds = compute.seconds_of(step_flops / gpus, gpu, config.train.dtype, efficiency)
    step_seconds = seconds + sent.total / line

    steps = steps_of(config)
    training = steps * step_seconds / 3600 if steps else None
    evaluation = evaluation_hours(config, memory.base, flops, gpu, gpus, efficiency, steps)
    others = [one for one in ("none", "encoder", "all") if one != layout.checkpointing]
    plan = Plan(
        model=config.model.name,
        method=config.method.name,
        gpu=gpu.name,
        gpus=gpus,
        parameters=memory.count.base,
        trainable=trained,
        parts=memory.count.parts,
        fits=found is not None,
        stage=layout.stage,
        offload=layout.offload,
        checkpointing=layout.checkpointing,
        micro_batch_size=layout.rows,
        accumulation=accumulation,
        memory=chosen,
        memory_other_checkpointing={
            one: memory.of(dataclasses.replace(layout, checkpointing=one)).peak for one in others
        },
        generated_by_backend={backend: memory.of(layout, backend).generated for backend in ("torch", "cuda")},
        loading_host=loading_host(memory.base),
        flops_a_row=flops,
        step_flops=step_flops,
        step_seconds=step_seconds,
        steps=steps,
        training_hours=training,
        evaluation_hours=evaluation,
        gpu_hours=None if training is None else (training + (evaluation or 0.0)) * gpus,
        communication=sent,
        communication_seconds=sent.total / line,
        efficiency=efficiency,
        command="",
        advice=advice,
    )
    plan.command = command_of(config, plan, gpu)
    return plan


def find_layout(memory: StepMemory, room: float, most: int) -> Layout | None:
    """The first layout of `STAGES` that fits, with as many rows as possible; None where not even one row fits.

    Args:
        room: bytes of a GPU that may be filled. most: rows of a rank's share of the global batch.
    """
    asked = memory.config.model.activation_checkpointing
    for stage, offload in STAGES:
        if stage == 3 and memory.gpus == 1:
            continue
        for checkpointing in dict.fromkeys((asked, "all")):
            one = Layout(stage, offload, checkpointing, 1)

            def fits(rows: int, one: Layout = one) -> bool:
                return memory.of(dataclasses.replace(one, rows=rows)).peak <= room

            if rows := largest(fits, most):
                return dataclasses.replace(one, rows=rows)
    return None


def largest(fits: Callable[[int], bool], most: int) -> int:
    """The largest number of rows up to `most` that fits; 0 where not even one does."""
    if not fits(1):
        return 0
    low, high = 1, most
    while low < high:
        middle = (low + high + 1) // 2
        if fits(middle):
            low = middle
        else:
            high = middle - 1
    return low


def refusal(smallest: Memory, gpu: Device) -> str:
    """Why no layout fits, from the memory of the smallest one."""
    return (
        f"does not fit: one row needs {gb(smallest.peak)} with everything recomputed and offloaded, of which "
        f"{gb(smallest.frozen)} are frozen weights; a GPU has {gb(gpu.memory)}: more GPUs (ZeRO-3) or larger ones"
    )


def layout_advice(memory: StepMemory, layout: Layout, share: int) -> list[str]:
    """What is worth knowing of a layout that fits; `share` is a rank's rows of the global batch."""
    advice = []
    if layout.stage == 1 and memory.gpus > 1:
        one, two = memory.of(layout), memory.of(dataclasses.replace(layout, stage=2, offload=False))
        micro = math.ceil(share / layout.rows)
        advice.append(
            f"ZeRO-1 is enough: stage 2 would save {gb(one.peak - two.peak)} of {gb(one.peak)}, since only "
            f"{memory.count.percent:.1f}% of the weights train"
            + (f", and would reduce gradients {micro} times per step instead of once" if micro > 1 else "")
        )
    if layout.offload:
        advice.append(
            f"masters and moments are kept in host memory: {gb(memory.of(layout).host)} per rank; every step moves "
            "them over the host's bus, which is not counted in the time below"
        )
    if layout.checkpointing != memory.config.model.activation_checkpointing:
        advice.append(
            f"activations are recomputed (model.activation_checkpointing={layout.checkpointing}): otherwise not even "
            "one row would fit"
        )
    return advice


def loading_host(base: Architecture) -> float:
    """Bytes of host memory that each rank needs while loading onto a GPU: the largest tensor, converted to float32."""
    return 4.0 * base.vocabulary * base.d_model


def command_of(config: Config, plan: Plan, gpu: Device) -> str:
    """The command line that follows from a plan; where no DeepSpeed JSON of the stage ships, advice to write one."""
    settings = [f"train.micro_batch_size={plan.micro_batch_size}"]
    key = (plan.stage, plan.offload, config.train.dtype)
    if key in SHIPPED:
        settings.append(f"deepspeed=ds_configs/{SHIPPED[key]}.json")
    elif key == (1, False, "fp32"):
        # stage 2 ships, and differs only in when gradients are reduced
        settings.append("deepspeed=ds_configs/zero2_fp32.json")
    else:
        settings.append("deepspeed=YOURS.json")
        offload = " with offload_optimizer" if plan.offload else ""
        plan.advice.append(
            f"no JSON for ZeRO-{plan.stage}{offload} in {config.train.dtype} ships: copy the most similar one of "
            "ds_configs/ to YOURS.json and change it"
        )
    if plan.checkpointing != config.model.activation_checkpointing:
        settings.append(f"model.activation_checkpointing={plan.checkpointing}")
    if plan.gpus <= gpu.gpus_per_node:
        return f"deepspeed --num_gpus {plan.gpus} hdscale/train.py --config FILE {' '.join(settings)}"
    nodes = math.ceil(plan.gpus / gpu.gpus_per_node)
    where = f"cluster.nodes={nodes} cluster.gpus_per_node={gpu.gpus_per_node}"
    return f"hdscale launch --config FILE {where} {' '.join(settings)}"


def gb(value: float) -> str:
    """Bytes as GB (10^9)."""
    return f"{value / 1e9:.2f} GB"
