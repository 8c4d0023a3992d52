"""`hdscale plan`: memory, time and communication of a run, before a GPU hour is spent. docs/plan.md has the formulas."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from dataclasses import asdict, dataclass, field
from typing import Any

from hdscale.config import Config, load_config
from hdscale.errors import EXIT_DONE, UserError
from hdscale.resolve import resolve_model
from hdscale.study import compute
from hdscale.study.compute import Communication, Flops
from hdscale.study.hardware import DEVICES, Device, find_device
from hdscale.study.memory_model import Architecture, Memory, Sharding, Work, step_memory

HEADROOM = 0.92
"""Share of a GPU's memory that a plan fills."""

PAPER_HOURS = {
    "GLUE, T5-large": 18.0,
    "MRQA, T5-base": 13.0,
    "summarisation + NLI, T5-base": 22.5,
}
"""Appendix B: hours on one A100-80GB, preprocessing and all evaluation included."""


@dataclass
class Plan:
    """All that `hdscale plan` says; bytes, seconds and FLOP."""

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
    memory: Memory | None
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
    communication: Communication | None
    communication_seconds: float
    efficiency: float
    command: str
    advice: list[str] = field(default_factory=list)


def architecture(config: Config) -> Architecture:
    """The base's shape, from its configuration alone."""
    from hdscale.bases.base import base_config

    base = base_config(config.model)
    dropout = base.dropout_rate if config.model.dropout is None else config.model.dropout
    return Architecture(
        base.d_model,
        base.d_ff,
        base.num_heads,
        base.d_kv,
        base.num_layers,
        base.num_decoder_layers,
        base.vocab_size,
        "gated" in base.feed_forward_proj,
        dropout,
    )


def work_of(config: Config, rows: int, device: str, sides: dict[str, tuple[str, int]]) -> Work:
    """What a rank computes for a micro-batch of so many rows at their greatest length."""
    encoder, decoder = sides["encoder"], sides["decoder"]
    return Work(
        rows=rows,
        source=config.data.max_source_length,
        target=config.data.max_target_length,
        dtype_bytes=2 if config.train.dtype == "bf16" else 4,
        device=device,
        checkpointing=config.model.activation_checkpointing,
        attention=config.model.attention,
        encoder_dim=encoder[1],
        decoder_dim=decoder[1],
        encoder_passes=2 if encoder[0] == "generated" else 1,
        generated=decoder[0] in ("generated", "task"),
        keeps_generated=config.method.backend == "torch",
        trains_base=config.method.name == "full_finetuning",
        label_smoothing=config.train.label_smoothing,
    )


def counted(config: Config) -> tuple[Any, dict[str, tuple[str, int]], int]:
    """(parameter count, {side: (kind, size)}, parameters of the decoder's hypernetwork heads) on the meta device."""
    import torch

    from hdscale.modeling.model import build_model
    from hdscale.modeling.parameters import count_parameters

    model = build_model(resolve_model(config), dtype=torch.float32, device="meta")
    count = count_parameters(model)
    method = model.config.method
    sides = {}
    for name in ("encoder", "decoder"):
        side = getattr(method, name)
        kind = side.adapter
        if method.name == "adapter":
            kind = "manual"
        elif method.name == "task_hypernet":
            kind = "task"
        elif method.name != "hyperdecoder":
            # other methods: as many activations as an adapter of the size that their trainables would make
            kind = "manual"
        sides[name] = (kind, 0 if kind == "none" else side.dim)
    heads = sum(
        parameter.numel()
        for name, parameter in model.method.named_parameters()
        if name.startswith("decoder.") and ".adapter_heads." in name
    )
    return count, sides, heads


