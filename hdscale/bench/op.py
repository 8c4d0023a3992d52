"""`hdscale bench op`: the generated-adapter operator against (a) matmul + bmm and (b) the same under
torch.compile.

For each shape: forward, forward + backward, and bytes kept for the backward pass, over all layers of one
step. The results are checked against double precision before anything is timed; the contenders take turns,
and the best and the median of the rounds are reported. The floor beside them is arithmetic over the peak that
a large matrix product reaches in the same run: generation twice and its two gradients for forward + backward,
generation once for forward.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from hdscale.errors import UserError, nearest
from hdscale.ops import AdapterHeads, generated_adapter, generated_adapter_reference, share_heads
from hdscale.ops.backend import availability, resolve_backend
from hdscale.ops.cases import TOLERANCE, Case, random_case
from hdscale.ops.naive import Shape
from hdscale.ops.verify import relative_errors

NAMED_SHAPES = {  # D, A, K, layers of the decoder
    "base": (768, 64, 128, 12),
    "large": (1024, 64, 128, 24),
    "xl": (2048, 64, 128, 24),
    "xxl": (4096, 64, 128, 24),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--shape",
        action="append",
        metavar="NAME[,batch=B][,tokens=T]",
        help=f"{', '.join(NAMED_SHAPES)}, or d=..,a=..,k=..,layers=..; batch=32,tokens=4 by default; may be repeated",
    )
    parser.add_argument(
        "--dtype", choices=sorted(DTYPES), default=None, help="default: float32 on CPU, bfloat16 on CUDA"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--backend", default=None, help="implementation to measure: cpp or cuda; default: the device's own"
    )
    parser.add_argument("--rounds", type=int, default=5, help="rounds in which the contenders take turns")
    parser.add_argument("--compile", action="store_true", help="measure (b), matmul + bmm under torch.compile, too")
    parser.add_argument(
        "--json", metavar="FILE", nargs="?", const="-", help="write the table as JSON (default: stdout)"
    )
    parser.add_argument("--markdown", metavar="FILE", help="write the table, with machine and versions, as Markdown")


def run(args: argparse.Namespace) -> int:
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: no CUDA device is visible; use --device cpu")
    dtype = DTYPES[args.dtype or ("bfloat16" if args.device == "cuda" else "float32")]
    shapes = [parse_shape(text) for text in args.shape or ["large"]]
    # not auto: the measurement is what decides where auto turns to PyTorch
    backend = args.backend or {"cpu": "cpp", "cuda": "cuda"}[args.device]
    peak = matmul_peak(dtype, args.device)
    rows = []
    for shape in shapes:
        row = measure(shape, dtype, args.device, backend, args.rounds, args.compile)
        row["floor"] = floor_seconds(shape, peak)
        rows.append(row)
        if args.json != "-":
            print(describe(row), flush=True)
    report = {"machine": machine(args.device), "peak_tflops": peak / 1e12, "rows": rows}
    if args.json == "-":
        print(json.dumps(report, indent=2))
    elif args.json:
        Path(args.json).write_text(json.dumps(report, indent=2) + "\n")
    if args.markdown:
        Path(args.markdown).write_text(markdown(report))
    return 0


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
            raise UserError(f"--shape {text}: '{part}' is no shape{nearest(name, [*NAMED_SHAPES, *sizes])}")
    return Shape(sizes["batch"], sizes["tokens"], sizes["d"], sizes["a"], sizes["k"], sizes["layers"])


# ---- contenders: a forward pass over all layers ----------------------------------------------------------

Forward = Callable[[list[Tensor], Tensor, AdapterHeads], list[Tensor]]


def contenders(backend: str, compile: bool) -> dict[str, Forward]:
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


def measure(shape: Shape, dtype: torch.dtype, device: str, backend: str, rounds: int, compile: bool) -> dict:
    """Check, then time, every contender at one shape."""
    errors = check(shape, dtype, device, backend)
    case = random_case(shape, dtype, device)
    x = [tensor.requires_grad_() for tensor in case.x]
    code, heads = (
        case.code.requires_grad_(),
        AdapterHeads(*(tensor.requires_grad_() for tensor in case.heads)),
    )
    inputs = [*x, code, *heads]
    ways = contenders(backend, compile)
    forward: dict[str, list[float]] = {name: [] for name in ways}
    both: dict[str, list[float]] = {name: [] for name in ways}
    kept = {}
    for name, way in ways.items():  # warm up, and count what is kept
        kept[name] = bytes_kept(lambda way=way: way(x, code, heads), inputs[len(x) + 1 :])
        torch.autograd.grad(way(x, code, heads), inputs, case.dy)
    for _ in range(rounds):
        for name, way in ways.items():
            with torch.no_grad():
                forward[name].append(seconds(lambda way=way: way(x, code, heads), device))
            both[name].append(
                seconds(lambda way=way: torch.autograd.grad(way(x, code, heads), inputs, case.dy), device)
            )
    return {
        "shape": shape._asdict(),
        "dtype": str(dtype).removeprefix("torch."),
        "backend": resolve_backend(backend, case.x[0], code, *heads),
        "max_error": max(errors.values()),
        "forward_best": {name: min(times) for name, times in forward.items()},
        "forward_median": {name: statistics.median(times) for name, times in forward.items()},
        "forward_backward_best": {name: min(times) for name, times in both.items()},
        "forward_backward_median": {name: statistics.median(times) for name, times in both.items()},
        "bytes_kept": kept,
    }


def check(shape: Shape, dtype: torch.dtype, device: str, backend: str) -> dict[str, float]:
    """Errors of the operator on a cut-down case of this shape. Raises RuntimeError if one is beyond the
    tolerance."""
    small = shape._replace(B=min(shape.B, 8), N=min(shape.N, 2))
    case: Case = random_case(small, dtype, device)
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


def seconds(call: Callable[[], object], device: str) -> float:
    """Wall-clock time of a call, to the end of its work on the device."""
    if device == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def matmul_peak(dtype: torch.dtype, device: str) -> float:
    """FLOP/s of the best of a few large matrix products."""
    size = 8192 if device == "cuda" else 2048
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    left @ right
    return 2 * size**3 / min(seconds(lambda: left @ right, device) for _ in range(5))


def floor_seconds(shape: Shape, peak: float) -> dict[str, float]:
    """Arithmetic that cannot be left out over the machine's peak.

    Forward: generate both matrices and apply them. Backward: generate them again, two gradients of each head
    (weight and code), and the products with the tokens.
    """
    B, T, D, A, K, N = shape
    forward = 2 * 2 * B * D * A * (K + T) * N
    backward = 2 * 2 * B * D * A * (3 * K + 2 * T) * N
    return {"forward": forward / peak, "forward_backward": (forward + backward) / peak}


# ---- reporting -------------------------------------------------------------------------------------------


def machine(device: str) -> dict[str, str | int | float]:
    """Hardware and versions, for the table."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        name = next((ln.split(":")[1].strip() for ln in cpuinfo.read_text().splitlines() if "model name" in ln), name)
    return {
        "cpu": name,
        "cores": os.cpu_count() or 0,
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if device == "cuda" else "none",
        "kernels": availability("cuda" if device == "cuda" else "cpp").reason,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "load_average": os.getloadavg()[0],
        "date": datetime.date.today().isoformat(),
        "command": "hdscale " + " ".join(sys.argv[1:]),
    }


