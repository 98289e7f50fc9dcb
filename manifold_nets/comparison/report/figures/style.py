"""How figures look: sizes, a colour, marker and line for each contestant, and axes for errors and learning rates."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from manifold_nets.page.plots import SERIES

__all__ = [
    "NARROW",
    "WIDE",
    "Look",
    "Size",
    "error_axis",
    "finite",
    "look",
    "name_rows",
    "rate_axis",
    "short_name",
    "strict_median",
]

_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p", "h", "*")
_LINES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (5, 1.2, 1.2, 1.2)))
# Values that range over more than this are drawn on a logarithmic axis.
WIDE_RANGE = 8.0


@dataclass(frozen=True)
class Size:
    """The size of a figure.

    Args:
        width: in inches.
        font: in points.
        narrow: whether panels stand below each other.
    """

    width: float
    font: float
    narrow: bool


# A column of a paper over the whole width, or of a page on a large screen; and a telephone.
WIDE, NARROW = Size(9.0, 9.0, False), Size(4.75, 11.0, True)


@dataclass(frozen=True)
class Look:
    """Colour, marker and line of a contestant; any two differ in marker, and neighbours in colour."""

    colour: str
    marker: str
    line: Any


def look(place: int) -> Look:
    """The look of the contestant at some place in the order."""
    return Look(
        SERIES[place % len(SERIES)][0],
        _MARKERS[place % len(_MARKERS)],
        _LINES[place // len(SERIES) % len(_LINES)],
    )


def finite(values: Iterable[float]) -> list[float]:
    """Those that are finite."""
    return [value for value in values if math.isfinite(value)]


def strict_median(values: Sequence[float]) -> float:
    """The median of runs in which those that diverged count as infinite: finite while most runs are."""
    ordered = sorted(math.inf if math.isnan(value) else value for value in values)
    if not ordered:
        return math.nan
    return (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2


def error_axis(axes: Any, which: str, values: Iterable[float], *, scale: float = 1.0) -> None:
    """Linear, or logarithmic where the values are positive and of a wide range; ticks in plain numbers.

    Args:
        axes: of matplotlib.
        which: ``"x"`` or ``"y"``.
        values: all that will be drawn.
        scale: ticks show the values times this: 100 for percent.
    """
    from matplotlib import ticker

    axis = getattr(axes, f"{which}axis")
    shown = finite(values)
    if not shown:  # nothing that a number could be read off
        axis.set_ticks([])
        return
    if min(shown) > 0 and max(shown) / min(shown) > WIDE_RANGE:
        getattr(axes, f"set_{which}scale")("log")
        decades = math.log10(max(shown) / min(shown))
        axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5) if decades < 2 else (1, 3) if decades < 4 else (1,)))
        axis.set_minor_locator(ticker.NullLocator())
    else:
        axis.set_major_locator(ticker.MaxNLocator(5))
        if min(shown) == max(shown):
            margin = abs(shown[0]) / 2 or 0.01
            getattr(axes, f"set_{which}lim")(shown[0] - margin * (shown[0] > 0), shown[0] + margin)
    axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{scale * value:.4g}"))


def rate_axis(axes: Any, rates: Iterable[float]) -> None:
    """A logarithmic axis of learning rates with plain numbers."""
    from matplotlib import ticker

    shown = sorted(rates)
    axes.set_xscale("log")
    axes.set_xlim(shown[0] / 1.6, shown[-1] * 1.6)
    decades = math.log10(shown[-1] / shown[0])
    subs: tuple[float, ...] = (1, 3) if decades < 2.5 else (1,)
    axes.xaxis.set_major_locator(ticker.LogLocator(subs=subs) if decades else ticker.FixedLocator(shown))
    axes.xaxis.set_minor_locator(ticker.NullLocator())
    axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))


def short_name(name: str) -> str:
    """A name that leaves room for the figure: of a long one, such as a path, the end.

    Example:
        >>> short_name("sgd"), short_name("../optimizers/of/mine/lion.py:Lion")
        ('sgd', '…rs/of/mine/lion.py:Lion')
    """
    return name if len(name) <= 24 else f"…{name[-23:]}"


def name_rows(axes: Any, names: Sequence[str]) -> None:
    """One row a contestant, from top to bottom."""
    axes.set_yticks(range(len(names)), [short_name(name) for name in names])
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0, labelcolor="#1c1f24")
    axes.grid(visible=False, axis="y")
    axes.spines["left"].set_visible(False)
