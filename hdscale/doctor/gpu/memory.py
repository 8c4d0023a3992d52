"""The plan's memory against the most that a real step has allocated on this card."""

from __future__ import annotations

from pathlib import Path

from hdscale.bench.memory import GPU_CASES, measured, predicted
from hdscale.doctor.gpu.lines import Lines, Wrong
from hdscale.doctor.gpu.step import alone

MOST = 10.0
"""Per cent that the plan may be off."""


def examine(lines: Lines, work: Path) -> None:
    """The checks of the stage `memory`."""
    ranks = alone()
    for case in GPU_CASES:
        with lines.check(f"{case.name}: {case.rows} x ({case.source} + {case.target})") as found:
            plan, peak = predicted(case, "cuda").peak, measured(case, ranks)
            error = 100 * (plan / peak - 1)
            found.say(
                f"plan {plan / 1e9:.2f} GB, measured {peak / 1e9:.2f} GB: {error:+.1f}%",
                table=[{"case": case.name, "plan_gb": plan / 1e9, "measured_gb": peak / 1e9, "error_percent": error}],
            )
            if not abs(error) <= MOST:
                raise Wrong(f"{found.detail}, allowed are {MOST:.0f}%")
    ranks.close()
