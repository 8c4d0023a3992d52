"""The DeepSpeed JSON: read it, fill in what hdscale's configuration decides, refuse contradictions."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from hdscale.engine.settings import TrainSettings
from hdscale.errors import UserError
from hdscale.requirements import require

REPOSITORY = Path(__file__).resolve().parents[2]

# What `ds_configs/zero2_bf16.json` says: an installed package has no ds_configs/ beside it.
DEFAULT: dict[str, Any] = {
    "bf16": {"enabled": True},
    "zero_optimization": {
        "stage": 2,
        "contiguous_gradients": True,
        "reduce_scatter": True,
        "overlap_comm": False,
        "reduce_bucket_size": 50_000_000,
        "allgather_bucket_size": 50_000_000,
    },
    "communication_data_type": "fp32",
    "data_types": {"grad_accum_dtype": "fp32"},
    "managed_gradient_accumulation": False,
}


def read_deepspeed_config(path: str | None, dtype: str = "bf16") -> tuple[dict[str, Any], str]:
    """The DeepSpeed configuration as written, and its name for messages.

    Args:
        path: a JSON file, looked for from here and then from the repository; None: ZeRO-2 in `dtype`.

    Raises:
        UserError: if the file is missing or is not a JSON object.
    """
    if path is None:
        config = copy.deepcopy(DEFAULT)
        config["bf16"]["enabled"] = dtype == "bf16"
        return config, f"the default (ZeRO-2, {dtype})"
    places = [Path(path), REPOSITORY / path]
    file = next((place for place in places if place.is_file()), None)
    if file is None:
        raise UserError(f"deepspeed={path}: no such file; see ds_configs/ for those that ship")
    try:
        config = json.loads(file.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"deepspeed={path}: not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise UserError(f"deepspeed={path}: must be a JSON object, not {type(config).__name__}")
    return config, str(path)


def resolve_deepspeed_config(path: str | None, train: TrainSettings, world_size: int) -> dict[str, Any]:
    """What is handed to `deepspeed.initialize`: the JSON plus what hdscale decides.

    hdscale accumulates gradients itself (any number of micro-batches per step), scales the loss itself, and sets the
    learning rate itself. So DeepSpeed is told that a step has one row, and its optimizer, scheduler and batch-size keys
    are checked against `train.*` and then dropped.

    Raises:
        UserError: naming both keys, where the JSON contradicts `train.*` or asks for what hdscale does not do.
    """
    config, name = read_deepspeed_config(path, train.dtype)
    check_world_size(train, world_size)
    refuse_contradictions(config, name, train, world_size)
    for key in ("train_batch_size", "optimizer", "scheduler", "fp16", "amp", "torch_autocast"):
        config.pop(key, None)
    config["train_micro_batch_size_per_gpu"] = 1
    config["gradient_accumulation_steps"] = 1
    config["gradient_clipping"] = train.gradient_clipping
    config["bf16"] = {**section(config, "bf16", name), "enabled": train.dtype == "bf16"}
    config["data_types"] = {**section(config, "data_types", name), "grad_accum_dtype": "fp32"}
    config["managed_gradient_accumulation"] = False
    # its throughput timer waits for the device before and after each step, from the third on
    timers = section(config, "timers", name)
    config["timers"] = {**timers, "throughput": {"enabled": False, **section(timers, "throughput", f"{name}: timers")}}
    # torch's AdamW is used everywhere: DeepSpeed's own CPU Adam would be compiled on each machine
    config["zero_force_ds_cpu_optimizer"] = False
    config["zero_allow_untested_optimizer"] = True
    validate_zero_section(config["zero_optimization"], name)
    return config


def limit_buckets(config: dict[str, Any], trainable: int) -> dict[str, Any]:
    """A resolved configuration whose communication buckets are not larger than the trainable parameters."""
    smallest = 2 * ((max(trainable, 1024) + 1) // 2)
    config = copy.deepcopy(config)
    zero = config["zero_optimization"]
    for key in ("reduce_bucket_size", "allgather_bucket_size"):
        if isinstance(zero.get(key), int | float):
            zero[key] = min(int(zero[key]), smallest)
    return config


def zero_stage(config: dict[str, Any]) -> int:
    """The ZeRO stage of a resolved DeepSpeed configuration."""
    return int(config["zero_optimization"]["stage"])


def check_world_size(train: TrainSettings, world_size: int) -> None:
    """Raise UserError if the ranks cannot have equal shares of the global batch."""
    if train.global_batch_size % world_size:
        below = max(train.global_batch_size - train.global_batch_size % world_size, world_size)
        raise UserError(
            f"train.global_batch_size={train.global_batch_size} cannot be divided evenly among {world_size} ranks; "
            f"use for example {below} or {below + world_size}"
        )


def refuse_contradictions(config: dict[str, Any], name: str, train: TrainSettings, world_size: int) -> None:
    """Raise on the first key of the JSON that says something else than `train.*`."""
    rows = train.global_batch_size // world_size
    micro = min(train.micro_batch_size or rows, rows)
    optimizer = section(config, "optimizer", name)
    parameters = optimizer.get("params", {})
    bf16, fp16, amp = (section(config, key, name) for key in ("bf16", "fp16", "amp"))
    zero = section(config, "zero_optimization", name)

    decided = [
        ("train_batch_size", config.get("train_batch_size"), "train.global_batch_size", train.global_batch_size),
        ("train_micro_batch_size_per_gpu", config.get("train_micro_batch_size_per_gpu"),
         "train.micro_batch_size", micro),
        ("gradient_accumulation_steps", config.get("gradient_accumulation_steps"),
         "train.global_batch_size / (ranks * train.micro_batch_size)", -(-rows // micro)),
        ("gradient_clipping", config.get("gradient_clipping"), "train.gradient_clipping", train.gradient_clipping),
        ("optimizer.params.lr", parameters.get("lr"), "train.learning_rate", train.learning_rate),
        ("optimizer.params.weight_decay", parameters.get("weight_decay"), "train.weight_decay", train.weight_decay),
    ]  # fmt: skip
    for key, value, ours, wanted in decided:
        if value not in (None, "auto", wanted):
            raise UserError(f"{name}: {key}={value} contradicts {ours}={wanted}; leave {key} out or make them equal")

    if optimizer and str(optimizer.get("type", "AdamW")).lower() != "adamw":
        raise UserError(f"{name}: optimizer.type={optimizer['type']}: hdscale trains with AdamW; leave optimizer out")
    if config.get("scheduler"):
        raise UserError(
            f"{name}: scheduler contradicts train.warmup_steps and train.max_steps, "
            "which set the schedule; leave it out"
        )
    if fp16.get("enabled") or amp.get("enabled"):
        raise UserError(f"{name}: fp16 or amp contradicts train.dtype={train.dtype}; T5 overflows in fp16: use bf16")
    if bf16 and bool(bf16.get("enabled")) != (train.dtype == "bf16"):
        raise UserError(
            f"{name}: bf16.enabled={str(bool(bf16.get('enabled'))).lower()} contradicts train.dtype={train.dtype}; "
            "choose a file of the same dtype, or set train.dtype"
        )
    if section(config, "data_types", name).get("grad_accum_dtype") not in (None, "fp32"):
        raise UserError(f"{name}: data_types.grad_accum_dtype must be fp32: gradients are accumulated in fp32")
    if config.get("managed_gradient_accumulation"):
        raise UserError(f"{name}: managed_gradient_accumulation must be false: hdscale counts the micro-batches itself")
    if zero.get("stage") not in (1, 2, 3):
        raise UserError(f"{name}: zero_optimization.stage={zero.get('stage')}: must be 1, 2 or 3")
    if zero.get("contiguous_gradients") is False and zero.get("reduce_scatter") is False:
        raise UserError(
            f"{name}: zero_optimization.contiguous_gradients=false with reduce_scatter=false can skip the gradients' "
            "all-reduce; set one of them to true"
        )


def section(config: dict[str, Any], key: str, name: str) -> dict[str, Any]:
    """A nested object of the JSON ({} where absent).

    Raises:
        UserError: if it is something else than an object.
    """
    value = config.get(key) or {}
    if not isinstance(value, dict):
        raise UserError(f"{name}: {key} must be an object, not {value!r}")
    return value


def validate_zero_section(zero: dict[str, Any], name: str) -> None:
    """Let DeepSpeed check its own section now, and not after the model is loaded."""
    require("deepspeed")
    import pydantic
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    try:
        DeepSpeedZeroConfig(**zero)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in ("zero_optimization", *first["loc"]))
        raise UserError(f"{name}: {where}: {first['msg']}") from error
