"""How long a call takes, and what matrix products reach on the device."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from hdscale.bases.gpu import prepare_cuda
from hdscale.errors import UserError


def device_of(name: str | None) -> torch.device:
    """The device that is measured: the one that is named, or a GPU where there is one.

    Raises:
        UserError: for cuda without a GPU.
    """
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise UserError("--device cuda: no GPU is visible; use --device cpu")
    device = torch.device(name or ("cuda" if available else "cpu"))
    if device.type == "cuda":
        prepare_cuda()
    return device


def timed(function: Callable[[], Any], device: torch.device) -> float:
    """Seconds that a call takes, the device's work included."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def matmul_peak(dtype: torch.dtype, device: torch.device) -> float:
    """Floating-point operations per second of a large matrix product, on this device and in this run."""
    size = 2048 if device.type == "cpu" else 8192
    left, right = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    left @ right
    return 2 * size**3 / min(timed(lambda: left @ right, device) for _ in range(5))
