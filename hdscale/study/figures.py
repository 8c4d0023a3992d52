"""Pictures of a study's report: scaling curves with fits, the plan beside measurements, methods, the Pareto front."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from hdscale.report.palette import GREY, style
from hdscale.report.pictures import SIZE, Picture, fit_limits, legend, new_figure, plain_log_ticks
from hdscale.study.fits import Fit, FitRefused, fit_power_law
from hdscale.study.rows import RunRow, pareto, splits_of

EXTRAPOLATE = 4.0
"""A fit is drawn to this multiple of the largest x, dashed beyond what was measured."""


@dataclass(frozen=True)
class Quantity:
    """Something that a row has: its name, the label of its axis, its symbol in formulas, and how to read it."""

    name: str
    label: str
    symbol: str
    read: Callable[[RunRow], float | None]


PARAMETERS = Quantity("model size", "parameters of the base", "N", lambda row: row.parameters)
TRAINABLE = Quantity("trainables", "trainable parameters", "n", lambda row: row.trainable)
SAMPLES = Quantity("data", "training rows seen", "D", lambda row: row.samples)
FLOPS = Quantity("compute", "training compute (FLOP)", "C", lambda row: row.flops)
TASKS = Quantity("number of tasks", "tasks", "k", lambda row: row.tasks)
COMMON = Quantity(
    "error on common tasks", "{split} error on the tasks of all runs (points)", "e", lambda row: row.common_error
)
LOSS = Quantity("loss", "training loss at the end (nats per token)", "L", lambda row: row.loss)
ERROR = Quantity("error", "{split} error, 100 - average score (points)", "e", lambda row: row.error)


@dataclass(frozen=True)
class Planned:
    """Something that is measured and that the plan predicts.

    Attributes:
        name: of the quantity. label: of the axis. column: of the picture's file.
        measured, planned: read it from a row.
    """

    name: str
    label: str
    column: str
    measured: Callable[[RunRow], float | None]
    planned: Callable[[RunRow], float | None]


THROUGHPUT = Planned(
    "throughput",
    "training throughput (rows per second, all ranks)",
    "samples_per_second",
    lambda row: row.samples_per_second,
    lambda row: row.planned_samples_per_second,
)
MEMORY = Planned(
    "memory",
    "memory per rank (GB)",
    "memory_gb",
    lambda row: row.memory_gb,
    lambda row: row.planned_memory_gb,
)


def scaling(rows: Sequence[RunRow], x: Quantity, y: Quantity, group: Callable[[RunRow], str]) -> Picture | None:
    """y against x on logarithmic axes, one colour per group, with a power law where a group has enough points for it.

    Returns:
        None where x does not vary or nothing has both.
    """
    points = [(row, a, b) for row in rows if (a := x.read(row)) and (b := y.read(row)) and a > 0 and b > 0]
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
    axes.set_ylabel(y.label.format(split=splits_of([row for row, _, _ in points])))
    handles = [Line2D([], [], color=style(i)[0], marker=style(i)[1], linestyle="none") for i in range(len(labels))]
    drawn = [note for note in notes if "no fit" not in note]
    if drawn:
        handles += [Line2D([], [], color=GREY), Line2D([], [], color=GREY, linestyle="--")]
        labels += ["fit with its 95% band", "extrapolation"]
    legend(figure, handles, labels)
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


def against_plan(rows: Sequence[RunRow], quantity: Planned, group: Callable[[RunRow], str]) -> Picture | None:
    """A measured quantity against model size, filled, with the plan's prediction, hollow."""
    points = [
        (row, value, quantity.planned(row)) for row in rows if (value := quantity.measured(row)) and row.parameters > 0
    ]
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
    axes.set_ylabel(quantity.label)
    handles = [Line2D([], [], color=style(i)[0], marker=style(i)[1], linestyle="none") for i in range(len(labels))]
    notes = []
    if not ratios:
        notes.append(f"no prediction beside it: the plan has no figures for {kinds_of(rows)}")
    if ratios:
        handles.append(Line2D([], [], color=GREY, marker="o", markerfacecolor="none", linestyle=":"))
        labels.append("plan")
        notes.append(
            f"measured over planned: {min(ratios):.2f} to {max(ratios):.2f}, median {float(np.median(ratios)):.2f}"
        )
    legend(figure, handles, labels)
    return Picture(
        f"{quantity.column}_by_model_size", f"{quantity.name.capitalize()} against model size", figure, notes
    )


