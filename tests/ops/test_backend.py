"""Which backend computes: GPUs checked one by one, whatever the first caller does, and number types without kernels."""

import logging
from types import SimpleNamespace

import pytest
import torch

from hdscale.errors import UserError
from hdscale.ops import backend
from hdscale.ops.backend import Availability, availability, resolve_backend
from hdscale.ops.naive import Shape
from tests.helpers.pretended_gpus import pretend_gpus

needs_compiler = pytest.mark.skipif(
    not availability("cpp").usable, reason=f"no C++ kernels here: {availability('cpp').reason}"
)
SHAPE = Shape(B=2, T=4, D=8, A=8, K=8)


def on_gpu(index: int, dtype: torch.dtype) -> SimpleNamespace:
    """As much of a tensor on a GPU as the choice looks at."""
    return SimpleNamespace(device=torch.device("cuda", index), dtype=dtype)


@pytest.fixture
def loaded(monkeypatch):
    """Kernels that load; which of the pretended GPUs compute with them rightly is the test's."""
    backend._checked.cache_clear()
    monkeypatch.setattr(backend, "_loaded", lambda name: Availability(True, "kernels"))
    yield
    backend._checked.cache_clear()


@needs_compiler
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
def test_the_first_use_may_be_an_evaluation(mode, loaded, monkeypatch):
    """The check differentiates: fails if it takes the caller's mode as it is. Run on the CPU's kernels."""
    first_use_errors = backend.first_use_errors
    monkeypatch.setattr(backend, "first_use_errors", lambda device: first_use_errors(torch.device("cpu")))
    pretend_gpus(monkeypatch, (9, 0))
    with mode():
        found = availability("cuda", torch.device("cuda", 0))
    assert found.usable, found.reason


def test_every_gpu_is_checked(loaded, monkeypatch, caplog):
    """Fails if the current one answers for all: GPU 1 computes wrongly, GPU 2 is too old, GPU 3 raises."""
    checked = []

    def errors(device):
        checked.append(device.index)
        if device.index == 3:
            raise RuntimeError("illegal memory access") from OSError("an NVLink went down")
        return {"y": 1.0 if device.index == 1 else 0.001}

    monkeypatch.setattr(backend, "first_use_errors", errors)
    pretend_gpus(monkeypatch, (9, 0), (9, 0), (7, 5), (9, 0))
    with caplog.at_level(logging.WARNING, logger="hdscale.ops"):
        chosen = [resolve_backend("auto", on_gpu(index, torch.bfloat16), shape=SHAPE) for index in (0, 1, 2, 3, 0)]
    assert chosen == ["cuda", "torch", "torch", "torch", "cuda"] and checked == [0, 1, 3]
    assert [record.getMessage() for record in caplog.records] == [
        "generated adapters run in plain PyTorch: the kernels' results on GPU 1 are wrong: {'y': 1.0}",
        "generated adapters run in plain PyTorch: the kernels failed on GPU 3: illegal memory access: "
        "an NVLink went down",
    ]
    with pytest.raises(UserError, match=r"method.backend=cuda is not available .*8.0 \(A100\) or later"):
        resolve_backend("cuda", on_gpu(2, torch.bfloat16), shape=SHAPE)


def test_rocm_is_not_cuda(monkeypatch):
    """An MI250 says capability 9.0. Fails if only the number is looked at."""
    pretend_gpus(monkeypatch, (9, 0))
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert not availability("cuda").usable and "ROCm" in availability("cuda").reason


def test_cuda_kernels_that_are_asked_for_are_used_or_missed(loaded, monkeypatch, caplog):
    """float32 is refused, and a shape without kernels is said. Fails if either silently computes in PyTorch."""
    monkeypatch.setattr(backend, "first_use_errors", lambda device: {"y": 0.001})
    pretend_gpus(monkeypatch, (9, 0))
    with pytest.raises(UserError, match="computes in bf16 only.*method.backend=auto"):
        resolve_backend("cuda", on_gpu(0, torch.float32), shape=SHAPE)
    assert resolve_backend("cuda", on_gpu(0, torch.bfloat16), shape=SHAPE) == "cuda"
    with caplog.at_level(logging.WARNING, logger="hdscale.ops"):
        for _ in range(2):
            assert resolve_backend("cuda", on_gpu(0, torch.bfloat16), shape=SHAPE._replace(K=5000)) == "torch"
    assert len(caplog.records) == 1 and "K=5000" in caplog.text
    assert resolve_backend("auto", on_gpu(0, torch.float32), shape=SHAPE) == "torch"
