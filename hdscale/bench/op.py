"""`hdscale bench op`: the generated-adapter operator against (a) matmul + bmm and (b) the same under torch.compile.

For each shape: forward, forward + backward, and bytes kept for the backward pass, over all layers of one step. The
results are checked against double precision before anything is timed; the implementations alternate, and the best and
the median of the rounds are reported. "Least possible" is the necessary arithmetic, divided by the speed of a large
matrix product in the same run: generation once for forward; twice, and its two gradients, for forward + backward.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hdscale.bench.options import NAMED_SHAPES, OpOptions
from hdscale.bench.report import progress, publish
from hdscale.bench.timing import device_of, matmul_peak, timed
from hdscale.errors import UserError, nearest
from hdscale.ops import AdapterHeads, generated_adapter, generated_adapter_reference, share_heads
from hdscale.ops.backend import availability, resolve_backend
from hdscale.ops.cases import TOLERANCE, Case, random_case
from hdscale.ops.naive import Shape
from hdscale.ops.verify import relative_errors


def run(options: OpOptions) -> None:
    """Check and time the operator and what it is compared with, at each shape."""
    device = device_of(options.device)
    dtype: torch.dtype = getattr(torch, options.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    # not auto, which may choose PyTorch
    backend = options.backend or {"cpu": "cpp", "cuda": "cuda"}[device.type]
    shapes = [parse_shape(text) for text in options.shape]
    peak = matmul_peak(dtype, device)
    rows = []
    for shape in shapes:
        progress(f"{shape}: {options.rounds} rounds")
        rows += measure(shape, dtype, device, backend, options.rounds, options.compile)
        rows.append(floor_row(shape, dtype, peak))
    publish(
        "generated adapters: operator against matmul + bmm, all layers of one step",
        rows,
        options,
        device,
        kernels=availability(backend).reason,
        matmul_peak_tflops=peak / 1e12,
        load_average=os.getloadavg()[0],
    )


def parse_shape(text: str) -> Shape:
    """`large,batch=128,tokens=3` or `d=64,a=8,k=16,layers=2`.

    Raises:
        UserError: an unknown name or size.
    """
    sizes = dict(zip(("d", "a", "k", "layers"), NAMED_SHAPES["large"], strict=True)) | {
        "batch": 32,
        "tokens": 4,
    }
    for part in text.split(","):
        name, _, value = part.partition("=")
        if not value and name in NAMED_SHAPES:
            sizes |= dict(zip(("d", "a", "k", "layers"), NAMED_SHAPES[name], strict=True))
        elif name in sizes and value.isdigit() and int(value) > 0:
            sizes[name] = int(value)
        else:
            raise UserError(f"--shape {text}: '{part}' is not a shape{nearest(name, [*NAMED_SHAPES, *sizes])}")
    return Shape(sizes["batch"], sizes["tokens"], sizes["d"], sizes["a"], sizes["k"], sizes["layers"])


Forward = Callable[[list[Tensor], Tensor, AdapterHeads], list[Tensor]]


def implementations(backend: str, compile: bool) -> dict[str, Forward]:
    """Name -> forward pass over all layers of one step: xs, codes [N, B, K], heads -> ys."""

    def operator(x, code, heads):
        layers = share_heads(code, heads, x[0].shape[1], backend=backend)
        return [generated_adapter(x_l, *layer, backend=backend) for x_l, layer in zip(x, layers, strict=True)]

    def plain(x, code, heads):
        return [generated_adapter_reference(x_l, code_l, heads) for x_l, code_l in zip(x, code.unbind(), strict=True)]

    found: dict[str, Forward] = {"operator": operator, "matmul+bmm": plain}
    if compile:
        layer = torch.compile(generated_adapter_reference, fullgraph=True)
        found["compiled"] = lambda x, code, heads: [
            layer(x_l, code_l, heads) for x_l, code_l in zip(x, code.unbind(), strict=True)
        ]
    return found


def measure(
    shape: Shape, dtype: torch.dtype, device: torch.device, backend: str, rounds: int, compile: bool
) -> list[dict[str, Any]]:
    """Check, then time, every implementation at one shape: one row each.

    Seconds are the best of the rounds and their median; MB are what is kept for the backward pass, parameters apart;
    `speed_up` and `times_less_kept` are against matmul + bmm.
    """
    errors = check(shape, dtype, device, backend)
    case = random_case(shape, dtype, device.type)
    x = [tensor.requires_grad_() for tensor in case.x]
    code, heads = (
        case.code.requires_grad_(),
        AdapterHeads(*(tensor.requires_grad_() for tensor in case.heads)),
    )
    inputs = [*x, code, *heads]
    ways = implementations(backend, compile)
    forward: dict[str, list[float]] = {name: [] for name in ways}
    both: dict[str, list[float]] = {name: [] for name in ways}
    kept = {}

    def forward_backward(way: Forward) -> None:
        torch.autograd.grad(way(x, code, heads), inputs, case.dy)

    for name, way in ways.items():  # warm up, and count what is kept
        kept[name] = bytes_kept(partial(way, x, code, heads), inputs[len(x) + 1 :])
        forward_backward(way)
    for _ in range(rounds):
        for name, way in ways.items():
            with torch.no_grad():
                forward[name].append(timed(partial(way, x, code, heads), device))
            both[name].append(timed(partial(forward_backward, way), device))
    labels = {"operator": f"operator ({resolve_backend(backend, case.x[0], code, *heads)})"}
    return [
        described(shape, dtype)
        | {
            "what": labels.get(name, name),
            "forward": min(forward[name]),
            "forward_median": statistics.median(forward[name]),
            "forward_backward": min(both[name]),
            "forward_backward_median": statistics.median(both[name]),
            "kept_mb": kept[name] / 1e6,
            "speed_up": min(both["matmul+bmm"]) / min(both[name]),
            "times_less_kept": kept["matmul+bmm"] / kept[name],
            "max_error": max(errors.values()) if name == "operator" else None,
        }
        for name in ways
    ]


def described(shape: Shape, dtype: torch.dtype) -> dict[str, Any]:
    """A shape as the first columns of a row."""
    size_b, size_t, size_d, size_a, size_k, layers = shape
    sizes = f"D={size_d} A={size_a} K={size_k} layers={layers} batch={size_b} T={size_t}"
    return {"shape": sizes, "dtype": str(dtype).removeprefix("torch.")}


def check(shape: Shape, dtype: torch.dtype, device: torch.device, backend: str) -> dict[str, float]:
    """Errors of the operator on a smaller case of this shape.

    Raises:
        RuntimeError: if one is beyond the tolerance.
    """
    small = shape._replace(B=min(shape.B, 8), N=min(shape.N, 2))
    case: Case = random_case(small, dtype, device.type)
    resolved = resolve_backend(backend, case.x[0], case.code, *case.heads)
    errors = relative_errors(case, resolved)
    if not max(errors.values()) <= TOLERANCE[dtype]:
        raise RuntimeError(f"the operator's results are wrong at {small}: {errors}")
    return errors


def bytes_kept(forward: Callable[[], object], parameters: list[Tensor]) -> int:
    """Bytes that autograd keeps of a forward pass, parameters apart: each storage counted once."""
    ignored = {tensor.untyped_storage().data_ptr() for tensor in parameters}
    storages: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in ignored:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = forward()  # held until every saved tensor has been seen, so that no address is used twice
    del result
    return sum(storages.values())


def floor_row(shape: Shape, dtype: torch.dtype, peak: float) -> dict[str, Any]:
    """The row of the least possible time: the arithmetic that cannot be left out, at the machine's peak.

    Forward: generate both matrices and apply them. Backward: generate them again, two gradients of each head
    (weight and code), and the products with the tokens.
    """
    B, T, D, A, K, N = shape
    forward = 2 * 2 * B * D * A * (K + T) * N
    backward = 2 * 2 * B * D * A * (3 * K + 2 * T) * N
    empty = dict.fromkeys(
        ("forward_median", "forward_backward_median", "kept_mb", "speed_up", "times_less_kept", "max_error")
    )
    times = {"what": "least possible", "forward": forward / peak, "forward_backward": (forward + backward) / peak}
    order = ("what", "forward", "forward_median", "forward_backward", "forward_backward_median")
    return described(shape, dtype) | {name: (empty | times)[name] for name in (*order, *list(empty)[2:])}