def side_by_side(
    rows: Sequence[RunRow], size: Callable[[RunRow], str], method: Callable[[RunRow], str]
) -> Picture | None:
    """Test scores of the methods beside each other, grouped by size: each run is a point, their mean a bar."""
    own = [(row, row.average) for row in rows if row.average is not None]
    sizes = list(dict.fromkeys(size(row) for row, _ in sorted(own, key=lambda pair: pair[0].parameters)))
    methods = list(dict.fromkeys(method(row) for row, _ in own))
    if len(methods) < 2:
        return None
    figure, axes = new_figure(width=max(SIZE[0], 1.2 * len(sizes) + 3))
    width = 0.8 / len(methods)
    notes = []
    for index, name in enumerate(methods):
        colour, marker = style(index)
        for place, one in enumerate(sizes):
            values = [score for row, score in own if size(row) == one and method(row) == name]
            if not values:
                continue
            x = place + (index - (len(methods) - 1) / 2) * width
            mean = float(np.mean(values))
            axes.plot([x - 0.4 * width, x + 0.4 * width], [mean, mean], color=colour, linewidth=2.5)
            axes.plot([x] * len(values), values, marker, color=colour, markersize=5, alpha=0.6, linestyle="none")
        percents = [row.percent for row, _ in own if method(row) == name]
        notes.append(f"{name}: {min(percents):.3g}% to {max(percents):.3g}% trainable")
    axes.set_xticks(range(len(sizes)), sizes, rotation=0 if len("".join(sizes)) < 70 else 20)
    axes.set_xlim(-0.6, len(sizes) - 0.4)
    axes.set_xlabel("size of the base")
    axes.set_ylabel(f"{splits_of(rows)} average (points)")
    handles = [Line2D([], [], color=style(i)[0], marker=style(i)[1]) for i in range(len(methods))]
    legend(figure, handles, [*methods])
    return Picture("methods_side_by_side", "Methods side by side", figure, notes)


def pareto_front(rows: Sequence[RunRow], group: Callable[[RunRow], str]) -> Picture | None:
    """Test scores against device-hours, and the runs that no other beats in both."""
    own = [(row, row.average) for row in rows if row.average is not None and row.device_hours > 0]
    if len(own) < 2:
        return None
    figure, axes = new_figure()
    labels = list(dict.fromkeys(group(row) for row, _ in own))
    for index, name in enumerate(labels):
        members = [(row.device_hours, score) for row, score in own if group(row) == name]
        colour, marker = style(index)
        axes.plot(
            [hours for hours, _ in members], [score for _, score in members], marker,
            color=colour, markersize=6, alpha=0.75, linestyle="none",
        )  # fmt: skip
    front = pareto([row.device_hours for row, _ in own], [score for _, score in own])
    axes.step(
        [own[i][0].device_hours for i in front], [own[i][1] for i in front],
        where="post", color=GREY, linewidth=1.2, zorder=0,
    )  # fmt: skip
    axes.set_xscale("log")
    plain_log_ticks(axes, y=False)
    axes.set_xlabel("device-hours of training (ranks x hours)")
    axes.set_ylabel(f"{splits_of(rows)} average (points)")
    handles = [Line2D([], [], color=style(i)[0], marker=style(i)[1], linestyle="none") for i in range(len(labels))]
    legend(figure, [*handles, Line2D([], [], color=GREY)], [*labels, "Pareto front"])
    notes = [
        f"devices: {kinds_of([row for row, _ in own])}",
        "on the front: " + ", ".join(own[i][0].name for i in front),
    ]
    return Picture("pareto_front", "Quality against device-hours", figure, notes)


def kinds_of(rows: Sequence[RunRow]) -> str:
    """The devices of some runs."""
    return ", ".join(sorted({row.device for row in rows}))


def offset_of(index: int, count: int) -> float:
    """Factor that sets groups of the same size beside each other on a logarithmic axis."""
    return 1.0 if count < 2 else 1.06 ** (index - (count - 1) / 2)
