"""The figures of a report, each with its title, its caption, and a condition for being shown."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from manifold_nets.comparison.measures import first_at
from manifold_nets.comparison.report import style
from manifold_nets.comparison.report.style import INK, Size, finite, look, mark, panels, short_name
from manifold_nets.comparison.report.summary import OptimizerSummary, Summary

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_LAYERS = 4
_STEP, _CLIQUE_STEP = 0.30, 0.16


@dataclass(frozen=True)
class Drawing:
    """One figure.

    Args:
        name: name of its files and its anchor.
        title: its heading.
        draw: draws it.
        caption: its caption, as plain text.
        has_data: whether a summary has data for it.
    """

    name: str
    title: str
    draw: Callable[[Summary, Size], Figure]
    caption: Callable[[Summary], str]
    has_data: Callable[[Summary], bool] = lambda _: True


def _row_height(summary: Summary, size: Size) -> float:
    return (0.42 if size.narrow else 0.34) * len(summary.optimizers) + 0.9


def _rows(summary: Summary, size: Size, label: str, *, more: float = 0.0) -> tuple[Figure, Any]:
    """A figure of a row per optimizer, and its axes."""
    figure = style.new_figure(size, _row_height(summary, size) + more)
    axes = figure.subplots()
    axes.set_xlabel(label)
    style.name_rows(axes, [o.name for o in summary.optimizers])
    return figure, axes


def _draw_test_errors(summary: Summary, size: Size) -> Figure:
    """Test error of every run, and the mean with its confidence interval."""
    figure, axes = _rows(summary, size, summary.unit.label("test error"))
    every = finite(error for o in summary.optimizers for error in o.test_errors)
    style.error_axis(axes, "x", every, scale=summary.unit.scale)
    for i, o in enumerate(summary.optimizers):
        style.strokes(axes, o.test_errors, i)
        if o.test.count > 1:
            # Errors are not negative, even if the interval is.
            low = max(o.test.low, 0.0 if axes.get_xscale() == "linear" else min(every) / 3)
            axes.plot([low, o.test.high], [i - 0.1, i - 0.1], color=look(i)["color"], linewidth=2)
        mark(axes, o.test.value, i - 0.1, i, markersize=8).set_gid(f"series-{i}")
        if o.test.lost:
            why = "not finite" if o.not_finite else "diverged"
            style.note_beside(axes, i, f"✕ {o.test.lost} of {len(o.seeds)} {why}")
    return figure


def _draw_target(summary: Summary, size: Size) -> Figure:
    """Passes over the data and seconds until each run first reaches the target."""
    height = _row_height(summary, size)
    figure, (left, right) = panels(size, 2 * height if size.narrow else height, sharey=not size.narrow)
    for axes, label, which in ((left, "passes over the data", "passes"), (right, "seconds of training", "seconds")):
        costs = [o.seconds if which == "seconds" else (o.passes,) * len(o.errors) for o in summary.optimizers]
        spent = [
            [first_at(run, cost, summary.target) for run, cost in zip(o.errors, each, strict=True)]
            for o, each in zip(summary.optimizers, costs, strict=True)
        ]
        style.error_axis(axes, "x", [value for values in spent for value in values])
        for i, (o, values) in enumerate(zip(summary.optimizers, spent, strict=True)):
            style.strokes(axes, values, i)
            if math.isfinite(getattr(o.reach, which)):
                mark(axes, getattr(o.reach, which), i - 0.1, i, markersize=8)
            if (size.narrow or axes is right) and o.reach.reached < o.reach.runs:
                style.note_beside(axes, i, f"✕ {o.reach.runs - o.reach.reached} of {o.reach.runs} never")
        axes.set_xlabel(label)
        style.name_rows(axes, [o.name for o in summary.optimizers])
    right.tick_params(axis="y", labelleft=size.narrow)
    return figure


def _draw_rescaled(summary: Summary, size: Size) -> Figure:
    """Mean validation error from plain initial filters, and from rescaled ones at the same learning rate."""
    label = f"{summary.unit.label('mean validation error')}; hollow: rescaled start"
    figure, axes = _rows(summary, size, label, more=0.3)
    both = [(i, o.rescaled) for i, o in enumerate(summary.optimizers) if o.rescaled is not None]
    values = [value for _, found in both for value in (found.plain.value, found.same_rate.value)]
    style.error_axis(axes, "x", values, scale=summary.unit.scale)
    for i, found in both:
        plain, same = found.plain.value, found.same_rate
        axes.plot([plain, same.value], [i, i], color=look(i)["color"], linewidth=1.2)
        mark(axes, plain, i, i, markersize=7)
        mark(axes, same.value, i, i, markersize=11, markerfacecolor="none", markeredgewidth=1.5)
        if same.lost:
            style.note_beside(axes, i, f"✕ {same.lost} of {same.lost + same.count} diverged")
    return figure


def _draw_learning_curves(summary: Summary, size: Size) -> Figure:
    """Training loss and validation error over epochs: the median over the seeds, and a band over all of them."""
    figure, (left, right) = panels(size, 7.2 if size.narrow else 4.0)
    error = summary.unit.label("Validation error"), "errors", summary.unit.scale
    for axes, (title, which, scale) in ((left, ("Training loss", "losses", 1.0)), (right, error)):
        every = finite(value for o in summary.optimizers for run in getattr(o, which) for value in run)
        style.error_axis(axes, "y", every, scale=scale)
        for i, o in enumerate(summary.optimizers):
            _curve(axes, i, len(summary.optimizers), o, getattr(o, which))
        axes.set_title(title)
        style.passes_axis(axes, [o.passes for o in summary.optimizers])
        if every:
            low, high = min(every), max(every)
            if axes.get_yscale() == "log":
                axes.set_ylim(low / 1.2, high * 1.2)
            elif high > low:
                margin = 0.05 * (high - low)
                axes.set_ylim(max(0.0, low - margin) if low >= 0 else low, high + margin)
    style.legend(figure, left, size)
    return figure


def _curve(axes: Any, place: int, count: int, o: OptimizerSummary, runs: Sequence[Sequence[float]]) -> None:
    steps = list(zip(*runs, strict=True))
    epochs, median = o.passes[: len(steps)], [style.strict_median(step) for step in steps]
    if len(runs) > 1:
        low, high = ([pick(finite(step), default=math.nan) for step in steps] for pick in (min, max))
        axes.fill_between(epochs, low, high, color=look(place)["color"], alpha=0.14, linewidth=0)
    known = style.with_gaps(median)
    every = max(1, len(steps) // 6)
    lost = f", ✕ {o.test.lost} of {len(o.seeds)}" if o.test.lost else ""
    marked = (place * every // max(count, 1) % every, every)
    (line,) = axes.plot(epochs, known, **look(place), markevery=marked, label=f"{short_name(o.name)}{lost}")
    line.set_gid(f"series-{place}")
    last = next((i for i, value in enumerate(median) if not math.isfinite(value)), None)
    if last:  # most runs are lost from here on
        mark(axes, epochs[last - 1], known[last - 1], place, marker="x", markersize=9, markeredgewidth=2)


def _draw_sensitivity(summary: Summary, size: Size) -> Figure:
    """Validation error over the learning rates, and below it the good part of the grid of each optimizer."""
    rows, share = len(summary.optimizers), 0.3 if size.narrow else 0.24
    figure = style.new_figure(size, 3.4 + share * rows + 1.2)
    upper, lower = figure.subplots(2, 1, height_ratios=[3.0, share * rows + 0.3], sharex=True)
    grids = [o.sensitivity for o in summary.optimizers]
    every = [error for grid in grids for error in (*grid.errors, *grid.survivor_errors)]
    style.error_axis(upper, "y", every, scale=summary.unit.scale)
    for i, (o, grid) in enumerate(zip(summary.optimizers, grids, strict=True)):
        (line,) = upper.plot(grid.rates, style.with_gaps(grid.errors), **look(i), label=short_name(o.name))
        line.set_gid(f"series-{i}")
        for rate, mean, lost in zip(grid.rates, grid.survivor_errors, grid.diverged, strict=True):
            if lost and math.isfinite(mean):  # a mean over survivors only: hollow, and on no line
                mark(upper, rate, mean, i, markerfacecolor="none")
            if lost:
                mark(lower, rate, i, i, marker="x", markeredgewidth=1.6)
        if math.isfinite(grid.best_rate):
            color = look(i)["color"]
            lower.plot([grid.low, grid.high], [i, i], color=color, linewidth=5, alpha=0.45, solid_capstyle="butt")
            mark(lower, grid.best_rate, i, i, markersize=7)
    style.rate_axis(lower, [rate for grid in grids for rate in grid.rates])
    style.name_rows(lower, [o.name for o in summary.optimizers])
    upper.set_title(summary.unit.label("Validation error"))
    upper.tick_params(axis="x", labelbottom=False)
    lower.set_title(f"Learning rates within {100 * grids[0].tolerance:g} % of the best")
    lower.set_xlabel("learning rate")
    style.legend(figure, upper, size)
    return figure


def _shown_layers(summary: Summary) -> list[str]:
    """The layers that fit in the figure: all, or a selection from first to last."""
    names = list(dict.fromkeys(layer.name for o in summary.optimizers for layer in o.layers))
    if len(names) <= MOST_LAYERS:
        return names
    return [names[round(i * (len(names) - 1) / (MOST_LAYERS - 1))] for i in range(MOST_LAYERS)]


def _draw_layers(summary: Summary, size: Size) -> Figure:
    """Rotation per step and norm of the filters of each layer over epochs."""
    names = _shown_layers(summary)
    figure = style.new_figure(size, 4.6 * len(names) + 0.8 if size.narrow else 5.2)
    if size.narrow:
        grid = figure.subplots(2 * len(names), 1, squeeze=False)[:, 0].reshape(len(names), 2).T
    else:
        grid = figure.subplots(2, len(names), squeeze=False)
    for column, name in enumerate(names):
        for row, (which, what) in enumerate((("rotation", "rotation per step (rad)"), ("norm", "norm of filters"))):
            axes = grid[row, column]
            _layer(axes, summary, name, which)
            above = f"{short_name(name)}: " if size.narrow else "" if row else f"{short_name(name)}\n"
            axes.set_title(f"{above}{what}")
    style.legend(figure, grid[0, 0], size)
    return figure


def _layer(axes: Any, summary: Summary, name: str, which: str) -> None:
    every = [(i, o, layer) for i, o in enumerate(summary.optimizers) for layer in o.layers]
    traces = [(i, o, getattr(layer, which)) for i, o, layer in every if layer.name == name]
    style.error_axis(axes, "y", [value for *_, values in traces for value in values])
    for i, o, values in traces:
        step, known = max(1, len(values) // 4), style.with_gaps(values)
        axes.plot(o.passes[: len(values)], known, **look(i), markevery=(i % step, step), label=short_name(o.name))
    style.passes_axis(axes, [o.passes for o in summary.optimizers])


def _draw_ranks(summary: Summary, size: Size) -> Figure:
    """Mean ranks on a line, best at the left; bars join optimizers that the test cannot distinguish."""
    ranks = summary.friedman.mean_ranks if summary.friedman is not None else ()
    order = sorted(range(len(ranks)), key=lambda i: (ranks[i], i))
    return _rank_rows(summary, size, ranks, order) if size.narrow else _rank_line(summary, size, ranks, order)


def _rank_line(summary: Summary, size: Size, ranks: Sequence[float], order: Sequence[int]) -> Figure:
    """Demšar's diagram: names at both sides, with lines to their ranks on a scale."""
    count, names = len(ranks), [short_name(o.name) for o in summary.optimizers]
    half, first = (count + 1) // 2, 0.28 + _CLIQUE_STEP * len(summary.cliques)
    # One unit of the vertical axis is an inch, so that lines of text keep their distance.
    above, below = 0.75, first + _STEP * half
    figure = style.new_figure(size, above + below)
    figure.set_layout_engine("none")
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    axes.axis("off")
    letters = 0.62 * size.font / 72 * max(map(len, names)) + 0.35
    scale = (count - 1) / max(size.width - 2 * letters, 0.5)
    axes.set_xlim(1 - letters * scale, count + letters * scale)
    axes.set_ylim(-below, above)
    axes.plot([1, count], [0, 0], color=INK, linewidth=1)
    for rank in range(1, count + 1):
        axes.plot([rank, rank], [0, 0.08], color=INK, linewidth=1)
        axes.text(rank, 0.13, str(rank), ha="center", va="bottom", fontsize=0.92 * size.font)
    width = summary.critical_difference
    axes.plot([1, 1 + min(width, count - 1.0)], [0.48, 0.48], color=INK, linewidth=2)
    axes.text(1, 0.55, f"critical difference {width:.2f}", ha="left", va="bottom")
    for row, clique in enumerate(summary.cliques):
        ends, y = (ranks[clique[0]] - 0.04, ranks[clique[-1]] + 0.04), -0.14 - _CLIQUE_STEP * row
        axes.plot(ends, [y, y], color=INK, linewidth=4, solid_capstyle="round")
    for position, i in enumerate(order):
        left = position < half
        y = -first - _STEP * (position if left else count - 1 - position)
        outside = -scale if left else scale
        end = (1 if left else count) + 0.12 * outside
        axes.plot([ranks[i], ranks[i], end], [0, y, y], color=look(i)["color"], linewidth=1.3)
        mark(axes, ranks[i], 0, i, markersize=6)
        axes.text(end + 0.08 * outside, y, names[i], ha="right" if left else "left", va="center")
    return figure


