"""Pictures of a page: empty figures, legends, and logarithmic axes with numbers that can be read."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

SIZE = (7.2, 4.4)
"""Inches."""


@dataclass
class Picture:
    """A figure with what the page says beside it.

    Attributes:
        name: of its PNG. title: heading. figure: drawn. notes: lines below it, such as fitted curves.
    """

    name: str
    title: str
    figure: Figure
    notes: list[str] = field(default_factory=list)

    def png(self) -> bytes:
        """The figure as a PNG, the same bytes for the same figure: without a date and a version in it."""
        buffer = io.BytesIO()
        self.figure.savefig(buffer, format="png", dpi=150, metadata={"Software": None})
        return buffer.getvalue()


def new_figure(width: float = SIZE[0]) -> tuple[Figure, Axes]:
    """An empty figure that lays itself out."""
    figure = Figure(figsize=(width, SIZE[1]), layout="constrained")
    axes = figure.add_subplot()
    axes.grid(True, which="major", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure, axes


def legend(figure: Figure, handles: Sequence[Artist], labels: Sequence[str]) -> None:
    """The legend, beside the axes: it covers nothing."""
    figure.legend(handles, labels, loc="outside right upper", frameon=False, fontsize=8)


def plain_log_ticks(axes: Axes, x: bool = True, y: bool = True) -> None:
    """Numbers such as 300k or 2.5 on logarithmic axes, with ticks also where an axis spans less than a decade."""
    for axis, wanted in ((axes.xaxis, x), (axes.yaxis, y)):
        if not wanted:
            continue
        low, high = sorted(axis.get_view_interval())
        decades = math.log10(high / low) if low > 0 else 9.0
        if decades < 0.5:
            axis.set_major_locator(FixedLocator([t for t in MaxNLocator(6).tick_values(low, high) if low <= t <= high]))
        elif decades < 2.2:
            axis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades > 1 else (1, 1.5, 2, 3, 5, 7)))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
        axis.set_tick_params(which="both", labelsize=8)


def fit_limits(axes: Axes, values: Sequence[float]) -> None:
    """Limit the y axis to the points and curves: a wide band around them is cut off instead of flattening them."""
    low, high = min(values), max(values)
    margin = max((high / low) ** 0.12, 1.02)
    axes.set_ylim(low / margin, high * margin)


def short(value: float) -> str:
    """1200000 -> 1.2M."""
    for limit, letter in ((1e15, ""), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value:.2g}" if not letter else f"{value / limit:.4g}{letter}"
    return f"{value:.3g}"
