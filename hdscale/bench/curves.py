"""`hdscale bench curves`: the losses of a run with everything that makes it fast on, against everything off.

Three short runs of one configuration get the same rows in the same order: fast, plain, and plain in float32. Fast and
plain may differ by rounding only: by no more than the plain run differs between bfloat16 and float32.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from hdscale.bench.options import CurvesOptions
from hdscale.bench.report import progress, publish
from hdscale.bench.timing import device_of
from hdscale.errors import UserError
from hdscale.runs.folder import METRICS

OFF = (
    "method.backend=torch", "model.attention=eager", "train.sort_by_length=false", "train.micro_batch_size=null",
    "train.tokens_per_micro_batch=null", "train.compile=off",
)  # fmt: skip
"""One pass over the whole batch in its own order, attention and adapters in plain PyTorch."""
TAIL = 50
"""Steps whose mean loss is compared in the end."""


def run(options: CurvesOptions) -> None:
    """Train three times, compare the losses, draw them."""
    if not Path(options.config).is_file():
        raise UserError(f"--config {options.config}: no such file")
    if options.picture and Path(options.picture).suffix not in (".svg", ".png", ".pdf"):
        raise UserError(f"--picture {options.picture}: the name must end in .svg, .png or .pdf")
    fast = (
        f"train.tokens_per_micro_batch={options.tokens}",
        "train.sort_by_length=true",
        "method.backend=auto",
        f"train.compile={options.compile}",
    )
    kinds = {
        "fast, bf16": ("bf16", (*fast, "model.attention=sdpa")),
        "plain, bf16": ("bf16", OFF),
        "plain, fp32": ("fp32", OFF),
    }
    curves: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for number, (name, (dtype, settings)) in enumerate(kinds.items(), 1):
            progress(f"run {number} of {len(kinds)}: {name}")
            curves[name] = losses(options, Path(folder), f"run{number}", dtype, settings)
    rows = compare(curves)
    if options.picture:
        draw(curves, options.picture)
        progress(f"drawn to {options.picture}")
    publish(
        f"losses of {options.steps} steps, {Path(options.config).stem}",
        rows,
        options,
        device_of(None),
    )


def losses(options: CurvesOptions, folder: Path, name: str, dtype: str, settings: tuple[str, ...]) -> list[float]:
    """The loss of each step of a run.

    Raises:
        UserError: if the run fails.
    """
    command = [
        sys.executable, "-m", "hdscale", "train", "--config", options.config, f"run.dir={folder}", f"run.name={name}",
        f"train.max_steps={options.steps}", "train.log_every=1", f"train.dtype={dtype}",
        f"deepspeed=ds_configs/zero2_{dtype}.json",
        "eval.every=0", "eval.select=last", "eval.test=false", "model.dropout=0.0", *settings, *options.overrides,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()[-1]
        raise UserError(f"the run failed ({reason}); to see more, run: {' '.join(command[1:])}")
    lines = [json.loads(line) for line in (folder / name / METRICS).read_text().splitlines()]
    return [line["loss"] for line in lines if line["kind"] == "train"]


def compare(curves: dict[str, list[float]]) -> list[dict[str, Any]]:
    """One row per run: where it ended, and how far it was from the plain run in bfloat16."""
    plain = curves["plain, bf16"]
    return [
        {
            "run": name,
            "first_loss": curve[0],
            f"mean_of_last_{TAIL}": statistics.fmean(curve[-TAIL:]),
            "mean_difference_to_plain_bf16": statistics.fmean(abs(a - b) for a, b in zip(curve, plain, strict=True)),
            "largest_difference": max(abs(a - b) for a, b in zip(curve, plain, strict=True)),
        }
        for name, curve in curves.items()
    ]


def draw(curves: dict[str, list[float]], path: str) -> None:
    """The curves above, their differences to the plain run in bfloat16 below."""
    figure = Figure(figsize=(7.0, 5.6), layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1, sharex=True)
    looks = {
        "fast, bf16": ("#1f6fb4", "-", 2.4),
        "plain, bf16": ("#d1700a", "--", 1.4),
        "plain, fp32": ("#3d3d3d", ":", 1.4),
    }
    plain = curves["plain, bf16"]
    for name, curve in curves.items():
        colour, line, width = looks[name]
        steps = range(1, len(curve) + 1)
        above.plot(steps, curve, color=colour, linestyle=line, linewidth=width, label=name)
        if curve is not plain:
            label = f"|{name.partition(',')[0]}, {name.rpartition(' ')[2]} - plain, bf16|"
            below.plot(
                steps,
                [abs(a - b) for a, b in zip(curve, plain, strict=True)],
                color=colour,
                linestyle=line,
                label=label,
            )
    above.set_ylabel("loss")
    below.set_ylabel("difference of losses")
    below.set_yscale("log")
    below.set_xlabel("step")
    for axes in (above, below):
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    figure.savefig(path, metadata={"Date": None} if path.endswith(".svg") else None)
