"""The figures of a report, one entry each: its title, what it shows in words, when there is something to show."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from manifold_nets.comparison.report.figures.curves import (
    draw_layers,
    draw_learning_curves,
    draw_sensitivity,
    shown_layers,
)
from manifold_nets.comparison.report.figures.ranks import draw_critical_differences
from manifold_nets.comparison.report.figures.rows import draw_rescaled, draw_target, draw_test_errors
from manifold_nets.comparison.report.figures.style import NARROW, WIDE, Size
from manifold_nets.comparison.report.summary import Summary

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["FIGURES", "NARROW", "WIDE", "Drawing", "Size"]


def _has_contestants(summary: Summary) -> bool:
    """Whether there is anything at all to show."""
    return bool(summary.contestants)


@dataclass(frozen=True)
class Drawing:
    """One figure.

    Args:
        name: of its files and its anchor.
        title: its heading.
        draw: makes it.
        told: its caption, as plain text.
        has_data: whether a summary has what it shows.
    """

    name: str
    title: str
    draw: Callable[[Summary, Size], Figure]
    told: Callable[[Summary], str]
    has_data: Callable[[Summary], bool] = _has_contestants


def _layers_told(summary: Summary) -> str:
    names = {layer.name for contestant in summary.contestants for layer in contestant.layers}
    shown = shown_layers(summary)
    some = f" {len(shown)} of {len(names)} layers are drawn; epochs.csv has all." if len(shown) < len(names) else ""
    return (
        "How far a filter turns in one step, and how long the filters of a layer are: medians over the seeds. "
        f"On spheres the length stays.{some}"
    )


def _ranks_told(summary: Summary) -> str:
    if summary.friedman is None:
        return ""
    return (
        f"Mean ranks of the test errors over {summary.friedman.blocks} seeds, the best at the left; diverged runs rank "
        "last. The ranks of optimizers joined by a bar do not differ at the 5 % level (Nemenyi). Friedman's test of "
        f"any difference: p = {summary.friedman.p_value:.2g}. Ranks over seeds of one task say nothing of other tasks."
    )


FIGURES = (
    Drawing(
        "test-error",
        "Test error",
        draw_test_errors,
        lambda _: (
            "Each stroke is a seed. The mark is the mean, its line Student's 95 % interval. Where runs diverged, the "
            "mean is over the other runs, and the row shows how many are missing."
        ),
    ),
    Drawing(
        "critical-differences",
        "Critical differences",
        draw_critical_differences,
        _ranks_told,
        lambda summary: summary.friedman is not None and math.isfinite(summary.critical_difference),
    ),
    Drawing(
        "learning-curves",
        "Learning curves",
        draw_learning_curves,
        lambda _: (
            "Lines are medians over the seeds, in which diverged runs count as infinite; bands reach from the best to "
            "the worst seed that has not diverged. ✕ in the legend counts those that have. A cross ends a line where "
            "half of the runs are lost."
        ),
    ),
    Drawing(
        "sensitivity",
        "Sensitivity to the learning rate",
        draw_sensitivity,
        lambda _: (
            "Means over the seeds at the end of training. A hollow mark is a mean over survivors, on no line; a cross "
            "below is a rate at which runs diverged. The bars are the learning rates whose error, interpolated between "
            "those tried, is within 10 % of the best."
        ),
    ),
    Drawing(
        "target",
        "Time to a target",
        draw_target,
        lambda summary: (
            f"When the validation error is first at most {summary.unit.short(summary.target)}. Each stroke is a seed, "
            "the mark their median, in which runs that never come there count as infinite."
        ),
        lambda summary: math.isfinite(summary.target),
    ),
    Drawing(
        "rescaled",
        "Sensitivity to the initial scale",
        draw_rescaled,
        lambda _: (
            "The hollow mark is the mean validation error when every initial filter that a normalization absorbs is "
            "multiplied by its own power of ten between 10⁻² and 10², which leaves the initial function as it was; "
            "the learning rate is the one chosen for the plain start."
        ),
        lambda summary: any(contestant.rescaled is not None for contestant in summary.contestants),
    ),
    Drawing(
        "layers",
        "Rotation and norms",
        draw_layers,
        _layers_told,
        lambda summary: bool(shown_layers(summary)),
    ),
)
