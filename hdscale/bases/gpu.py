"""What every process sets before it computes on a GPU."""

from __future__ import annotations

import os
import shutil
import sysconfig
from collections.abc import MutableMapping
from importlib import import_module
from pathlib import Path

import torch

ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
ALLOCATOR = "expandable_segments:True"
"""Batches of many lengths leave holes between the allocator's segments: up to a third of the memory is lost. Segments
that can grow lose a few percent."""


def prepare_cuda(environ: MutableMapping[str, str] = os.environ) -> None:
    """Settings of every process that computes on a GPU: to be called before its first tensor there.

    The allocator grows its segments, unless the environment says how it works. Attention does not use cuDNN, which
    builds a plan for each new pair of lengths: text has many, and a plan takes longer than it saves. Without a C
    compiler, torch does without the kernels that need one.
    """
    if not any(name in environ for name in ALLOCATOR_VARIABLES):
        environ[ALLOCATOR_VARIABLES[0]] = ALLOCATOR
    torch.backends.cuda.enable_cudnn_sdp(False)
    if not has_c_compiler(environ):
        leave_out_compiled_kernels()


def has_c_compiler(environ: MutableMapping[str, str] = os.environ) -> bool:
    """Whether Triton finds what it builds the start of a kernel with: a C compiler and Python's header files."""
    compiler = environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    return bool(compiler) and (Path(sysconfig.get_paths()["include"]) / "Python.h").is_file()


def leave_out_compiled_kernels() -> None:
    """Let torch compute every product with its libraries.

    From 2.14 on it computes batched products of inner size 1 with a Triton kernel, compiled when it first needs one:
    without a compiler these products fail, and with them the first token that transformers' own models generate.
    """
    try:
        import_module("torch._native.triton_utils").deregister_op_overrides()
    except (ImportError, AttributeError):
        return  # another torch: it has no such kernels, or they are switched off in another way
