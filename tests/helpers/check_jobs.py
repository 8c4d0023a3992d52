"""What the tests of the self-check run on the ranks: a first step with a fault of the engine's, or without one."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from hdscale import train as train_module
from hdscale.engine import zero
from hdscale.engine.checks import WrongGradient, compare_gradients, plain_gradient
from hdscale.engine.deepspeed_engine import Engine
from hdscale.engine.ranks import Ranks
from hdscale.modeling import HyperdecoderConfig, build_model
from tests.helpers.toy import ToyModel, settings, text_batch, toy_engine

FAULTY = "shared"
"""The tensor of the toy model whose gradient is doubled."""


def drop_micro_batch(engine: Engine) -> None:
    """The second backward pass of each rank is left out of the sum, as DeepSpeed below 0.19.4 did with all but one."""
    backward, calls = engine._deepspeed.backward, []

    def all_but_the_second(loss: torch.Tensor, **given: Any) -> None:
        calls.append(1)
        backward(loss * 0 if len(calls) == 2 else loss, **given)

    engine._deepspeed.backward = all_but_the_second


def drop_rank(engine: Engine) -> None:
    """The last rank's gradients are left out of the sum."""
    backward = engine._deepspeed.backward
    last = engine.ranks.rank == engine.ranks.world_size - 1
    engine._deepspeed.backward = lambda loss, **given: backward(loss * 0 if last else loss, **given)


def double_tensor(engine: Engine, name: str = FAULTY) -> None:
    """One tensor's gradient is counted twice."""
    engine.parameters[name].register_hook(lambda gradient: gradient * 2)


FAULTS: dict[str, Callable[[Engine], None]] = {
    "none": lambda engine: None,
    "micro-batch": drop_micro_batch,
    "rank": drop_rank,
    "tensor": double_tensor,
}


def toy_batch(rank: int, index: int, rows: int = 2) -> dict[str, torch.Tensor]:
    """A micro-batch whose number of targets is its own."""
    generator = torch.Generator().manual_seed(10 * rank + index)
    input_ids = torch.randint(0, 23, (rows, 5), generator=generator)
    lengths = torch.randint(1, 6, (rows, 1), generator=generator)
    return {"input_ids": input_ids, "labels": input_ids.masked_fill(torch.arange(5) >= lengths, -100)}


def told(engine: Engine, batch: Callable[[int, int], Any], fault: str = "none", count: int = 2) -> str:
    """The check's line about the first step, or its error; the fault is there in the step only."""
    ranks = engine.ranks
    passes = [[partial(batch, rank, index) for index in range(count)] for rank in range(ranks.world_size)]
    state = torch.random.get_rng_state()
    plain = plain_gradient(engine, passes)
    assert torch.equal(state, torch.random.get_rng_state())
    FAULTS[fault](engine)
    engine.train_step([batch(ranks.rank, index) for index in range(count)]).result()
    try:
        return compare_gradients(engine, plain)
    except WrongGradient as error:
        return f"wrong: {error}"


def toys(ranks: Ranks, cases: list[dict[str, Any]]) -> list[str]:
    """For each case, a fault and settings, what the check says."""
    found = []
    for case in cases:
        fault = case.pop("fault")
        engine = toy_engine(ToyModel(dropout=0.2), settings(global_batch_size=12, **case), ranks)
        found.append(told(engine, toy_batch, fault))
        engine.close()
    return found


def methods(ranks: Ranks, base: str, configs: list[dict[str, Any]], cases: list[dict[str, Any]]) -> list[str]:
    """For each method and each of the settings, what the check says of its first step without a fault."""
    found = []
    for method in configs:
        for case in cases:
            engine = adapted_engine(ranks, base, method, case)
            found.append(told(engine, unlike))
            engine.close()
    return found


