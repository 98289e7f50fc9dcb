"""A figure of differences with their intervals, a row each; what is left of zero is in favour of the first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from manifold_nets.comparison.statistics import PairedDifference
from manifold_nets.files import atomic_file

__all__ = ["DifferenceRow", "draw_differences"]


@dataclass(frozen=True)
class DifferenceRow:
    """One row of the figure: what it says on the left, the difference, and its colour."""

    name: str
    found: PairedDifference
    colour: str


def draw_differences(rows: Sequence[DifferenceRow], told: str, path: Path) -> None:
    """Draw differences with Student's intervals.

    Args:
        rows: from top to bottom.
        told: what the horizontal axis shows.
        path: of the figure.
    """
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 0.8 + 0.25 * len(rows)), layout="constrained")
    for place, row in enumerate(rows):
        axes.plot([row.found.t_low, row.found.t_high], [place, place], color=row.colour, linewidth=2)
        axes.plot(row.found.value, place, "o", color=row.colour, markersize=5)
    axes.axvline(0, color="#000000", linewidth=0.8)
    axes.set_yticks(range(len(rows)), [row.name for row in rows], fontsize=7)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    # Linear about zero, so that one difference of 80 points does not hide those of one.
    axes.set_xscale("symlog", linthresh=1)
    ticks = [-30, -10, -3, -1, 0, 1, 3, 10, 30]
    axes.set_xticks(ticks, [f"{tick:g}".replace("-", "−") for tick in ticks])
    figure.supxlabel(told, fontsize=8)  # the axes alone are too narrow for it
    axes.grid(alpha=0.3)
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format=path.suffix[1:], dpi=120)
    pyplot.close(figure)
