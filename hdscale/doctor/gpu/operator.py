"""The operator's results and gradients against float64, over the shapes of real bases."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from hdscale.bench.options import NAMED_SHAPES
from hdscale.doctor.gpu.extension import need_kernels
from hdscale.doctor.gpu.lines import Lines, Wrong
from hdscale.ops.backend import cuda_supports
from hdscale.ops.cases import TOLERANCE, random_case
from hdscale.ops.naive import Shape
from hdscale.ops.verify import outputs_and_gradients, relative_errors

WIDTHS = ("base", "large", "xl")
TOKENS = (1, 4, 16, 128)
ROWS = (1, 32, 128)
"""With one row the sums are cut into many parts, with 128 of many tokens into one."""
LAYERS = 2


def examine(lines: Lines, work: Path) -> None:
    """The checks of the stage `operator`: one line for each width and number of tokens, small shapes first."""
    for tokens in TOKENS:
        for width in WIDTHS:
            with lines.check(f"T5-{width}, T = {tokens}, bf16") as found:
                need_kernels()
                rows = [errors_at(width, rows, tokens) for rows in ROWS]
                worst = max(rows, key=lambda row: row["worst_error"])
                found.say(
                    f"B = {', '.join(map(str, ROWS))}: worst error {worst['worst_error']:.1e} "
                    f"({worst['of']}, B = {worst['B']})",
                    table=rows,
                )
                if not worst["worst_error"] <= TOLERANCE[torch.bfloat16]:
                    raise Wrong(f"{found.detail}, allowed is {TOLERANCE[torch.bfloat16]}")
    with lines.check("the same bits at every run"):
        need_kernels()
        case = random_case(Shape(B=64, T=4, D=512, A=64, K=128, N=4), torch.bfloat16, "cuda")
        first, second = (outputs_and_gradients(case, "cuda") for _ in range(2))
        if unlike := [name for name in first if not torch.equal(first[name], second[name])]:
            raise Wrong(f"two runs differ in {', '.join(unlike)}")


def errors_at(width: str, rows: int, tokens: int) -> dict[str, Any]:
    """The worst error of one shape, and of which output or gradient it is."""
    d_model, size, code, _ = NAMED_SHAPES[width]
    shape = Shape(B=rows, T=tokens, D=d_model, A=size, K=code, N=LAYERS)
    if not cuda_supports(shape):
        raise Wrong(f"the kernels do not take {shape}")
    case = random_case(shape, torch.bfloat16, "cuda")
    errors = relative_errors(case, "cuda")
    name = max(errors, key=lambda one: errors[one] if errors[one] == errors[one] else float("inf"))
    return {"width": width, "B": rows, "T": tokens, "worst_error": errors[name], "of": name}
