"""What the engine's tests run on the ranks (see tests/helpers/ranks.py)."""

from __future__ import annotations

import os
import resource
import signal
import time
import traceback
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hdscale.data.batches import Row as TextRow
from hdscale.data.batches import collate
from hdscale.engine.checkpoint import load_newest_checkpoint, save_checkpoint
from hdscale.engine.deepspeed_engine import Engine, NonFiniteError
from hdscale.engine.preemption import Preemption
from hdscale.engine.ranks import Ranks
from hdscale.errors import UserError
from hdscale.runs.settled import Settled
from tests.helpers.toy import BATCH, Row, ToyModel, micro_batches, settings, text_batch, toy_engine


class Recorder:
    """A log that only keeps its warnings."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warning(self, text: str) -> None:
        self.warnings.append(text)


class FaultyModel(ToyModel):
    """Kills its process, or makes the loss or only the gradient NaN, in the second micro-batch of a step."""

    def __init__(self, fault: str | None = None, at_step: int | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.fault, self.at_step = fault, at_step
        self.step = self.calls = 0

    def begin(self, step: int) -> None:
        self.step, self.calls = step, 0

    def forward(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        loss_sum, tokens = super().forward(*args, **kwargs)
        self.calls += 1
        if self.step == self.at_step and self.calls == 2:
            if self.fault == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.fault == "loss":
                loss_sum = loss_sum * float("nan")
            if self.fault == "gradient":
                # the square root of 0 has an infinite slope, and 0 * inf is NaN; the value itself is 0
                loss_sum = loss_sum + 0.0 * torch.sqrt(self.shared.sum() * 0.0)
        return loss_sum, tokens


def working_weights(engine: Engine) -> dict[str, torch.Tensor]:
    """The weights that the forward pass uses, as float32 on the CPU."""
    with engine.evaluating() as model:
        return {name: tensor.detach().to("cpu", torch.float32, copy=True) for name, tensor in model.named_parameters()}


def train(ranks: Ranks, variants: list[dict[str, Any]], steps: int, micro: int = BATCH) -> list[dict[str, Any]]:
    """Losses, masters and working weights after a few steps, for each variant of the settings."""
    results = []
    for variant in variants:
        dropout = variant.pop("dropout", 0.1)
        engine = toy_engine(ToyModel(dropout), settings(**variant), ranks)
        done = [
            engine.train_step(micro_batches(step, ranks.rank, ranks.world_size, micro)).result()
            for step in range(steps)
        ]
        results.append(
            {
                "losses": [result.loss for result in done],
                "norms": [result.grad_norm for result in done],
                "masters": dict(engine.trainable_tensors()),
                "weights": working_weights(engine),
            }
        )
        engine.close()
    return results


def gradient(ranks: Ranks, micro: int, **config: Any) -> dict[str, torch.Tensor]:
    """The gradient that AdamW was given for the batch of step 0: its first moment is a tenth of it."""
    return first_update(ranks, micro, **{"gradient_clipping": 0.0, **config})["gradient"]


def first_update(ranks: Ranks, micro: int, rates: dict[str, float] | None = None, **config: Any) -> dict[str, Any]:
    """One step at the peak learning rate: the gradient that AdamW was given, the norm that was reported, and how far
    each master moved.

    Args:
        rates: peak learning rates of some trainables' own, which make parameter groups of their own.
    """
    model = ToyModel(dropout=0.0)
    if rates:
        model.learning_rates = lambda default: rates
    engine = toy_engine(model, settings(warmup_steps=0, **config), ranks)
    before = dict(engine.trainable_tensors())
    norm = engine.train_step(micro_batches(0, ranks.rank, ranks.world_size, micro)).result().grad_norm
    moments, after = dict(engine.optimizer_tensors()), dict(engine.trainable_tensors())
    return {
        "gradient": {name: moments[f"exp_avg.{name}"] * 10 for name in engine.parameters},
        "norm": norm,
        "moved": {name: after[name] - before[name] for name in engine.parameters},
    }


class Listener(ToyModel):
    """Keeps the random seed of each forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.seeds: list[int] = []

    def forward(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        self.seeds.append(torch.initial_seed())
        return super().forward(*args, **kwargs)


def seeds_of_passes(ranks: Ranks, steps: int, micro: int, seed: int) -> list[int]:
    """The random seed of each of this rank's forward passes, step by step."""
    engine = toy_engine(Listener(), settings(seed=seed), ranks)
    for step in range(steps):
        engine.train_step(micro_batches(step, ranks.rank, ranks.world_size, micro))
    return engine.module.seeds


def at_the_start(ranks: Ranks, **config: Any) -> dict[str, dict[str, torch.Tensor]]:
    """Masters and working weights before the first step."""
    engine = toy_engine(ToyModel(), settings(**config), ranks)
    return {"masters": dict(engine.trainable_tensors()), "weights": working_weights(engine)}


def resume(
    ranks: Ranks, folder: str, until: int, save_at: tuple[int, ...] = (), kill_in: int | None = None, **config: Any
) -> dict[str, Any]:
    """Go on from the newest checkpoint of `folder` to step `until`, each step in two micro-batches.

    Args:
        save_at: steps done after which a checkpoint is written.
        kill_in: the last rank kills itself within this step (counted from 0), after its first micro-batch.
    """
    fault = "kill" if ranks.rank == ranks.world_size - 1 else None
    model = FaultyModel(fault, kill_in)
    engine = toy_engine(model, settings(**config), ranks)
    log = Recorder()
    state = load_newest_checkpoint(engine, folder, log)
    loaded = dict(engine.trainable_tensors()), dict(engine.optimizer_tensors()), working_weights(engine)
    losses, batches = {}, {}
    while engine.step < until:
        model.begin(engine.step)
        micro = micro_batches(engine.step, ranks.rank, ranks.world_size, BATCH // ranks.world_size // 2)
        batches[engine.step] = torch.cat([batch["input_ids"] for batch in micro])
        step = engine.step
        losses[step] = engine.train_step(micro).result().loss
        if engine.step in save_at:
            save_checkpoint(engine, folder, {"note": f"after {engine.step}"})
    return {
        "state": state,
        "losses": losses,
        "batches": batches,
        "masters": dict(engine.trainable_tensors()),
        "moments": dict(engine.optimizer_tensors()),
        "weights": working_weights(engine),
        "loaded": loaded,
        "warnings": log.warnings,
    }


def non_finite(ranks: Ranks, fault: str, folder: str, **config: Any) -> dict[str, Any]:
    """A NaN in step 2 of the last rank: the error, and what is left."""
    model = FaultyModel(fault if ranks.rank == ranks.world_size - 1 else None, at_step=2)
    engine = toy_engine(model, settings(**config), ranks)
    message = None
    for step in range(4):
        model.begin(step)
        micro = micro_batches(step, ranks.rank, ranks.world_size, 2)
        rows = [Row(f"task{ranks.rank}", f"{step}-{ranks.rank}-{index}") for index in range(BATCH // ranks.world_size)]
        before = dict(engine.trainable_tensors())
        try:
            engine.train_step(micro, rows).result()
        except NonFiniteError as error:
            message = str(error)
            break
        save_checkpoint(engine, folder, {})
    after = dict(engine.trainable_tensors())
    same = all(torch.equal(before[name], after[name]) for name in before)
    return {"message": message, "step": engine.step, "unchanged": same}


def save_poisoned(ranks: Ranks, folder: str) -> str:
    """A master that is not finite is not saved: a checkpoint at step 0, then an attempt at step 1."""
    engine = toy_engine(ToyModel(), settings(), ranks)
    save_checkpoint(engine, folder, {})
    engine.train_step(micro_batches(0, ranks.rank, ranks.world_size, BATCH))
    tensors = dict(engine.trainable_tensors())
    tensors["up.bias"][3] = float("inf")
    engine.load_trainables(tensors)
    try:
        save_checkpoint(engine, folder, {})
    except NonFiniteError as error:
        return str(error)
    return "saved"


def save_on_full_disk(ranks: Ranks, folder: str, shard_bytes: int) -> dict[str, Any]:
    """Two checkpoints, and a third when files may not grow beyond some bytes any more."""
    engine = toy_engine(ToyModel(), settings(), ranks)
    for step in range(2):
        engine.train_step(micro_batches(step, ranks.rank, ranks.world_size, BATCH))
        save_checkpoint(engine, folder, {}, shard_bytes=shard_bytes)
    engine.train_step(micro_batches(2, ranks.rank, ranks.world_size, BATCH))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (700, resource.RLIM_INFINITY))
    message = None
    try:
        save_checkpoint(engine, folder, {}, shard_bytes=shard_bytes)
    except UserError as error:
        message = str(error)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    # space was made: the same rank can go on and save
    left = sorted(path.name for path in Path(folder).iterdir()) if ranks.is_main else None
    ranks.barrier()
    save_checkpoint(engine, folder, {}, shard_bytes=shard_bytes)
    return {"message": message, "left": left}


def load_other_model(ranks: Ranks, folder: str) -> str:
    """A checkpoint with another set of parameters is refused."""
    model = ToyModel()
    model.up.bias.requires_grad_(False)
    model.shared = torch.nn.Parameter(torch.zeros(7, 7, 1))
    engine = toy_engine(ToyModel(), settings(), ranks)
    engine.shapes = {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}
    try:
        load_newest_checkpoint(engine, folder, Recorder())
    except UserError as error:
        return str(error)
    return "loaded"


def evaluate_unevenly(ranks: Ranks, **config: Any) -> dict[str, Any]:
    """Ranks run different numbers of forward passes between two training steps."""
    engine = toy_engine(ToyModel(), settings(**config), ranks)
    engine.train_step(micro_batches(0, ranks.rank, ranks.world_size, 2))
    losses = []
    with engine.evaluating() as model:
        assert not model.training
        for step in range(1 + 2 * ranks.rank):
            batch = {name: tensor.to(ranks.device) for name, tensor in micro_batches(step, 0, 1, BATCH)[0].items()}
            losses.append(model(**batch)[0].item())
    whole = [parameter.numel() == parameter.ds_numel for parameter in persistent_of(engine)]
    after = engine.train_step(micro_batches(1, ranks.rank, ranks.world_size, 2)).result()
    return {"evaluation": losses[0], "loss": after.loss, "whole": whole}


def persistent_of(engine: Engine) -> list[torch.nn.Parameter]:
    """The small parameters that ZeRO-3 keeps whole between steps; none under other stages."""
    return getattr(engine._deepspeed.optimizer, "persistent_parameters", [])


def collectives(ranks: Ranks) -> dict[str, Any]:
    """What `Ranks` offers, and that a mistake on rank 0 becomes everybody's."""

    def mistake() -> None:
        raise UserError("no such file; look elsewhere")

    try:
        ranks.on_main(mistake)
        caught = None
    except UserError as error:
        caught = str(error)
    return {
        "any": ranks.any_true(ranks.rank == 1),
        "all": ranks.all_true(ranks.rank == 1),
        "max": ranks.max_int(ranks.rank * 3),
        "sums": ranks.sum_(torch.tensor([1.0, ranks.rank + 0.5], device=ranks.device)).tolist(),
        "objects": ranks.gather_objects({"rank": ranks.rank}),
        "broadcast": ranks.broadcast_object(f"from {ranks.rank}"),
        "main": ranks.on_main(lambda: ranks.rank + 10),
        "mistake": caught,
    }


def signalled(ranks: Ranks, folder: str) -> dict[str, Any]:
    """One rank gets two signals, the second while it saves; all ranks stop at the same step with one checkpoint."""
    engine = toy_engine(ToyModel(), settings(), ranks)
    last = ranks.rank == ranks.world_size - 1
    with Preemption(ranks, ["SIGTERM", "SIGUSR2"]) as preemption:
        for step in range(6):
            if last and step == 2:
                os.kill(os.getpid(), signal.SIGUSR2)
            engine.train_step(micro_batches(step, ranks.rank, ranks.world_size, BATCH))
            if preemption.agreed():
                os.kill(os.getpid(), signal.SIGTERM)
                save_checkpoint(engine, folder, {})
                break
    return {"step": engine.step, "reason": preemption.reason}


def orphaned(ranks: Ranks, launcher: str) -> dict[str, bool]:
    """Whether the loss of the parent counts as a request to stop, by launcher: a grandchild whose parent ends."""
    ranks.launcher = launcher
    reading, writing = os.pipe()
    parent = os.fork()
    if parent == 0:
        if os.fork() == 0:
            preemption = Preemption(ranks)
            before = preemption.requested
            os.kill(parent_of_mine := os.getppid(), signal.SIGKILL)
            while os.getppid() == parent_of_mine:
                time.sleep(0.01)
            os.write(writing, bytes([before, preemption.requested]))
            os._exit(0)
        time.sleep(60)
    os.waitpid(parent, 0)
    before, after = os.read(reading, 2)
    return {"before": bool(before), "after": bool(after)}


def adapted_model(
    ranks: Ranks, base: str, folder: str, methods: list[dict[str, Any]], variants: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """A real hyperdecoder (or another method) on a tiny T5: three steps, a checkpoint, decoding, and one step more.

    Rank 0 decodes one batch and rank 1 two, of different lengths.
    """
    from hdscale.bases.settings import ModelSettings
    from hdscale.modeling import HyperdecoderConfig, build_model
    from hdscale.modeling.settings import MethodSettings

    results = []
    for method in methods:
        config = HyperdecoderConfig.from_dict({"model": {"name": base}, "method": method, "tasks": ["a", "b"]})
        assert isinstance(config.model, ModelSettings) and isinstance(config.method, MethodSettings)
        for variant in variants:
            run = settings(warmup_steps=0, learning_rate=1e-2, **variant)
            dtype = torch.bfloat16 if run.train.dtype == "bf16" else torch.float32
            model = build_model(config, dtype, ranks.device, seed=0, trainable_dtype=torch.float32)
            engine = toy_engine(model, run, ranks)
            place = Path(folder) / f"{len(results)}"
            done = [engine.train_step(text_batches(step, ranks)).result() for step in range(3)]
            save_checkpoint(engine, place, {})
            with engine.evaluating() as evaluated:
                for step in range(1 + ranks.rank):
                    tensors = text_batches(10 + step, ranks)[0].items()
                    batch = {name: tensor.to(ranks.device) for name, tensor in tensors if name != "labels"}
                    decoded = evaluated.generate(**batch, max_new_tokens=3 + 2 * step)
            more = engine.train_step(text_batches(3, ranks)).result()
            load_newest_checkpoint(engine, place, Recorder())
            again = engine.train_step(text_batches(3, ranks)).result()
            results.append(
                {
                    "losses": [result.loss for result in (*done, more)],
                    "again": again.loss,
                    "decoded": decoded.shape[0],
                    "masters": dict(engine.trainable_tensors()),
                }
            )
            engine.close()
    return results


def adapted_gradients(
    ranks: Ranks, base: str, methods: list[dict[str, Any]], variant: dict[str, Any]
) -> list[dict[str, Any]]:
    """For each method: the gradient that AdamW was given at the first step, the loss, and the backends in use."""
    import hdscale.ops.generated as generated
    from hdscale.modeling import HyperdecoderConfig, build_model

    resolve, results = generated.resolve_backend, []
    for method in methods:
        used: set[str] = set()

        def recorded(*arguments: Any, used: set[str] = used, **options: Any) -> str:
            used.add(resolve(*arguments, **options))
            return resolve(*arguments, **options)

        generated.resolve_backend = recorded
        config = HyperdecoderConfig.from_dict(
            {"model": {"name": base, "dropout": 0.0}, "method": method, "tasks": ["a", "b"]}
        )
        run = settings(warmup_steps=0, gradient_clipping=0.0, **variant)
        dtype = torch.bfloat16 if run.train.dtype == "bf16" else torch.float32
        model = build_model(config, dtype, ranks.device, seed=0, trainable_dtype=torch.float32)
        engine = toy_engine(model, run, ranks)
        loss = engine.train_step(text_batches(0, ranks)).result().loss
        moments = dict(engine.optimizer_tensors())
        gradients = {name: moments[f"exp_avg.{name}"] * 10 for name in engine.parameters}
        results.append({"backends": used, "loss": loss, "gradients": gradients})
        engine.close()
    generated.resolve_backend = resolve
    return results


def text_batches(step: int, ranks: Ranks) -> list[dict[str, torch.Tensor]]:
    """Two micro-batches of two rows for each of two ranks: random ids, lengths that differ by rank and micro-batch."""
    batches = []
    for index in range(2):
        generator = torch.Generator().manual_seed(100 * step + 10 * index + ranks.rank)
        source, target = 4 + index + ranks.rank, 2 + index
        batches.append(text_batch(generator, source, target))
    return batches


def settle(ranks: Ranks, path: str) -> dict[str, Any]:
    """Each rank finds its own number."""
    settled = Settled(Path(path), ranks)
    first = settled.once("number", lambda: ranks.rank)
    return {"first": first, "again": settled.once("number", lambda: 5), "other": settled.once("other", lambda: "both")}


WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "unique")
HOST_ONLY = ("/torch/optim/", "/hdscale/ops/operator.py")
"""AdamW's loop over tensors (CUDA's fused one keeps its step count on the device), and counters on the host."""


class Waits(TorchDispatchMode):
    """Notes each operation for whose result a GPU's host would have to wait, and who asked for it."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(function)
        by_boolean = name.startswith("aten.index") and any(
            torch.is_tensor(one) and one.dtype == torch.bool
            for one in (args[1] if len(args) > 1 and isinstance(args[1], list) else [])
        )
        if by_boolean or any(word in name for word in WAITING):
            stack = traceback.extract_stack()
            if not any(part in frame.filename for frame in stack for part in HOST_ONLY):
                own = [frame for frame in stack if "/torch/" not in frame.filename][-2:]
                self.found.append(
                    f"{name}: " + " < ".join(f"{frame.filename}:{frame.lineno}" for frame in reversed(own))
                )
        return function(*args, **(kwargs or {}))


def synchronizations(ranks: Ranks, steps: int, **config: Any) -> list[int]:
    """The steps (from 1) in which the accelerator is asked to finish all of its work, each as often as it is asked."""
    from deepspeed.accelerator import get_accelerator

    engine = toy_engine(ToyModel(), settings(**config), ranks)
    accelerator, asked = get_accelerator(), []
    before = accelerator.synchronize
    accelerator.synchronize = lambda *_, **__: asked.append(engine.step + 1)
    try:
        for step in range(steps):
            engine.train_step(micro_batches(step, ranks.rank, ranks.world_size, BATCH)).result()
    finally:
        accelerator.synchronize = before
    return asked


def waits_of_a_step(ranks: Ranks, base: str, **config: Any) -> dict[str, list[str]]:
    """What a step of a real hyperdecoder would wait for, and what reading its result does."""
    from hdscale.modeling import HyperdecoderConfig, build_model

    sizes = {"encoder": {"dim": 4}, "decoder": {"dim": 4, "adapter": "generated"}, "hypernet": {"bottleneck": 8}}
    model_config = HyperdecoderConfig.from_dict(
        {"model": {"name": base}, "method": {"name": "hyperdecoder", **sizes}, "tasks": []}
    )
    model = build_model(model_config, torch.bfloat16, ranks.device, trainable_dtype=torch.float32)
    engine = toy_engine(model, settings(**config), ranks)
    for step in range(2):
        batches = [
            collate([TextRow([5, 6, 7, 1], [8, 1], 0, "a", "t"), TextRow([5, 6, 1], [8, 9, 1], 0, "b", "t")], 0)
            for _ in range(2)
        ]
        if step == 0:
            # AdamW's state is made
            engine.train_step(batches).result()
    with Waits() as during:
        pending = engine.train_step(batches)
    with Waits() as after:
        pending.result().loss  # noqa: B018
        float(engine.module.method.state_dict()[next(iter(engine.module.method.state_dict()))].sum())
    return {"step": during.found, "after": after.found}
