"""The report's pictures: a palette that colour-blind readers tell apart, and a marker besides each colour."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

from hdscale.study.fits import Fit, FitRefused, fit_power_law
from hdscale.study.rows import Row, pareto

# Okabe and Ito's palette, the dark ones first
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9", "#8C6D31")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
EXTRAPOLATE = 4.0
"""A fit is drawn to so many times the largest x, dashed beyond what was measured."""

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


@dataclass(frozen=True)
class Quantity:
    """Something that a row has: how to read it, and how an axis calls it."""

    name: str
    label: str
    symbol: str
    read: Callable[[Row], float | None]


PARAMETERS = Quantity("model size", "parameters of the base", "N", lambda row: row.parameters)
TRAINABLE = Quantity("trainables", "trainable parameters", "n", lambda row: row.trainable)
SAMPLES = Quantity("data", "training rows seen", "D", lambda row: row.samples)
FLOPS = Quantity("compute", "training compute (FLOP)", "C", lambda row: row.flops)
TASKS = Quantity("number of tasks", "tasks", "k", lambda row: row.tasks)
COMMON = Quantity(
    "error on common tasks", "test error on the tasks of all runs (points)", "e", lambda row: row.common_error
)
LOSS = Quantity("loss", "training loss at the end (nats per token)", "L", lambda row: row.loss)
ERROR = Quantity("error", "test error, 100 - average score (points)", "e", lambda row: row.error)


def scaling(
    rows: Sequence[Row], x: Quantity, y: Quantity, group: Callable[[Row], str], unit: str = ""
) -> Picture | None:
    """y against x on logarithmic axes, a colour a group, with a power law for each group that can carry one.

    Returns:
        None where x does not vary or nothing has both.
    """
    points = [(row, x.read(row), y.read(row)) for row in rows]
    points = [(row, a, b) for row, a, b in points if a and b and a > 0 and b > 0]
    if len({a for _, a, _ in points}) < 2:
        return None
    figure, axes = new_figure()
    notes = []
    drawn_at = [b for _, _, b in points]
    labels = list(dict.fromkeys(group(row) for row, _, _ in points))
    for index, label in enumerate(labels):
        own = [(a, b) for row, a, b in points if group(row) == label]
        xs, ys = np.array([a for a, _ in own]), np.array([b for _, b in own])
        colour, marker = style(index)
        axes.plot(xs, ys, marker, color=colour, markersize=6, alpha=0.75, markeredgewidth=0, linestyle="none")
        try:
            fit = fit_power_law(xs, ys)
        except FitRefused as refusal:
            notes.append(f"{label}: no fit ({refusal})")
            means = sorted({a: float(np.mean(ys[xs == a])) for a in xs}.items())
            axes.plot([a for a, _ in means], [b for _, b in means], color=colour, linewidth=1, alpha=0.6)
            continue
        draw_fit(axes, fit, colour)
        drawn_at += fit.predict(np.geomspace(fit.x_range[0], EXTRAPOLATE * fit.x_range[1], 9)).tolist()
        notes.append(f"{label}: {describe(fit, y.symbol, x.symbol)}")
    axes.set_xscale("log")
    axes.set_yscale("log")
    fit_limits(axes, drawn_at)
    plain_log_ticks(axes)
    axes.set_xlabel(x.label)
    axes.set_ylabel(y.label)
    handles = [Line2D([], [], color=style(i)[0], marker=style(i)[1], linestyle="none") for i in range(len(labels))]
    drawn = [note for note in notes if "no fit" not in note]
    if drawn:
        handles += [Line2D([], [], color="#555555"), Line2D([], [], color="#555555", linestyle="--")]
        labels += ["fit with its 95% band", "extrapolation"]
    legend(figure, axes, handles, labels)
    return Picture(f"{y.name}_by_{x.name}".replace(" ", "_"), f"{y.name.capitalize()} against {x.name}", figure, notes)


def draw_fit(axes: Axes, fit: Fit, colour: str) -> None:
    """The curve and its band where it was measured, dashed and paler beyond."""
    low, high = fit.x_range
    inside = np.geomspace(low, high, 60)
    beyond = np.geomspace(high, high * EXTRAPOLATE, 30)
    for xs, dash, alpha in ((inside, "-", 0.18), (beyond, "--", 0.08)):
        axes.plot(xs, fit.predict(xs), dash, color=colour, linewidth=1.4)
        bottom, top = fit.band(xs)
        axes.fill_between(xs, bottom, top, color=colour, alpha=alpha, linewidth=0)


def describe(fit: Fit, y: str, x: str) -> str:
    """A fit in a line: formula, exponent with its interval, quality, what is extrapolated."""
    alpha = f"α = {fit.parameters['alpha']:.3f} {interval(fit.intervals['alpha'])}"
    offset = f", E = {fit.parameters['E']:.3g} {interval(fit.intervals['E'])}" if fit.form == "offset" else ""
    return (
        f"{fit.formula(y, x)}; {alpha}{offset} (95% bootstrap), R² of the logarithms {fit.r_squared:.3f}, "
        f"scatter {100 * fit.relative_error:.1f}%, {fit.points} runs at {fit.sizes} sizes; beyond {fit.x_range[1]:.3g} "
        "it is extrapolation"
    )


def interval(ends: tuple[float | None, float | None]) -> str:
    """`[0.1, 0.3]`, with -∞ and ∞ for open ends."""
    low, high = ends
    return f"[{'-∞' if low is None else f'{low:.3g}'}, {'∞' if high is None else f'{high:.3g}'}]"


def against_plan(
    rows: Sequence[Row], measured: str, planned: str, label: str, title: str, group: Callable[[Row], str]
) -> Picture | None:
    """A measured quantity against model size, filled, with the plan's prediction, hollow."""
    points = [(row, getattr(row, measured), getattr(row, planned)) for row in rows]
    points = [(row, value, plan) for row, value, plan in points if value and row.parameters > 0]
    if not points:
        return None
    figure, axes = new_figure()
    labels = list(dict.fromkeys(group(row) for row, _, _ in points))
    ratios: list[float] = []
    for index, name in enumerate(labels):
        own = [(row, value, plan) for row, value, plan in points if group(row) == name]
        colour, marker = style(index)
        xs = [row.parameters * offset_of(index, len(labels)) for row, _, _ in own]
        axes.plot(xs, [value for _, value, _ in own], marker, color=colour, markersize=6, alpha=0.75, linestyle="none")
        planned_points = sorted({(x, plan) for x, (_, _, plan) in zip(xs, own, strict=True) if plan})
        if planned_points:
            axes.plot(
                *zip(*planned_points, strict=True),
                marker,
                color=colour,
                markersize=9,
                markerfacecolor="none",
                linestyle=":",
            )
            ratios += [value / plan for _, value, plan in own if plan]
    axes.set_xscale("log")
    axes.set_yscale("log")
    plain_log_ticks(axes)
    axes.set_xlabel("parameters of the base (groups set side by side)" if len(labels) > 1 else "parameters of the base")
    axes.set_ylabel(label)
    handles = [Line2D([], [], color=style(i)[0], marker=style(i)[1], linestyle="none") for i in range(len(labels))]
    notes = []
    if not ratios:
        notes.append("no prediction beside it: the plan has figures for GPUs, and for none of " + kinds_of(rows))
    if ratios:
        handles.append(Line2D([], [], color="#555555", marker="o", markerfacecolor="none", linestyle=":"))
        labels.append("plan")
        notes.append(
            f"measured over planned: {min(ratios):.2f} to {max(ratios):.2f}, median {float(np.median(ratios)):.2f}"
        )
    legend(figure, axes, handles, labels)
    return Picture(f"{measured}_by_model_size", title, figure, notes)


