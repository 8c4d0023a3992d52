"""The operator's table: `hdscale bench op` at base and large, from one target token to many."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from hdscale.bench.op import measure, parse_shape
from hdscale.bench.timing import device_of
from hdscale.doctor.gpu.extension import need_kernels
from hdscale.doctor.gpu.lines import Finding, Lines

TOKENS = (4, 1, 16, 128)
ROWS = 128
ROUNDS = 20


def examine(lines: Lines, work: Path) -> None:
    """The checks of the stage `op`."""
    device = device_of("cuda")
    for tokens in TOKENS:
        for size in ("base", "large"):
            with lines.check(f"T5-{size}, B = {ROWS}, T = {tokens}") as found:
                need_kernels()
                compare(found, f"{size},batch={ROWS},tokens={tokens}", device, compile=False)
    with lines.check(f"T5-large, B = {ROWS}, T = 4, also against torch.compile") as found:
        need_kernels()
        compare(found, f"large,batch={ROWS},tokens=4", device, compile=True)


def compare(found: Finding, shape: str, device: torch.device, compile: bool) -> None:
    """The operator against what else can compute it, at one shape."""
    rows = measure(parse_shape(shape), torch.bfloat16, device, "cuda", ROUNDS, compile)
    ours = rows[0]
    others = ", ".join(
        f"{ours_over(other, ours):.2f} times as fast as {other['what']}" for other in rows if other is not ours
    )
    found.say(
        f"forward and backward {1e3 * ours['forward_backward']:.2f} ms, {others}; keeps {ours['kept_mb']:.0f} MB, "
        f"{ours['times_less_kept']:.1f} times less",
        table=rows,
    )


def ours_over(other: dict[str, Any], ours: dict[str, Any]) -> float:
    """How many times as fast as another way the operator is, by medians."""
    return other["forward_backward_median"] / ours["forward_backward_median"]