def make_plan(config: Config, gpu: Device, gpus: int, efficiency: float = compute.EFFICIENCY) -> Plan:
    """Plan a run.

    The ZeRO stage is the lowest that fits; with trainables of a few per cent that is usually stage 1 or 2, where nothing
    but the optimizer's shards differs. Activation checkpointing is switched on only where a micro-batch of one row does
    not fit without.

    Raises:
        UserError: for a global batch that the GPUs do not divide.
    """
    count, sides, heads = counted(config)
    base = architecture(config)
    if config.train.global_batch_size % gpus:
        raise UserError(
            f"train.global_batch_size={config.train.global_batch_size} cannot be shared out among {gpus} GPUs; "
            "choose a number of GPUs that divides it"
        )
    share = config.train.global_batch_size // gpus
    room = HEADROOM * gpu.memory
    trained = count.trainable

    def memory(rows: int, stage: int, offload: bool, checkpointing: str, backend: str | None = None) -> Memory:
        work = dataclasses.replace(work_of(config, rows, "cuda", sides), checkpointing=checkpointing)
        if backend is not None:
            work = dataclasses.replace(work, keeps_generated=backend == "torch")
        return step_memory(base, work, Sharding(gpus, stage, offload), count.base, trained, heads)

    found = None
    asked = config.model.activation_checkpointing
    for stage, offload in ((1, False), (2, False), (2, True), (3, False), (3, True)):
        if stage == 3 and gpus == 1:
            continue
        for checkpointing in dict.fromkeys((asked, "all")):
            rows = largest(lambda n: memory(n, stage, offload, checkpointing).peak <= room, share)  # noqa: B023
            if rows:
                found = (stage, offload, checkpointing, rows)
                break
        if found:
            break
    advice: list[str] = []
    if found is None:
        stage, offload, checkpointing, rows = 3 if gpus > 1 else 2, True, "all", 1
        smallest = memory(1, stage, offload, checkpointing)
        advice.append(
            f"does not fit: one row needs {gb(smallest.peak)} with everything recomputed and offloaded, of which "
            f"{gb(smallest.frozen)} are frozen weights; a GPU has {gb(gpu.memory)}: more GPUs (ZeRO-3) or larger ones"
        )
    else:
        stage, offload, checkpointing, rows = found
        if stage == 1 and gpus > 1:
            two = memory(rows, 2, False, checkpointing)
            one = memory(rows, 1, False, checkpointing)
            micro = math.ceil(share / rows)
            advice.append(
                f"ZeRO-1 is enough: stage 2 would save {gb(one.peak - two.peak)} of {gb(one.peak)}, since only "
                f"{count.percent:.1f}% of the weights train"
                + (f", and would reduce gradients {micro} times a step instead of once" if micro > 1 else "")
            )
        if offload:
            host = memory(rows, stage, offload, checkpointing).host
            advice.append(
                f"masters and moments go to host memory: {gb(host)} a rank; every step moves them over the host's bus, "
                "which the time below does not count"
            )
        if checkpointing != asked:
            advice.append(
                f"activations are recomputed (model.activation_checkpointing={checkpointing}): one row would not fit else"
            )
    accumulation = math.ceil(share / rows)
    rows = math.ceil(share / accumulation)
    chosen = memory(rows, stage, offload, checkpointing)
    work = dataclasses.replace(work_of(config, rows, "cuda", sides), checkpointing=checkpointing)
    sharding = Sharding(gpus, stage, offload)
    bottleneck = config.method.hypernet.bottleneck if work.generated else 0
    flops = compute.row_flops(base, work, bottleneck)
    step_flops = flops.training * config.train.global_batch_size
    sent = compute.communication(trained, chosen.frozen * (gpus if stage == 3 else 1), work, sharding, accumulation)
    line = gpu.link if gpus <= gpu.gpus_per_node else gpu.network
    seconds = compute.seconds_of(step_flops / gpus, gpu, config.train.dtype, efficiency)
    step_seconds = seconds + sent.total / line
    steps = steps_of(config)
    training = steps * step_seconds / 3600 if steps else None
    evaluation = evaluation_hours(config, base, flops, gpu, gpus, efficiency, steps)
    hours = None if training is None else (training + (evaluation or 0.0)) * gpus
    kept = {backend: memory(rows, stage, offload, checkpointing, backend).generated for backend in ("torch", "cuda")}
    others = {one: memory(rows, stage, offload, one).peak for one in ("none", "encoder", "all") if one != checkpointing}
    plan = Plan(
        model=config.model.name,
        method=config.method.name,
        gpu=gpu.name,
        gpus=gpus,
        parameters=count.base,
        trainable=trained,
        parts=count.parts,
        fits=found is not None,
        stage=stage,
        offload=offload,
        checkpointing=checkpointing,
        micro_batch_size=rows,
        accumulation=accumulation,
        memory=chosen,
        memory_other_checkpointing=others,
        generated_by_backend=kept,
        loading_host=loading_host(config, base, count.base),
        flops_a_row=flops,
        step_flops=step_flops,
        step_seconds=step_seconds,
        steps=steps,
        training_hours=training,
        evaluation_hours=evaluation,
        gpu_hours=hours,
        communication=sent,
        communication_seconds=sent.total / line,
        efficiency=efficiency,
        command="",
        advice=advice,
    )
    plan.command = command_of(config, plan, gpu)
    return plan


def largest(fits: Any, most: int) -> int:
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


def steps_of(config: Config) -> int | None:
    """Optimizer steps of the run; with epochs, from the sizes of the full data where the package knows them."""
    if config.train.epochs is None:
        return config.train.max_steps
    rows = full_rows(config, "train")
    return None if rows is None else math.ceil(config.train.epochs * rows / config.train.global_batch_size)


