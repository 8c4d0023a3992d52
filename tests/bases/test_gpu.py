"""What a process sets before it computes on a GPU: on machines without any."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from hdscale.bases import gpu
from hdscale.bases.gpu import has_c_compiler, prepare_cuda
from hdscale.modeling import HyperdecoderConfig, build_model
from hdscale.modeling import model as model_module
from tests.helpers.places import ROOT


@pytest.fixture(autouse=True)
def cudnn_attention():
    """cuDNN's attention as torch has it, put back afterwards."""
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(True)
    yield
    torch.backends.cuda.enable_cudnn_sdp(before)


def test_segments_grow_unless_the_user_says_otherwise():
    """Fails if the default is not set, or if it replaces what the user has set by either name."""
    environ: dict[str, str] = {"CC": "cc"}
    prepare_cuda(environ)
    assert environ == {"PYTORCH_ALLOC_CONF": "expandable_segments:True", "CC": "cc"}
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        for value in ("max_split_size_mb:512", ""):
            theirs = {name: value}
            prepare_cuda(theirs)
            assert theirs == {name: value}


@pytest.mark.parametrize(
    ("environ", "path", "headers", "found"),
    [
        ({}, True, True, True),
        ({}, False, True, False),
        ({"CC": "/opt/cc"}, False, True, True),
        ({}, True, False, False),
    ],
    ids=["both", "no compiler", "CC", "no Python.h"],
)
def test_without_a_compiler_torch_does_without_compiled_kernels(monkeypatch, tmp_path, environ, path, headers, found):
    """A node that has the run's environment but no compiler can generate. Fails without the call in `prepare_cuda`."""
    monkeypatch.setattr(gpu.shutil, "which", lambda name: f"/usr/bin/{name}" if path else None)
    monkeypatch.setattr(gpu.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    if headers:
        (tmp_path / "Python.h").touch()
    left_out = []
    monkeypatch.setattr(gpu, "leave_out_compiled_kernels", lambda: left_out.append(True))
    assert has_c_compiler(environ) == found
    prepare_cuda(dict(environ))
    assert bool(left_out) != found


@pytest.mark.skipif(torch.version.cuda is None, reason="needs a CUDA build of torch (no GPU)")
def test_batched_products_are_those_of_the_library():
    """Torch 2.14 puts a kernel that needs a compiler before cuBLAS. Fails if a later one has no such switch."""
    script = (
        "import torch\n"
        "from hdscale.bases.gpu import leave_out_compiled_kernels\n"
        "leave_out_compiled_kernels()\n"
        "lines = [one for one in torch._C._dispatch_dump('aten::bmm').splitlines() if one.startswith('CUDA')]\n"
        "assert len(lines) == 1 and 'RegisterCUDA' in lines[0], lines\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)


class Stopped(Exception):
    """Far enough."""


def stop(*_, **__):
    raise Stopped


def test_a_model_that_a_program_builds_on_a_gpu_prepares_it(monkeypatch):
    """`from_pretrained` too, which calls `build_model`. Fails without the call there."""
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "backend:native")
    monkeypatch.setattr(model_module, "load_base", stop)
    config = HyperdecoderConfig()
    config.model.name = "tiny-1"
    for device, prepared in (("cpu", False), ("cuda:0", True)):
        with pytest.raises(Stopped):
            build_model(config, device=device)
        assert torch.backends.cuda.cudnn_sdp_enabled() != prepared
