"""What a model launches, waits for and keeps on a simulated GPU whose kernels do nothing; prints JSON.

`python -m tests.simulated_gpu.run PYTHON -m tests.simulated_gpu.measure '{"size": "t5-v1_1-base", …}'`; the keys are
the arguments of `measure`. The weights are random, and no number that is computed means anything.
"""

from __future__ import annotations

import json
import logging
import re
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from hdscale.bases.gpu import prepare_cuda
from hdscale.bases.greedy import Number
from hdscale.config import Config, load_config
from hdscale.data.batches import Row, collate
from hdscale.engine.deepspeed_engine import build_engine
from hdscale.engine.environment import read_environment
from hdscale.engine.ranks import Ranks
from hdscale.modeling.model import AdaptedModel, build_model
from hdscale.resolve import resolve
from tests.simulated_gpu.loaded import counted, counters, waits

GPU = torch.device("cuda")
ROWS, SOURCE, TARGET = 16, 128, 4
KINDS = {
    "attention, fused": r"fmha_cutlass[FB]|flash_(fwd|bwd)|pytorch_flash",
    "attention, softmax of its own": r"softmax|SoftMax",
    "product": r"^cublas",
    "hdscale": r"hdscale",
}
"""Kernels by what their names say."""


def measure(
    size: str,
    settings: Sequence[str] = (),
    launches: bool = False,
    decoded: tuple[int, int] | None = None,
    steps: int = 0,
    sources: Iterable[int] = (),
    plant: str | None = None,
) -> dict[str, Any]:
    """Measure a model.

    Args:
        size: `model.name`.
        settings: `key=value`, as for a run.
        launches: of one pass, forward and backward.
        decoded: two numbers of tokens; launches per token are the difference.
        steps: of the engine; waits of each.
        sources: lengths; the most bytes allocated in one pass, for each.
        plant: a function `module:name` that plants a fault before anything else: see faults.py.
    """
    # no kernel computes: a row's end would be at its first token
    read = Number.read
    Number.read = lambda self: (read(self), ROWS)[1]
    logging.getLogger("hdscale.bases.loading").setLevel(logging.ERROR)
    prepare_cuda()
    if plant:
        module, _, name = plant.partition(":")
        getattr(import_module(module), name)()
    config = configured(size, settings)
    found: dict[str, Any] = {}
    if steps:
        found["steps"] = waits_of_steps(config, steps)
    if launches or decoded or sources:
        model = build_model(resolve(config, 1).model, torch.bfloat16, GPU, seed=0)
        found["layers"] = {stack: model.base.sizes(stack).layers for stack in ("encoder", "decoder")}
        if launches:
            found["launches"] = launches_of_a_pass(model)
        if decoded:
            found["launches of a token"] = launches_of_a_token(model, *decoded)
        if sources:
            found["bytes"] = {length: bytes_of_a_pass(model, length) for length in sources}
    found["faults"] = [name for name in counters() if name.startswith("fault ")]
    return found


def configured(size: str, settings: Sequence[str]) -> Config:
    """The configuration of a run with these settings."""
    return load_config(
        None,
        [
            f"model.name={size}", "data.tasks=[quickstart]", "train.max_steps=100", f"train.global_batch_size={ROWS}",
            *settings,
        ],
    )  # fmt: skip


def batch(source: int = SOURCE, target: int = TARGET) -> dict[str, Tensor]:
    """Rows of these lengths as a feed gives them: in pinned memory."""
    rows = [Row([5] * source, [7] * target, 0, "row", "task") for _ in range(ROWS)]
    return {name: tensor.pin_memory() for name, tensor in collate(rows, 0).items()}


def one_pass(model: AdaptedModel, on_gpu: dict[str, Tensor]) -> None:
    """Forward and backward."""
    model.train()
    model(**on_gpu).loss_sum.backward()
    for parameter in model.parameters():
        parameter.grad = None


def on_gpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors there."""
    return {name: tensor.to(GPU, non_blocking=True) for name, tensor in tensors.items()}


def launches_of_a_pass(model: AdaptedModel) -> dict[str, int]:
    """Kernels of one pass, by kind; the first pass also compiles and allocates, and is not counted."""
    moved = on_gpu(batch())
    one_pass(model, moved)
    return by_kind(counted(partial(one_pass, model, moved)))


def launches_of_a_token(model: AdaptedModel, few: int, many: int) -> dict[str, float]:
    """Kernels of one decoded token, by kind."""
    moved = on_gpu(batch())

    def decode(tokens: int) -> None:
        with torch.inference_mode():
            model.eval().generate(
                moved["input_ids"], moved["attention_mask"], max_new_tokens=tokens, min_new_tokens=tokens
            )

    decode(few)
    short, long = (by_kind(counted(partial(decode, tokens))) for tokens in (few, many))
    return {kind: (long[kind] - short[kind]) / (many - few) for kind in long}


def by_kind(found: Counter[str]) -> dict[str, int]:
    """Launches in all, copies and fills of the runtime among them, and by `KINDS`."""
    names = {name.removeprefix("launch "): times for name, times in found.items() if name.startswith("launch ")}
    kinds = {
        kind: sum(times for name, times in names.items() if re.search(pattern, name)) for kind, pattern in KINDS.items()
    }
    return {"all": found["launch"] + found["copy device to device"] + found["memset"], **kinds}


def bytes_of_a_pass(model: AdaptedModel, source: int) -> int:
    """The most bytes of tensors at any moment of a pass, beyond those before it."""
    moved = on_gpu(batch(source, 64))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    one_pass(model, moved)
    return torch.cuda.max_memory_allocated() - before


def waits_of_steps(config: Config, steps: int) -> list[dict[str, int]]:
    """What the host waits for in each step of the engine, by call and place; a step's numbers are read one step late,
    as a run does."""
    ranks = Ranks.start(read_environment(), device="cuda")
    resolved = resolve(config, 1)
    model = build_model(resolved.model, torch.bfloat16, ranks.device, seed=0, trainable_dtype=torch.float32)
    engine = build_engine(model, config.train, resolved.deepspeed, ranks, config.run.seed)
    found, pending = [], None
    for _ in range(steps):
        tensors = batch()
        with waits() as seen:
            started = engine.train_step([tensors])
            if pending is not None:
                pending.result()
        pending = started
        found.append(dict(seen))
    engine.close()
    return found


if __name__ == "__main__":
    print("measured " + json.dumps(measure(**json.loads(sys.argv[1]))))
