"""Which implementation computes generated adapters: `torch`, `cpp` or `cuda`, and why."""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from hdscale.errors import UserError, nearest
from hdscale.ops.architectures import OLDEST
from hdscale.ops.build import BuildError, load_kernels, reason_of
from hdscale.ops.cases import TOLERANCE, random_case, reference, relative_error
from hdscale.ops.naive import AdapterHeads, Shape

BACKENDS = ("auto", "cpp", "cuda", "torch")
_DEVICE = {"cpp": "cpu", "cuda": "cuda"}
_DTYPES = {"cpp": (torch.float32, torch.bfloat16), "cuda": (torch.bfloat16,)}

BF16_ONLY = "method.backend=cuda computes in bf16 only; use bf16 (train.dtype, --dtype), or method.backend=auto"

logger = logging.getLogger("hdscale.ops")


@dataclass(frozen=True)
class Availability:
    """Whether a backend can be used in this process.

    Attributes:
        usable: whether it can.
        reason: why not; of a usable backend, what its kernels are.
        seconds: how long their build took, now or earlier.
    """

    usable: bool
    reason: str
    seconds: float = 0.0


def availability(backend: str, device: torch.device | None = None) -> Availability:
    """Whether a backend can be used on a device; its kernels are built (at first use) and loaded.

    A failure is logged once as a warning, and is the reason.

    Args:
        backend: `cpp`, `cuda` or `torch`.
        device: for `cuda`, the GPU; default: the current one. Results are checked on each before it is used.
    """
    if backend == "torch":
        return Availability(True, "plain PyTorch")
    if backend == "cpp":
        return _loaded(backend)
    if torch.version.hip:
        return Availability(False, "this torch is built for ROCm, and the kernels for CUDA")
    if not torch.cuda.is_available():
        return Availability(False, "no CUDA device is visible")
    index = torch.cuda.current_device() if device is None or device.index is None else device.index
    if torch.cuda.get_device_capability(index) < OLDEST:
        return Availability(False, "the kernels need compute capability 8.0 (A100) or later")
    loaded = _loaded(backend)
    return _checked(index, loaded) if loaded.usable else loaded


@functools.cache
def _loaded(backend: str) -> Availability:
    try:
        kernels = load_kernels(backend)
    except BuildError as error:
        logger.warning(
            "generated adapters run in plain PyTorch: the %s kernels do not build or load: %s", backend, error
        )
        return Availability(False, str(error))
    logger.info("generated adapters: backend %s (%s)", backend, kernels.description)
    return Availability(True, kernels.description, kernels.seconds)


@functools.cache
def _checked(index: int, loaded: Availability) -> Availability:
    """Whether the CUDA kernels' results on one GPU are right."""
    failure = ""
    try:
        # a first call may come from an evaluation, and the check needs gradients
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast("cuda", enabled=False):
            errors = first_use_errors(torch.device("cuda", index))
        if not max(errors.values()) <= 2 * TOLERANCE[torch.bfloat16]:
            failure = f"the kernels' results on GPU {index} are wrong: {errors}"
    except RuntimeError as error:
        failure = f"the kernels failed on GPU {index}: {reason_of(error)}"
    if not failure:
        return loaded
    logger.warning("generated adapters run in plain PyTorch: %s", failure)
    return Availability(False, failure)


def first_use_errors(device: torch.device) -> dict[str, float]:
    """Errors of a device's kernels on one small case with odd sizes, against double precision."""
    case = random_case(Shape(B=19, T=5, D=72, A=20, K=40, N=2), torch.bfloat16, device)
    x = [tensor.detach() for tensor in case.x]
    kernels, heads = torch.ops.hdscale, case.heads
    ys, dxs, dzs, hiddens = [], [], [], []
    dbias = torch.zeros_like(heads.down_bias_bias, dtype=torch.float64)
    for x_l, code, dy in zip(x, case.code.unbind(), case.dy, strict=True):
        biases = (
            torch.addmm(heads.down_bias_bias, code, heads.down_bias_weight.t()),
            torch.addmm(heads.up_bias_bias, code, heads.up_bias_weight.t()),
        )
        y, hidden = kernels.generated_adapter(x_l, code, *heads[:4], *(bias.float() for bias in biases))
        dx, dz, dhidden_bias = kernels.generated_adapter_backward(dy, hidden, code, *heads[:4])
        ys.append(y)
        dxs.append(dx)
        dzs.append(dz)
        hiddens.append(hidden)
        dbias += dhidden_bias.double().sum(0)
    found = kernels.generated_adapter_heads_backward(
        x, dzs, hiddens, list(case.dy), case.code, heads.down_weight, heads.up_weight
    )
    expected = reference(case, [hidden > 0 for hidden in hiddens])
    dcode_of_biases = torch.stack([dz.double().sum(1) for dz in dzs]) @ heads.down_bias_weight.double()
    dcode_of_biases += torch.stack([dy.double().sum(1) for dy in case.dy]) @ heads.up_bias_weight.double()
    outputs = {"y": torch.stack(ys), "x": torch.stack(dxs), "code": found[0].double() + dcode_of_biases}
    outputs["down_bias_bias"] = dbias
    outputs |= dict(zip(AdapterHeads._fields[:4], found[1:], strict=True))
    return {name: relative_error(output, expected[name]) for name, output in outputs.items()}