def side_by_side(rows: Sequence[Row], size: Callable[[Row], str], method: Callable[[Row], str]) -> Picture | None:
    """Test scores of the methods beside each other, a cluster a size: each seed a point, the mean a bar."""
    own = [row for row in rows if row.average is not None]
    sizes = list(dict.fromkeys(size(row) for row in sorted(own, key=lambda row: row.parameters)))
    methods = list(dict.fromkeys(method(row) for row in own))
    if len(methods) < 2:
        return None
    figure, axes = new_figure(width=max(SIZE[0], 1.2 * len(sizes) + 3))
    width = 0.8 / len(methods)
    notes = []
    for index, name in enumerate(methods):
        colour, marker = style(index)
        for place, one in enumerate(sizes):
            values = [row.average for row in own if size(row) == one and method(row) == name]
            if not values:
                continue
            x = place + (index - (len(methods) - 1) / 2) * width
            mean = float(np.mean(values))
            axes.plot([x - 0.4 * width, x + 0.4 * width], [mean, mean], color=colour, linewidth=2.5)
            axes.plot([x] * len(values), values, marker, color=colour, markersize=5, alpha=0.6, linestyle="none")
        percents = [row.percent for row in own if method(row) == name]
        notes.append(f"{name}: {min(percents):.3g}% to {max(percents):.3g}% trainable")
    axes.set_xticks(range(len(sizes)), sizes, rotation=0 if len("".join(sizes)) < 70 else 20)
    axes.set_xlim(-0.6, len(sizes) - 0.4)
    axes.set_xlabel("size of the base")
    axes.set_ylabel("test average (points)")
    handles = [Line2D([], [], color=style(i)[0], marker=style(i)[1]) for i in range(len(methods))]
    legend(figure, axes, handles, [*methods])
    return Picture("methods_side_by_side", "Methods side by side", figure, notes)


