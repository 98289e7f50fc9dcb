"""The diagram of critical differences."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from manifold_nets.comparison.report.figures.curves import new_figure
from manifold_nets.comparison.report.figures.style import Size, look, name_rows, short_name
from manifold_nets.comparison.report.summary import Summary

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["draw_critical_differences"]

STEP, CLIQUE_STEP = 0.30, 0.16


def draw_critical_differences(summary: Summary, size: Size) -> Figure:
    """Mean ranks on a line, the best at the left; bars join contestants that the test cannot tell apart."""
    if size.narrow:
        return _in_rows(summary, size)
    ranks = summary.friedman.mean_ranks if summary.friedman is not None else ()
    count = len(ranks)
    names = [short_name(contestant.name) for contestant in summary.contestants]
    half = (count + 1) // 2
    first = 0.28 + CLIQUE_STEP * len(summary.cliques)
    # One unit of the vertical axis is an inch, so that lines of text keep their distance.
    above, below = 0.75, first + STEP * half
    figure = new_figure(size, above + below)
    figure.set_layout_engine("none")
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    axes.axis("off")
    letters = 0.62 * size.font / 72 * max(map(len, names)) + 0.35
    scale = (count - 1) / max(size.width - 2 * letters, 0.5)
    axes.set_xlim(1 - letters * scale, count + letters * scale)
    axes.set_ylim(-below, above)
    ink = "#1c1f24"
    _scale(axes, count, ink, size)
    width = summary.critical_difference
    shown = min(width, count - 1.0)
    axes.plot([1, 1 + shown], [0.48, 0.48], color=ink, linewidth=2)
    axes.text(1, 0.55, f"critical difference {width:.2f}", ha="left", va="bottom")
    for row, clique in enumerate(summary.cliques):
        ends = ranks[clique[0]], ranks[clique[-1]]
        y = -0.14 - CLIQUE_STEP * row
        axes.plot([ends[0] - 0.04, ends[1] + 0.04], [y, y], color=ink, linewidth=4, solid_capstyle="round")
    order = sorted(range(count), key=lambda i: (ranks[i], i))
    for position, i in enumerate(order):
        left = position < half
        depth = position if left else count - 1 - position
        y, style = -first - STEP * depth, look(i)
        end = 1 - 0.12 * scale if left else count + 0.12 * scale
        axes.plot([ranks[i], ranks[i], end], [0, y, y], color=style.colour, linewidth=1.3)
        axes.plot([ranks[i]], [0], color=style.colour, marker=style.marker, markersize=6)
        shift = 0.08 * scale
        axes.text(end - shift if left else end + shift, y, names[i], ha="right" if left else "left", va="center")
    return figure


def _scale(axes: Any, count: int, ink: str, size: Size) -> None:
    axes.plot([1, count], [0, 0], color=ink, linewidth=1)
    for rank in range(1, count + 1):
        axes.plot([rank, rank], [0, 0.08], color=ink, linewidth=1)
        axes.text(rank, 0.13, str(rank), ha="center", va="bottom", fontsize=0.92 * size.font)


def _in_rows(summary: Summary, size: Size) -> Figure:
    """The same for a narrow page: one row a contestant, by rank, and upright bars beside those that belong together."""
    from matplotlib import ticker

    ranks = summary.friedman.mean_ranks if summary.friedman is not None else ()
    order = sorted(range(len(ranks)), key=lambda i: (ranks[i], i))
    figure = new_figure(size, 0.42 * len(ranks) + 1.3)
    axes = figure.subplots()
    for row, i in enumerate(order):
        style = look(i)
        axes.plot([ranks[i]], [row], color=style.colour, marker=style.marker, markersize=8)
    name_rows(axes, [summary.contestants[i].name for i in order])
    axes.set_xlim(0.7, len(ranks) + 0.3)
    axes.xaxis.set_major_locator(ticker.MaxNLocator(6, integer=True))
    for column, clique in enumerate(summary.cliques):
        rows = [order.index(i) for i in clique]
        axes.plot(
            [1.03 + 0.045 * column] * 2,
            [min(rows) - 0.25, max(rows) + 0.25],
            transform=axes.get_yaxis_transform(),
            color="#1c1f24",
            linewidth=4,
            solid_capstyle="round",
            clip_on=False,
        )
    axes.set_xlabel(f"mean rank; critical difference {summary.critical_difference:.2f}")
    return figure