def describe(row: dict) -> str:
    """One shape's figures, in a few lines."""
    sizes = " ".join(f"{name}={size}" for name, size in row["shape"].items())
    lines = [f"{sizes} {row['dtype']}, backend {row['backend']}, largest error {row['max_error']:.1e}"]
    for name in row["forward_best"]:
        lines.append(
            f"  {name:<11} forward {row['forward_best'][name]:8.4f} s  forward+backward"
            f" {row['forward_backward_best'][name]:8.4f} s (median {row['forward_backward_median'][name]:.4f})"
            f"  kept {row['bytes_kept'][name] / 1e6:9.2f} MB"
        )
    floor = row["floor"]
    lines.append(
        f"  {'floor':<11} forward {floor['forward']:8.4f} s  forward+backward {floor['forward_backward']:8.4f} s"
    )
    return "\n".join(lines)


def markdown(report: dict) -> str:
    """The table as it is committed under hdscale/bench/results/."""
    info = report["machine"]
    lines = [
        "# Generated adapters: operator against matmul + bmm",
        "",
        f"`{info['command']}`, {info['date']}. "
        f"CPU: {info['cpu']}, {info['cores']} cores, {info['threads']} threads. "
        f"GPU: {info['gpu']}. Kernels: {info['kernels']}. torch {info['torch']}, Python {info['python']}. "
        f"Load average at the end: {info['load_average']:.1f}. "
        f"A large matrix product reaches {report['peak_tflops']:.3f} TFLOP/s here.",
        "",
        "Seconds for all layers of one step, best of the rounds (median in brackets); MB kept for the backward "
        "pass, parameters apart.",
        "",
        "| D | A | K | layers | batch | T | dtype | what | forward | forward+backward | kept | speed-up | memory |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in report["rows"]:
        s = row["shape"]
        head = f"| {s['D']} | {s['A']} | {s['K']} | {s['N']} | {s['B']} | {s['T']} | {row['dtype']} |"
        for name, best in row["forward_backward_best"].items():
            speed = row["forward_backward_best"]["matmul+bmm"] / best
            memory = row["bytes_kept"]["matmul+bmm"] / row["bytes_kept"][name]
            label = f"{name} ({row['backend']})" if name == "operator" else name
            lines.append(
                f"{head} {label} | {row['forward_best'][name]:.4f} ({row['forward_median'][name]:.4f}) |"
                f" {best:.4f} ({row['forward_backward_median'][name]:.4f}) |"
                f" {row['bytes_kept'][name] / 1e6:.1f} |"
                f" {speed:.2f}x | {memory:.1f}x less |"
            )
        floor = row["floor"]
        lines.append(f"{head} floor | {floor['forward']:.4f} | {floor['forward_backward']:.4f} | | | |")
    return "\n".join(lines) + "\n"
