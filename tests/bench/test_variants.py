"""What `hdscale bench step` times is a step as a run takes it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hdscale.bench import step as step_module
from hdscale.bench.memory import CPU_CASES, config_of, rows_of
from hdscale.bench.step import compile_steps
from hdscale.bench.variants import Variant, build_variants
from hdscale.data.batches import Row
from hdscale.errors import UserError

ROWS = [Row([5 + number, 7, 9][: 2 + number % 2], [11 + number, 1], 0, str(number), "bench") for number in range(8)]
CPU = torch.device("cpu")


@pytest.fixture
def variant() -> Variant:
    """hdscale in bf16, four passes per step; the compiled operator, which counts on the host, is left out."""
    torch.manual_seed(0)
    (found,) = build_variants("tiny-1", "bf16", 2, len(ROWS), CPU, ["hdscale"])
    found.model.use_backend("torch")
    return found


class NothingIsRead(TorchDispatchMode):
    """Refuses to hand a number of a tensor to the host, which would wait for the device."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert function is not torch.ops.aten._local_scalar_dense.default, "the host reads a number"
        return function(*args, **(kwargs or {}))


def test_a_step_reads_nothing_from_the_device(variant, monkeypatch):
    """Fails if the loss is read in each pass. (AdamW counts its steps on the host, and is left out.)"""
    monkeypatch.setattr(variant.optimizer, "step", lambda: None)
    batch = variant.prepare(ROWS)
    with NothingIsRead():
        loss = variant.step(batch)
    assert len(batch.passes) == 4 and batch.tokens == 16 and loss.shape == ()


def test_gradients_of_passes_are_added_in_float32(variant, monkeypatch):
    """As the engine adds them. Fails where they are added in the number type of the model."""
    variant.model.eval()
    monkeypatch.setattr(variant.model, "train", lambda: None)
    batch = variant.prepare(ROWS)
    wanted = [torch.zeros_like(master) for master in variant.masters]
    for one in batch.passes:
        (variant.loss_sum(one) / batch.tokens).backward()
        for total, parameter in zip(wanted, variant.trained, strict=True):
            if parameter.grad is not None:
                total += parameter.grad.float()
            parameter.grad = None
    monkeypatch.setattr(variant, "update", lambda: None)
    variant.step(batch)
    for master, total in zip(variant.masters, wanted, strict=True):
        assert torch.equal(master.grad if master.grad is not None else torch.zeros_like(total), total)


def test_what_training_compiles_is_compiled(variant, monkeypatch, capsys):
    """Off by default on a CPU; a compiler that fails is reported, and a user error where it was asked for."""
    calls = []
    monkeypatch.setattr(variant.model.base, "compile_steps", lambda on=True: calls.append(on))
    monkeypatch.setattr(variant, "step", lambda batch: None)
    compile_steps(variant, variant.prepare(ROWS), "auto")
    assert calls == []
    compile_steps(variant, variant.prepare(ROWS), "on")
    assert calls == [True]

    def broken(batch):
        if calls[-1]:
            raise RuntimeError("no compiler\nand more")

    monkeypatch.setattr(variant, "step", broken)
    with pytest.raises(UserError, match=r"--compile on: the compiler failed \(no compiler\)"):
        compile_steps(variant, variant.prepare(ROWS), "on")
    monkeypatch.setattr(variant, "device", torch.device("cuda"))
    monkeypatch.setattr(step_module, "progress", print)
    calls.append(False)
    monkeypatch.setattr(step_module, "timed", lambda step, device: step())
    compile_steps(variant, None, "auto")
    assert calls[-2:] == [True, False] and "hdscale: not compiled, the compiler failed" in capsys.readouterr().out


@pytest.mark.parametrize("compiled, kept", [(0.3, [True]), (0.4, [True, False])])
def test_auto_keeps_the_faster_way(variant, monkeypatch, compiled, kept):
    """As training decides it on a GPU."""
    calls, times = [], iter([0.4, compiled])
    monkeypatch.setattr(variant.model.base, "compile_steps", lambda on=True: calls.append(on))
    monkeypatch.setattr(variant, "step", lambda batch: None)
    monkeypatch.setattr(variant, "device", torch.device("cuda"))
    monkeypatch.setattr(step_module, "timed", lambda step, device: next(times))
    compile_steps(variant, None, "auto")
    assert calls == kept


@pytest.mark.parametrize("case", CPU_CASES, ids=lambda case: case.name)
def test_memory_is_measured_in_one_pass_per_step(case):
    """As the plan counts it, on a CPU too, where a run would pass 1,024 tokens at a time."""
    assert config_of(case).train.micro_batch_size == case.rows
    rows = rows_of(case, 2048)
    assert {len(row.labels) for row in rows} == {case.target}
    assert [len(row.input_ids) for row in rows] == [case.source // 2] + [case.source] * (case.rows - 1)
