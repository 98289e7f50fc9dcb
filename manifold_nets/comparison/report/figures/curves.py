"""Figures with lines: learning curves, errors over learning rates, rotation and norms."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from manifold_nets.comparison.report.figures.style import (
    Look,
    Size,
    error_axis,
    finite,
    look,
    name_rows,
    rate_axis,
    short_name,
    strict_median,
)
from manifold_nets.comparison.report.summary import ContestantSummary, LayerTrace, Summary

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["draw_layers", "draw_learning_curves", "draw_sensitivity", "shown_layers"]

MOST_LAYERS = 4
# Contestants that pass over the data this many times as often as others are drawn on a logarithmic axis with them.
MANY_PASSES = 3.0


def new_figure(size: Size, height: float) -> Figure:
    """An empty figure."""
    from matplotlib.figure import Figure

    return Figure(figsize=(size.width, height), layout="constrained")


def _legend(figure: Figure, axes: Any, size: Size) -> None:
    handles, labels = axes.get_legend_handles_labels()
    longest = max(map(len, labels), default=1)
    columns = max(1, int((size.width * 72 / size.font) / (0.62 * longest + 6.5)))
    rows = math.ceil(len(labels) / columns)
    figure.legend(handles, labels, loc="outside lower center", ncols=math.ceil(len(labels) / max(rows, 1)))


# ---- learning curves -------------------------------------------------------------------------------------------------


def draw_learning_curves(summary: Summary, size: Size) -> Figure:
    """Training loss and validation error over epochs: the median over the seeds, and a band over all of them."""
    figure = new_figure(size, 7.2 if size.narrow else 4.0)
    left, right = figure.subplots(2, 1) if size.narrow else figure.subplots(1, 2)
    for axes, title, which, scale in (
        (left, "Training loss", "losses", 1.0),
        (right, summary.unit.label("Validation error"), "errors", summary.unit.scale),
    ):
        runs = [getattr(contestant, which) for contestant in summary.contestants]
        every = finite(value for curves in runs for curve in curves for value in curve)
        error_axis(axes, "y", every, scale=scale)
        for i, (contestant, curves) in enumerate(zip(summary.contestants, runs, strict=True)):
            _curve(axes, i, len(runs), contestant, curves)
        axes.set_title(title)
        _epochs(axes, summary)
        if every:
            _limits(axes, every)
    _legend(figure, left, size)
    return figure


def _by(summary: Summary) -> str:
    """The name of the horizontal axis: epochs, unless some contestants pass over the data more often than that."""
    plain = all(c.passes == tuple(range(1, len(c.passes) + 1)) for c in summary.contestants)
    return "epoch" if plain else "passes over the data"


def _epochs(axes: Any, summary: Summary) -> None:
    """The horizontal axis of passes: logarithmic where some contestants make many more than others in their epochs."""
    last = [c.passes[-1] for c in summary.contestants if c.passes] or [1.0]
    count = max(last)
    if count >= MANY_PASSES * min(last):
        axes.set_xscale("log")
        axes.set_xlim(0.9, 1.1 * count)
        power = [digit * 10**exponent for exponent in range(9) for digit in (1, 2, 5)]
        axes.set_xticks([tick for tick in power if tick <= count], minor=False)
        axes.set_xticks([], minor=True)
        axes.set_xticklabels([f"{tick}" for tick in power if tick <= count])
    else:
        axes.set_xticks(_epoch_ticks(math.ceil(count)))
        axes.set_xlim(1 - 0.03 * count, count + 0.03 * count)
    axes.set_xlabel(_by(summary))


def _epoch_ticks(count: int) -> list[int]:
    """The first epoch, and round numbers up to the last."""
    step = next(10**power * digit for power in range(9) for digit in (1, 2, 5) if count / (10**power * digit) <= 6)
    return sorted({1, *range(step, count + 1, step)} - ({step} if step == 2 else set()))


def _limits(axes: Any, values: Sequence[float]) -> None:
    low, high = min(values), max(values)
    if axes.get_yscale() == "log":
        axes.set_ylim(low / 1.2, high * 1.2)
    elif high > low:
        axes.set_ylim(max(0.0, low - 0.05 * (high - low)) if low >= 0 else low, high + 0.05 * (high - low))


def _curve(axes: Any, place: int, of: int, contestant: ContestantSummary, curves: Sequence[Sequence[float]]) -> None:
    style = look(place)
    steps = list(zip(*curves, strict=True))
    epochs = contestant.passes[: len(steps)]
    middle = [strict_median(step) for step in steps]
    low = [min(finite(step), default=math.nan) for step in steps]
    high = [max(finite(step), default=math.nan) for step in steps]
    if len(curves) > 1:
        axes.fill_between(epochs, low, high, color=style.colour, alpha=0.14, linewidth=0)
    known = [value if math.isfinite(value) else math.nan for value in middle]
    every = max(1, len(steps) // 6)
    (line,) = axes.plot(
        epochs,
        known,
        color=style.colour,
        marker=style.marker,
        linestyle=style.line,
        markevery=(place * every // max(of, 1) % every, every),
        label=_named(contestant),
    )
    line.set_gid(f"series-{place}")
    last = next((i for i, value in enumerate(middle) if not math.isfinite(value)), None)
    if last:  # most runs are lost from here on
        axes.plot(
            [epochs[last - 1]], [known[last - 1]], color=style.colour, marker="x", markersize=9, markeredgewidth=2
        )


def _named(contestant: ContestantSummary) -> str:
    lost = contestant.test.lost
    name = short_name(contestant.name)
    return f"{name}, ✕ {lost} of {len(contestant.seeds)}" if lost else name


# ---- learning rates --------------------------------------------------------------------------------------------------


def draw_sensitivity(summary: Summary, size: Size) -> Figure:
    """Validation error over the learning rates, and below it the good part of the grid of each contestant."""
    rows = len(summary.contestants)
    share = 0.3 if size.narrow else 0.24
    figure = new_figure(size, 3.4 + share * rows + 1.2)
    upper, lower = figure.subplots(2, 1, height_ratios=[3.0, share * rows + 0.3], sharex=True)
    every = [e for c in summary.contestants for e in (*c.sensitivity.errors, *c.sensitivity.survivor_errors)]
    error_axis(upper, "y", every, scale=summary.unit.scale)
    for i, contestant in enumerate(summary.contestants):
        _rates(upper, i, contestant)
        _range(lower, i, contestant)
    rate_axis(lower, [rate for c in summary.contestants for rate in c.sensitivity.rates])
    name_rows(lower, [contestant.name for contestant in summary.contestants])
    upper.set_title(summary.unit.label("Validation error"))
    upper.tick_params(axis="x", labelbottom=False)
    tolerance = summary.contestants[0].sensitivity.tolerance if summary.contestants else 0.1
    lower.set_title(f"Learning rates within {100 * tolerance:g} % of the best")
    lower.set_xlabel("learning rate")
    _legend(figure, upper, size)
    return figure


def _rates(axes: Any, place: int, contestant: ContestantSummary) -> None:
    found, style = contestant.sensitivity, look(place)
    whole = [error if math.isfinite(error) else math.nan for error in found.errors]
    (line,) = axes.plot(
        found.rates,
        whole,
        color=style.colour,
        marker=style.marker,
        linestyle=style.line,
        label=short_name(contestant.name),
    )
    line.set_gid(f"series-{place}")
    partial = [
        (rate, mean)
        for rate, mean, lost in zip(found.rates, found.survivor_errors, found.diverged, strict=True)
        if lost and math.isfinite(mean)
    ]
    if partial:  # a mean over survivors only: hollow, and on no line
        axes.plot(
            *zip(*partial, strict=True),
            color=style.colour,
            marker=style.marker,
            markerfacecolor="none",
            linestyle="none",
        )


def _range(axes: Any, place: int, contestant: ContestantSummary) -> None:
    found, style = contestant.sensitivity, look(place)
    if math.isfinite(found.best_rate):
        axes.plot(
            [found.low, found.high], [place, place], color=style.colour, linewidth=5, alpha=0.45, solid_capstyle="butt"
        )
        axes.plot([found.best_rate], [place], color=style.colour, marker=style.marker, markersize=7)
    lost = [rate for rate, count in zip(found.rates, found.diverged, strict=True) if count]
    axes.plot(lost, [place] * len(lost), color=style.colour, marker="x", linestyle="none", markeredgewidth=1.6)


# ---- layers ----------------------------------------------------------------------------------------------------------


def shown_layers(summary: Summary) -> list[str]:
    """The layers that there is room for: all, or some from the first to the last."""
    names = list(dict.fromkeys(layer.name for c in summary.contestants for layer in c.layers))
    if len(names) <= MOST_LAYERS:
        return names
    return [names[round(i * (len(names) - 1) / (MOST_LAYERS - 1))] for i in range(MOST_LAYERS)]


def draw_layers(summary: Summary, size: Size) -> Figure:
    """Rotation a step and norm of the filters of each layer over epochs."""
    names = shown_layers(summary)
    if size.narrow:
        figure = new_figure(size, 2.3 * 2 * len(names) + 0.8)
        grid = figure.subplots(2 * len(names), 1, squeeze=False)[:, 0].reshape(len(names), 2).T
    else:
        figure = new_figure(size, 5.2)
        grid = figure.subplots(2, len(names), squeeze=False)
    for column, name in enumerate(names):
        for row, which in enumerate(("rotation", "norm")):
            axes = grid[row, column]
            _layer(axes, summary, name, which)
            what = "rotation a step (rad)" if which == "rotation" else "norm of filters"
            axes.set_title(f"{short_name(name)}: {what}" if size.narrow or not row else what)
            if not size.narrow and not row:
                axes.set_title(f"{short_name(name)}\n{what}")
    _legend(figure, grid[0, 0], size)
    return figure


def _layer(axes: Any, summary: Summary, name: str, which: str) -> None:
    found: list[tuple[int, LayerTrace]] = [
        (i, layer) for i, c in enumerate(summary.contestants) for layer in c.layers if layer.name == name
    ]
    every = finite(value for _, layer in found for value in getattr(layer, which))
    error_axis(axes, "y", every)
    for place, layer in found:
        style: Look = look(place)
        values = [v if math.isfinite(v) else math.nan for v in getattr(layer, which)]
        step = max(1, len(values) // 4)
        axes.plot(
            summary.contestants[place].passes[: len(values)],
            values,
            color=style.colour,
            marker=style.marker,
            linestyle=style.line,
            markevery=(place % step, step),
            label=short_name(summary.contestants[place].name),
        )
    _epochs(axes, summary)