def full_rows(config: Config, split: str) -> int | None:
    """Rows of a split of all tasks at full size (Tables 10-12); None where a task is not in them."""
    from hdscale.data.tasks import expand_tasks
    from hdscale.data.tasks.sizes import TABLE_10, TABLE_11, TABLE_12

    total = 0
    for task in expand_tasks(config.data.tasks, config.data):
        known = next((table[task.name] for table in (TABLE_10, TABLE_11, TABLE_12) if task.name in table), None)
        if known is None:
            return None
        total += known.get(split, 0)
    return total


def evaluation_hours(
    config: Config, base: Architecture, flops: Flops, gpu: Device, gpus: int, efficiency: float, steps: int | None
) -> float | None:
    """Hours of all evaluations: encoder's pass and greedy decoding to the longest target, an upper bound for labels."""
    rows, test = full_rows(config, "validation"), full_rows(config, "test")
    if rows is None or test is None or steps is None:
        return None
    if config.eval.limit is not None:
        from hdscale.data.tasks import expand_tasks

        rows = min(rows, config.eval.limit * len(expand_tasks(config.data.tasks, config.data)))
    times = steps // config.eval.every if config.eval.every else 0
    total = times * rows + test + (rows if config.eval.select != "last" and not times else 0)
    e = 2 if config.train.dtype == "bf16" else 4
    encoder = compute.seconds_of(total * flops.encoder, gpu, config.train.dtype, efficiency)
    decoding = compute.decoding_seconds(base, total, config.data.max_target_length, 256, e, gpu)
    return (encoder + decoding) / gpus / 3600


def loading_host(config: Config, base: Architecture, parameters: int) -> float:
    """Host memory of a rank's own while loading onto a GPU: the largest tensor, converted."""
    return 4.0 * base.vocabulary * base.d_model


SHIPPED = {
    (1, False, "bf16"): "zero1_bf16",
    (2, False, "bf16"): "zero2_bf16",
    (2, False, "fp32"): "zero2_fp32",
    (2, True, "bf16"): "zero2_offload_bf16",
    (3, False, "bf16"): "zero3_bf16",
}
"""(stage, offload, dtype): file of ds_configs/."""


def command_of(config: Config, plan: Plan, gpu: Device) -> str:
    """The command line that follows from a plan; where no DeepSpeed JSON of the stage ships, advice to write one."""
    settings = [f"train.micro_batch_size={plan.micro_batch_size}"]
    key = (plan.stage, plan.offload, config.train.dtype)
    if key in SHIPPED:
        settings.append(f"deepspeed=ds_configs/{SHIPPED[key]}.json")
    elif key == (1, False, "fp32"):
        # stage 2 differs in when gradients are reduced, and ships
        settings.append("deepspeed=ds_configs/zero2_fp32.json")
    else:
        settings.append("deepspeed=YOURS.json")
        offload = " with offload_optimizer" if plan.offload else ""
        plan.advice.append(
            f"no JSON of ZeRO-{plan.stage}{offload} in {config.train.dtype} ships: copy the nearest of ds_configs/ to YOURS.json"
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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    from hdscale.commands.arguments import add_config_arguments

    add_config_arguments(parser, required=False)
    parser.add_argument("--gpu", default="a100-80gb", help=f"one of {', '.join(DEVICES)} (default: a100-80gb)")
    parser.add_argument("--gpus", type=int, default=1, metavar="N", help="GPUs in all (default: 1)")
    parser.add_argument(
        "--efficiency",
        type=float,
        default=compute.EFFICIENCY,
        help="assumed share of the GPU's dense peak (default: 0.35)",
    )
    parser.add_argument(
        "--sizes", action="store_true", help="which sizes fit one A100-40, one A100-80 and eight of them"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """The verb."""
    from hdscale.study.plan_tables import print_plan, print_sizes

    if args.gpus < 1:
        raise UserError(f"--gpus {args.gpus}: at least one")
    if not 0.0 < args.efficiency <= 1.0:
        raise UserError(f"--efficiency {args.efficiency}: must be above 0 and at most 1")
    if not args.config:
        raise UserError("which run? name it with --config FILE (configs/)")
    config = load_config(args.config, args.overrides)
    if args.sizes:
        return print_sizes(config, args.efficiency, args.json)
    plan = make_plan(config, find_device(args.gpu), args.gpus, args.efficiency)
    plan.command = plan.command.replace("FILE", " ".join([args.config, *args.overrides]))
    if args.json:
        tree = asdict(plan)
        tree["memory"] |= {
            "peak": plan.memory.peak,
            "moment": plan.memory.moment,
            "moments": plan.memory.moments_of_peak,
        }
        print(json.dumps(tree, indent=2))
        return EXIT_DONE
    print_plan(plan, config)
    return EXIT_DONE