def _rank_rows(summary: Summary, size: Size, ranks: Sequence[float], order: Sequence[int]) -> Figure:
    """The same for a narrow page: one row per optimizer, and vertical bars beside optimizers that do not differ."""
    from matplotlib import ticker

    figure = style.new_figure(size, 0.42 * len(ranks) + 1.3)
    axes = figure.subplots()
    for row, i in enumerate(order):
        mark(axes, ranks[i], row, i, markersize=8)
    style.name_rows(axes, [summary.optimizers[i].name for i in order])
    axes.set_xlim(0.7, len(ranks) + 0.3)
    axes.xaxis.set_major_locator(ticker.MaxNLocator(6, integer=True))
    beside: dict[str, Any] = {"transform": axes.get_yaxis_transform(), "clip_on": False}
    for column, clique in enumerate(summary.cliques):
        rows, x = [order.index(i) for i in clique], 1.03 + 0.045 * column
        ends = [min(rows) - 0.25, max(rows) + 0.25]
        axes.plot([x, x], ends, color=INK, linewidth=4, solid_capstyle="round", **beside)
    axes.set_xlabel(f"mean rank; critical difference {summary.critical_difference:.2f}")
    return figure


def _layers_caption(summary: Summary) -> str:
    names, shown = {layer.name for o in summary.optimizers for layer in o.layers}, _shown_layers(summary)
    some = f" {len(shown)} of {len(names)} layers are drawn; epochs.csv has all." if len(shown) < len(names) else ""
    return (
        "Rotation per step and norm of the filters of each layer: medians over the seeds. "
        f"On spheres the norm is constant.{some}"
    )


