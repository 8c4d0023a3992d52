"""The operator's table: `hdscale bench op` at base and large, from one target token to many."""

from __future__ import annotations

from pathlib import Path

import torch

from hdscale.bench.op import measure, parse_shape
from hdscale.bench.timing import device_of
from hdscale.doctor.gpu.extension import need_kernels
from hdscale.doctor.gpu.lines import Lines

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
                shape = parse_shape(f"{size},batch={ROWS},tokens={tokens}")
                rows = measure(shape, torch.bfloat16, device, "cuda", ROUNDS, compile=False)
                ours = rows[0]
                found.say(
                    f"forward and backward {1e3 * ours['forward_backward']:.2f} ms, {ours['speed_up']:.2f} times as "
                    f"fast as matmul + bmm; keeps {ours['kept_mb']:.0f} MB, {ours['times_less_kept']:.1f} times less",
                    table=rows,
                )
