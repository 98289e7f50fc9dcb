"""Figures with one row a contestant: test errors, time to a target, rescaled initial filters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from manifold_nets.comparison.measures import first_at
from manifold_nets.comparison.report.figures.curves import new_figure
from manifold_nets.comparison.report.figures.style import Size, error_axis, finite, look, name_rows
from manifold_nets.comparison.report.summary import ContestantSummary, Summary

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["draw_rescaled", "draw_target", "draw_test_errors"]


def _height(summary: Summary, size: Size) -> float:
    return (0.42 if size.narrow else 0.34) * len(summary.contestants) + 0.9


def _beside(axes: Any, place: int, text: str) -> None:
    """A remark at the right end of a row."""
    axes.annotate(
        text,
        (1.0, place),
        xycoords=("axes fraction", "data"),
        xytext=(6, 0),
        textcoords="offset points",
        va="center",
        color="#1c1f24",
        annotation_clip=False,
    )


def draw_test_errors(summary: Summary, size: Size) -> Figure:
    """Test error of every run, and the mean with its confidence interval."""
    figure = new_figure(size, _height(summary, size))
    axes = figure.subplots()
    names = [contestant.name for contestant in summary.contestants]
    every = finite(error for contestant in summary.contestants for error in contestant.test_errors)
    error_axis(axes, "x", every, scale=summary.unit.scale)
    for i, contestant in enumerate(summary.contestants):
        style, test = look(i), contestant.test
        shown = finite(contestant.test_errors)
        axes.plot(shown, [i + 0.2] * len(shown), color=style.colour, marker="|", markersize=9, linestyle="none")
        if test.count > 1:
            # No error is negative, whatever the interval says.
            low = max(test.low, 0.0 if axes.get_xscale() == "linear" else min(every) / 3)
            axes.plot([low, test.high], [i - 0.1, i - 0.1], color=style.colour, linewidth=2)
        (mean,) = axes.plot([test.value], [i - 0.1], color=style.colour, marker=style.marker, markersize=8)
        mean.set_gid(f"series-{i}")
        if test.lost:
            why = "not finite" if contestant.not_finite else "diverged"
            _beside(axes, i, f"✕ {test.lost} of {len(contestant.seeds)} {why}")
    name_rows(axes, names)
    axes.set_xlabel(summary.unit.label("test error"))
    return figure


def draw_target(summary: Summary, size: Size) -> Figure:
    """Passes over the data and seconds until each run first comes to the target."""
    height = _height(summary, size)
    figure = new_figure(size, 2 * height if size.narrow else height)
    left, right = figure.subplots(2, 1) if size.narrow else figure.subplots(1, 2, sharey=True)
    for axes, label, which in ((left, "passes over the data", "passes"), (right, "seconds of training", "seconds")):
        shown = [_spent(contestant, summary.target, which) for contestant in summary.contestants]
        error_axis(axes, "x", [value for values in shown for value in values])
        middle = [getattr(contestant.reach, which) for contestant in summary.contestants]
        _points(axes, summary, shown, middle, remark=size.narrow or axes is right)
        axes.set_xlabel(label)
    name_rows(left, [contestant.name for contestant in summary.contestants])
    if size.narrow:
        name_rows(right, [contestant.name for contestant in summary.contestants])
    else:
        right.tick_params(axis="y", labelleft=False, length=0)
        right.spines["left"].set_visible(False)
        right.grid(visible=False, axis="y")
    return figure


def _points(
    axes: Any, summary: Summary, shown: Sequence[Sequence[float]], middle: Sequence[float], *, remark: bool
) -> None:
    for i, (contestant, values) in enumerate(zip(summary.contestants, shown, strict=True)):
        style = look(i)
        reached = finite(values)
        axes.plot(reached, [i + 0.2] * len(reached), color=style.colour, marker="|", markersize=9, linestyle="none")
        if math.isfinite(middle[i]):
            axes.plot([middle[i]], [i - 0.1], color=style.colour, marker=style.marker, markersize=8)
        if remark and contestant.reach.reached < contestant.reach.runs:
            _beside(axes, i, f"✕ {contestant.reach.runs - contestant.reach.reached} of {contestant.reach.runs} never")


def _spent(contestant: ContestantSummary, target: float, which: str) -> list[float]:
    costs = contestant.seconds if which == "seconds" else [contestant.passes] * len(contestant.errors)
    return [first_at(run, cost, target) for run, cost in zip(contestant.errors, costs, strict=True)]


def draw_rescaled(summary: Summary, size: Size) -> Figure:
    """Mean validation error from the initial filters as they are, and from rescaled ones at the same learning rate."""
    figure = new_figure(size, _height(summary, size) + 0.3)
    axes = figure.subplots()
    both = [(i, c.rescaled) for i, c in enumerate(summary.contestants) if c.rescaled is not None]
    error_axis(
        axes,
        "x",
        [v for _, found in both for v in (found.plain.value, found.same_rate.value)],
        scale=summary.unit.scale,
    )
    for i, found in both:
        style = look(i)
        axes.plot([found.plain.value, found.same_rate.value], [i, i], color=style.colour, linewidth=1.2)
        axes.plot([found.plain.value], [i], color=style.colour, marker=style.marker, markersize=7)
        axes.plot(
            [found.same_rate.value],
            [i],
            color=style.colour,
            marker=style.marker,
            markersize=11,
            markerfacecolor="none",
            markeredgewidth=1.5,
        )
        if found.same_rate.lost:
            _beside(axes, i, f"✕ {found.same_rate.lost} of {found.same_rate.lost + found.same_rate.count} diverged")
    name_rows(axes, [contestant.name for contestant in summary.contestants])
    axes.set_xlabel(f"{summary.unit.label('mean validation error')}; hollow: rescaled start")
    return figure