def pareto_front(rows: Sequence[Row], group: Callable[[Row], str]) -> Picture | None:
    """Test scores against device-hours, and the runs that no other beats in both."""
    own = [row for row in rows if row.average is not None and row.device_hours > 0]
    if len(own) < 2:
        return None
    figure, axes = new_figure()
    labels = list(dict.fromkeys(group(row) for row in own))
    for index, name in enumerate(labels):
        members = [row for row in own if group(row) == name]
        colour, marker = style(index)
        axes.plot(
            [row.device_hours for row in members], [row.average for row in members], marker,
            color=colour, markersize=6, alpha=0.75, linestyle="none",
        )  # fmt: skip
    front = pareto([row.device_hours for row in own], [row.average for row in own])
    axes.step(
        [own[i].device_hours for i in front], [own[i].average for i in front],
        where="post", color="#555555", linewidth=1.2, zorder=0,
    )  # fmt: skip
    axes.set_xscale("log")
    plain_log_ticks(axes, y=False)
    axes.set_xlabel("device-hours of training (ranks x hours)")
    axes.set_ylabel("test average (points)")
    handles = [Line2D([], [], color=style(i)[0], marker=style(i)[1], linestyle="none") for i in range(len(labels))]
    legend(figure, axes, [*handles, Line2D([], [], color="#555555")], [*labels, "Pareto front"])
    notes = [f"devices: {kinds_of(own)}", "on the front: " + ", ".join(own[index].name for index in front)]
    return Picture("pareto_front", "Quality against device-hours", figure, notes)


def kinds_of(rows: Sequence[Row]) -> str:
    """The devices of some runs."""
    return ", ".join(sorted({row.device for row in rows}))


def new_figure(width: float = SIZE[0]) -> tuple[Figure, Axes]:
    """An empty figure that lays itself out."""
    figure = Figure(figsize=(width, SIZE[1]), layout="constrained")
    axes = figure.add_subplot()
    axes.grid(True, which="major", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure, axes


def legend(figure: Figure, axes: Axes, handles: list[Line2D], labels: list[str]) -> None:
    """The legend, beside the axes: it covers nothing."""
    figure.legend(handles, labels, loc="outside right upper", frameon=False, fontsize=8)


def style(index: int) -> tuple[str, str]:
    """Colour and marker of a group; beyond the palette the pairs change."""
    return COLOURS[index % len(COLOURS)], MARKERS[(index + index // len(COLOURS)) % len(MARKERS)]


def offset_of(index: int, count: int) -> float:
    """Factor that sets groups of the same size beside each other on a logarithmic axis."""
    return 1.0 if count < 2 else 1.06 ** (index - (count - 1) / 2)


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
    """The y axis around the points and curves: a wide band is cut off and must not squeeze them together."""
    low, high = min(values), max(values)
    margin = max((high / low) ** 0.12, 1.02)
    axes.set_ylim(low / margin, high * margin)


def short(value: float) -> str:
    """1200000 -> 1.2M."""
    for limit, letter in ((1e15, ""), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value:.2g}" if not letter else f"{value / limit:.4g}{letter}"
    return f"{value:.3g}"