def _ranks_caption(summary: Summary) -> str:
    if summary.friedman is None:
        return ""
    return (
        f"Mean ranks of the test errors over {summary.friedman.blocks} seeds, best at the left; diverged runs rank "
        "last. The ranks of optimizers joined by a bar do not differ at the 5 % level (Nemenyi test). Friedman test: "
        f"p = {summary.friedman.p_value:.2g}. Ranks over the seeds of one task do not carry over to other tasks."
    )


_TEST_ERRORS = (
    "Each stroke is a seed. The mark is the mean, and its line Student's 95 % interval. Diverged runs are left out of "
    "the mean, and the row shows how many there are."
)
_CURVES = (
    "Lines are medians over the seeds, with diverged runs counted as infinite; bands reach from the best to the worst "
    "seed that has not diverged. ✕ in the legend counts diverged runs. A cross ends a line where half of the runs "
    "have diverged."
)
_SENSITIVITY = (
    "Means over the seeds at the end of training. A hollow mark, off the line, is a mean over the runs that did not "
    "diverge; a cross below marks a rate at which runs diverged. The bars show the learning rates whose error, "
    "interpolated between those tried, is within 10 % of the best."
)
_RESCALED = (
    "The hollow mark is the mean validation error after every scale-invariant filter was multiplied at the start by a "
    "random power of ten between 10⁻² and 10². This does not change the initial function. The learning rate is the one "
    "chosen without rescaling."
)


def _target_caption(summary: Summary) -> str:
    return (
        f"When the validation error first reaches {summary.unit.short(summary.target)}. Each stroke is a seed, the "
        "mark their median, with runs that never reach it counted as infinite."
    )


FIGURES = (
    Drawing("test-error", "Test error", _draw_test_errors, lambda _: _TEST_ERRORS),
    Drawing(
        "critical-differences",
        "Critical differences",
        _draw_ranks,
        _ranks_caption,
        lambda summary: summary.friedman is not None and math.isfinite(summary.critical_difference),
    ),
    Drawing("learning-curves", "Learning curves", _draw_learning_curves, lambda _: _CURVES),
    Drawing("sensitivity", "Sensitivity to the learning rate", _draw_sensitivity, lambda _: _SENSITIVITY),
    Drawing("target", "Time to a target", _draw_target, _target_caption, lambda s: math.isfinite(s.target)),
    Drawing(
        "rescaled",
        "Sensitivity to the initial scale",
        _draw_rescaled,
        lambda _: _RESCALED,
        lambda summary: any(o.rescaled is not None for o in summary.optimizers),
    ),
    Drawing("layers", "Rotation and norms", _draw_layers, _layers_caption, lambda s: bool(_shown_layers(s))),
)
