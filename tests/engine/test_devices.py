"""What is set before a GPU is used, and what is said of one that does not suit: on machines without any."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from hdscale import load
from hdscale.engine import ranks as ranks_module
from hdscale.engine.devices import OutOfGpuMemory, bf16_warning, check_own_gpu, out_of_memory
from hdscale.engine.environment import Launch
from hdscale.engine.settings import TrainSettings
from hdscale.engine.steps import Steps
from hdscale.errors import UserError
from hdscale.runs.state import RunState
from hdscale.train import run

CUDA = torch.device("cuda", 0)


@pytest.fixture
def cudnn_attention():
    """cuDNN's attention as torch has it, put back afterwards."""
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(True)
    yield
    torch.backends.cuda.enable_cudnn_sdp(before)


class Stopped(Exception):
    """Far enough."""


def stop(*_, **__):
    raise Stopped


def test_a_rank_prepares_its_gpu_first(cudnn_attention, monkeypatch):
    """Before anything asks CUDA for a device: the allocator reads its settings once. Fails without the call."""
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "")
    monkeypatch.delenv("PYTORCH_ALLOC_CONF")  # set back after the test
    monkeypatch.setattr(ranks_module, "choose_device", stop)
    with pytest.raises(Stopped):
        ranks_module.Ranks.start(Launch("none"), device="cuda", threads=torch.get_num_threads())
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert ranks_module.os.environ["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"


def test_a_model_that_is_loaded_to_decode_prepares_its_gpu(cudnn_attention, monkeypatch):
    """The same for `hdscale evaluate` and `predict`. Fails without the call in `Choice.load`."""
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "backend:native")
    choice = load.Choice(model="some/model", device="cuda")
    monkeypatch.setattr(load.Choice, "check", lambda self: None)
    monkeypatch.setattr(load, "bf16_warning", lambda *_: None)
    monkeypatch.setattr(load.Choice, "kind", stop)
    with pytest.raises(Stopped):
        choice.load(choice.config())
    assert not torch.backends.cuda.cudnn_sdp_enabled()


@pytest.mark.parametrize(
    ("capability", "dtype", "warned"),
    [
        ((7, 0), torch.bfloat16, True),
        ((7, 5), torch.bfloat16, True),
        ((7, 0), torch.float32, False),
        ((8, 0), torch.bfloat16, False),
        ((9, 0), torch.bfloat16, False),
    ],
)
def test_bf16_on_an_old_gpu(capability, dtype, warned, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100")
    text = bf16_warning(CUDA, dtype)
    assert bool(text) == warned and (not warned or text.startswith("Tesla V100 has no bf16 units"))
    assert bf16_warning(torch.device("cpu"), torch.bfloat16) is None


def gpus_of(*gpus: str) -> list[str | None]:
    """What each of several ranks with these GPUs is told."""
    store, told = dist.HashStore(), [None] * len(gpus)

    def rank(number: int) -> None:
        try:
            check_own_gpu(store, number, len(gpus), gpus[number])
        except UserError as error:
            told[number] = str(error)

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(len(gpus))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    return told


def test_two_ranks_on_one_gpu():
    """Every rank says so, in one line. Fails if only neighbours are compared, or if the node is left out."""
    told = gpus_of("node1: a", "node1: b", "node1: a")
    assert all("ranks 0 and 2 share one GPU (node1: a); start at most one rank per GPU" in text for text in told)
    assert not any("\n" in text for text in told)
    assert gpus_of("node1: a", "node2: a", "node1: b") == [None] * 3


MESSAGE = """CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB of which 1.02 GiB
is free. Including non-PyTorch memory, this process has 78.08 GiB memory in use."""


@pytest.mark.parametrize(
    ("settings", "advice"),
    [
        ({}, "set train.micro_batch_size (now all of a rank's rows on a GPU)"),
        ({"micro_batch_size": 16}, "lower train.micro_batch_size (now 16)"),
        ({"tokens_per_micro_batch": "8192"}, "lower train.tokens_per_micro_batch (now 8192)"),
    ],
)
def test_out_of_memory_is_one_line_with_advice(settings, advice):
    text = str(out_of_memory(torch.OutOfMemoryError(MESSAGE), 7, TrainSettings(**settings)))
    assert text.startswith("step 7: out of GPU memory (Tried to allocate 2.00 GiB); " + advice)
    assert "\n" not in text and "model.activation_checkpointing=all" in text


def test_a_step_that_does_not_fit(monkeypatch, capsys):
    """One line, and exit code 1. Fails with a traceback if the step or the run lets torch's error pass."""

    def too_large(*_):
        raise torch.OutOfMemoryError(MESSAGE)

    engine = SimpleNamespace(train_step=too_large, step=2, train=TrainSettings())
    feed = SimpleNamespace(next=lambda: SimpleNamespace(micro_batches=[], mine=[]))
    steps = Steps(engine, feed, SimpleNamespace(), RunState())  # type: ignore[arg-type]
    with pytest.raises(OutOfGpuMemory) as caught:
        steps.next()
    monkeypatch.setattr("hdscale.train.load_config", lambda *_: (_ for _ in ()).throw(caught.value))
    assert run("any.yaml", []) == 1
    assert capsys.readouterr().err.startswith("hdscale: step 3: out of GPU memory (Tried to allocate 2.00 GiB)")
