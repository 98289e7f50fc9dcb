"""Figures with one row a contestant: test errors, time to a target, rescaled initial filters."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from manifold_nets.comparison.measures import first_epoch_at
from manifold_nets.comparison.report.figures.curves import new_figure
from manifold_nets.comparison.report.figures.style import Size, error_axis, finite, look, name_rows
from manifold_nets.comparison.report.summary import ContestantSummary, Summary
from manifold_nets.comparison.statistics import mean_interval

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
    error_axis(axes, "x", every, scale=100.0)
    for i, contestant in enumerate(summary.contestants):
        style, test = look(i), contestant.test
        shown = finite(contestant.test_errors)
        axes.plot(shown, [i + 0.2] * len(shown), color=style.colour, marker="|", markersize=9, linestyle="none")
        if test.count > 1:
            low = test.low if axes.get_xscale() == "linear" else max(test.low, min(every) / 3)
            axes.plot([low, test.high], [i - 0.1, i - 0.1], color=style.colour, linewidth=2)
        (mean,) = axes.plot([test.value], [i - 0.1], color=style.colour, marker=style.marker, markersize=8)
        mean.set_gid(f"series-{i}")
        if test.lost:
            _beside(axes, i, f"✕ {test.lost} of {len(contestant.seeds)} diverged")
    name_rows(axes, names)
    axes.set_xlabel("test error (%)")
    return figure


def draw_target(summary: Summary, size: Size) -> Figure:
    """Epochs and seconds until each run first comes to the target."""
    height = _height(summary, size)
    figure = new_figure(size, 2 * height if size.narrow else height)
    left, right = figure.subplots(2, 1) if size.narrow else figure.subplots(1, 2, sharey=True)
    for axes, label, of in ((left, "epochs", _epochs_of), (right, "seconds of training", _seconds_of)):
        shown = [of(contestant, summary.target) for contestant in summary.contestants]
        error_axis(axes, "x", [value for values in shown for value in values])
        if of is _epochs_of:
            axes.xaxis.get_major_locator().set_params(**({"integer": True} if axes.get_xscale() == "linear" else {}))
        middle = [
            contestant.reach.epochs if of is _epochs_of else contestant.reach.seconds
            for contestant in summary.contestants
        ]
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


def _epochs_of(contestant: ContestantSummary, target: float) -> list[float]:
    return [first_epoch_at(run, target) for run in contestant.errors]


def _seconds_of(contestant: ContestantSummary, target: float) -> list[float]:
    epochs = _epochs_of(contestant, target)
    return [
        times[int(epoch) - 1] if math.isfinite(epoch) else math.inf
        for epoch, times in zip(epochs, contestant.seconds, strict=True)
    ]


def draw_rescaled(summary: Summary, size: Size) -> Figure:
    """Mean test error from the initial filters as they are, and from rescaled ones."""
    figure = new_figure(size, _height(summary, size) + 0.3)
    axes = figure.subplots()
    mean: Callable[[Sequence[float]], float] = lambda errors: mean_interval(errors).value  # noqa: E731
    pairs = [(c.test.value, mean(c.rescaled_errors)) for c in summary.contestants]
    error_axis(axes, "x", [value for pair in pairs for value in pair], scale=100.0)
    for i, (contestant, (plain, rescaled)) in enumerate(zip(summary.contestants, pairs, strict=True)):
        style = look(i)
        if math.isfinite(plain) and math.isfinite(rescaled):
            axes.plot([plain, rescaled], [i, i], color=style.colour, linewidth=1.2)
        axes.plot([plain], [i], color=style.colour, marker=style.marker, markersize=8)
        axes.plot([rescaled], [i], color=style.colour, marker=style.marker, markersize=10, markerfacecolor="none")
        lost = sum(not math.isfinite(error) for error in contestant.rescaled_errors)
        if lost:
            _beside(axes, i, f"✕ {lost} of {len(contestant.rescaled_errors)} diverged")
    name_rows(axes, [contestant.name for contestant in summary.contestants])
    axes.set_xlabel("mean test error (%); hollow: rescaled start")
    return figure