@torch.compiler.assume_constant_result
def _usable(backend: str, device: torch.device) -> bool:
    return availability(backend, device).usable


@torch.compiler.assume_constant_result
@functools.cache
def _beyond_kernels(backend: str, shape: Shape | None) -> str:
    """The backend for a shape that the named one has no kernels for; said once for each."""
    logger.warning("method.backend=%s has no kernels for %s: it is computed in plain PyTorch", backend, shape)
    return "torch"


def resolve_backend(wanted: str, *tensors: Tensor, shape: Shape | None = None) -> str:
    """The backend that computes on these tensors, at this shape if one is given: `cpp`, `cuda` or `torch`.

    Args:
        wanted: `method.backend`.
        tensors: the operator's inputs; `auto` looks at their number types and device.
        shape: of the call.

    Raises:
        UserError: if `wanted` is unknown, belongs to another device or number type, or cannot be built on this machine.
    """
    if wanted == "torch":
        return wanted
    place = tensors[0].device
    device = place.type
    if wanted == "auto":
        backend = {"cpu": "cpp", "cuda": "cuda"}.get(device, "torch")
        possible = backend != "torch" and supports(backend, tensors, shape) and _usable(backend, place)
        return backend if possible else "torch"
    if wanted not in BACKENDS:
        raise UserError(f"method.backend={wanted} is unknown{nearest(wanted, BACKENDS)}")
    if device != _DEVICE[wanted]:
        raise UserError(f"method.backend={wanted} cannot compute on {device}; use method.backend=auto")
    if not _usable(wanted, place):
        reason = availability(wanted, place).reason
        raise UserError(f"method.backend={wanted} is not available on this machine ({reason}); use method.backend=auto")
    if supports(wanted, tensors, shape):
        return wanted
    if wanted == "cuda":
        if any(tensor.dtype not in _DTYPES[wanted] for tensor in tensors):
            raise UserError(BF16_ONLY)
        return _beyond_kernels(wanted, shape)
    # on a CPU, float64 in a test falls back to PyTorch
    return "torch"


LARGEST_CUDA_CODE, MOST_CUDA_LAYERS = 480, 64
"""Largest K and N that the CUDA kernels support."""


def cuda_supports(shape: Shape) -> bool:
    """Whether the CUDA kernels support a shape: the rule of `takes` in `csrc/gpu_launch.h`, before any launch."""
    B, T, D, A, K, N = shape
    most, most_blocks = 1 << 30, (1 << 31) - 1
    instances, tokens = (64, 8) if T <= 8 else (16, 32) if T <= 32 else (8, 64)
    return (
        K <= LARGEST_CUDA_CODE
        and N <= MOST_CUDA_LAYERS
        and D * A < most
        and N * B < most
        and B * T < most
        and -(-B // instances) * -(-T // tokens) <= 65535
        and B * T * max(D, A) // 256 < most_blocks
        and N * B * K // 256 < most_blocks
    )


def supports(backend: str, tensors: tuple[Tensor, ...], shape: Shape | None) -> bool:
    """Whether a backend's kernels support these tensors, which must share one number type and device, and the shape."""
    first = tensors[0]
    same = all(tensor.dtype == first.dtype and tensor.device == first.device for tensor in tensors)
    shape_supported = backend != "cuda" or shape is None or cuda_supports(shape)
    return same and shape_supported and first.dtype in _DTYPES[backend]