def small_gradients(ranks: Ranks, base: str, method: dict[str, Any], case: dict[str, Any], names: list[str]) -> Any:
    """The shares that some tensors have of the whole gradient, and what the check says when one of them is doubled."""
    found = {}
    for name in names:
        engine = adapted_engine(ranks, base, method, case)
        passes = [[partial(unlike, rank, index) for index in range(2)] for rank in range(ranks.world_size)]
        tensors = plain_gradient(engine, passes).tensors
        whole = sum(float(tensor.double().square().sum()) for tensor in tensors.values()) ** 0.5
        share = float(tensors[name].double().norm()) / whole if ranks.is_main else 0.0
        FAULTS["one"] = partial(double_tensor, name=name)
        found[name] = ranks.broadcast_object(share), told(engine, unlike, "one")
        engine.close()
    return found


def adapted_engine(ranks: Ranks, base: str, method: dict[str, Any], case: dict[str, Any]) -> Engine:
    """A real model of a method on a tiny base."""
    config = HyperdecoderConfig.from_dict(
        {"model": {"name": base, "dropout": 0.1}, "method": method, "tasks": ["a", "b"]}
    )
    run = settings(global_batch_size=4 * ranks.world_size, **case)
    dtype = torch.bfloat16 if run.train.dtype == "bf16" else torch.float32
    model = build_model(config, dtype, ranks.device, seed=0, trainable_dtype=torch.float32)
    return toy_engine(model, run, ranks)


def stopped_run(ranks: Ranks, config: str, overrides: list[str]) -> dict[str, Any]:
    """`run` of a whole training with a doubled tensor: exit code, what a rank prints, and whether it took step 2."""
    taken: list[int] = []
    step_of, start_of = Engine.train_step, train_module.Ranks.start

    def faulty(engine: Engine, *given: Any) -> Any:
        taken.append(engine.step + 1)
        double_tensor(engine, next(iter(engine.parameters)))
        return step_of(engine, *given)

    Engine.train_step = faulty
    # these ranks have started already, and tell the test afterwards what they found
    train_module.Ranks.start = lambda *_, **__: ranks
    close, ranks.close = ranks.close, lambda: None
    printed = io.StringIO()
    with contextlib.redirect_stderr(printed):
        code = train_module.run(config, overrides)
    Engine.train_step, train_module.Ranks.start, ranks.close = step_of, start_of, close
    return {"code": code, "printed": printed.getvalue(), "steps": taken}


def unlike(rank: int, index: int) -> dict[str, torch.Tensor]:
    """Few targets of a long source on even ranks, many targets of a short one on odd ranks."""
    return text_batch(torch.Generator().manual_seed(10 * index + rank), *((23, 2) if rank % 2 == 0 else (5, 7)))


def mixed_buckets(ranks: Ranks, base: str, method: dict[str, Any], orders: list[bool]) -> list[str]:
    """A hyperdecoder under ZeRO-2 on rows of unlike lengths, with and without the one order of reduction."""
    keep_order, found = zero.reduce_in_one_order, []
    for one_order in orders:
        zero.reduce_in_one_order = keep_order if one_order else lambda *_: None
        engine = adapted_engine(ranks, base, method, {"deepspeed": "ds_configs/zero2_fp32.json"})
        found.append(told(engine, unlike))
        engine.close()
    return found


class OneSided(ToyModel):
    """The first rank's passes do not use one of the trainables."""

    def __init__(self, rank: int) -> None:
        super().__init__(dropout=0.0)
        self.rank = rank
        self.extra = torch.nn.Parameter(torch.ones(7))

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        loss_sum, tokens = super().forward(input_ids, labels)
        return loss_sum + (self.extra.square().sum() * tokens if self.rank else 0.0), tokens


def one_sided_gradients(ranks: Ranks, cases: list[dict[str, Any]]) -> list[dict[str, torch.Tensor]]:
    """The gradient of a step in which one rank has none for one trainable."""
    found = []
    for case in cases:
        run = settings(global_batch_size=8, gradient_clipping=0.0, **case)
        engine = toy_engine(OneSided(ranks.rank), run, ranks)
        engine.train_step([toy_batch(ranks.rank, index) for index in range(2)]).result()
        moments = dict(engine.optimizer_tensors())
        found.append({name: moments[f"exp_avg.{name}"] * 10 for name in engine.parameters})
        engine.close()
    return found
