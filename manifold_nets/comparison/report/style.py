"""The look of figures: sizes, a color, marker and line for each optimizer, and axes of errors, rates and passes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

from manifold_nets.page.plots import COLOURS, SERIES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK = COLOURS["ink"]
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p", "h", "*")
_LINES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (5, 1.2, 1.2, 1.2)))
# Values that range over more than this are drawn on a logarithmic axis.
WIDE_RANGE = 8.0
# Optimizers that pass over the data this many times as often as others are drawn on a logarithmic axis with them.
MANY_PASSES = 3.0


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


def look(place: int) -> dict[str, Any]:
    """Color, marker and line of the optimizer at an index; any two differ in marker, and neighbors in color."""
    return {
        "color": SERIES[place % len(SERIES)][0],
        "marker": _MARKERS[place % len(_MARKERS)],
        "linestyle": _LINES[place // len(SERIES) % len(_LINES)],
    }


def mark(axes: Any, x: float, y: float, place: int, **options: Any) -> Any:
    """Draw the marker of the optimizer at an index; return the artist."""
    (drawn,) = axes.plot([x], [y], **{**look(place), "linestyle": "none", **options})
    return drawn


def strokes(axes: Any, values: Iterable[float], place: int) -> None:
    """Draw the value of every run above the row of the optimizer at an index."""
    shown, color = finite(values), look(place)["color"]
    axes.plot(shown, [place + 0.2] * len(shown), color=color, marker="|", markersize=9, linestyle="none")


def new_figure(size: Size, height: float) -> Figure:
    """An empty figure."""
    from matplotlib.figure import Figure

    return Figure(figsize=(size.width, height), layout="constrained")


def panels(size: Size, height: float, **options: Any) -> tuple[Figure, Any]:
    """A figure of two panels, side by side or below each other, and the axes of both."""
    figure = new_figure(size, height)
    return figure, figure.subplots(2, 1, **options) if size.narrow else figure.subplots(1, 2, **options)


def legend(figure: Figure, axes: Any, size: Size) -> None:
    """A legend below the figure, in as many columns as there is room for."""
    handles, labels = axes.get_legend_handles_labels()
    longest = max(map(len, labels), default=1)
    columns = max(1, int((size.width * 72 / size.font) / (0.62 * longest + 6.5)))
    rows = math.ceil(len(labels) / columns)
    figure.legend(handles, labels, loc="outside lower center", ncols=math.ceil(len(labels) / max(rows, 1)))


def note_beside(axes: Any, place: int, text: str) -> None:
    """A remark at the right end of a row."""
    right: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
    axes.annotate(text, (1.0, place), (6, 0), **right, va="center", color=INK, annotation_clip=False)


def passes_axis(axes: Any, passes: Sequence[Sequence[float]]) -> None:
    """A horizontal axis of epochs, or of passes over the data if some optimizers make several per epoch.

    It is logarithmic if some make many more than others.

    Args:
        axes: matplotlib axes.
        passes: for each optimizer, passes to the end of each epoch.
    """
    last = [each[-1] for each in passes if each] or [1.0]
    count = max(last)
    if count >= MANY_PASSES * min(last):
        axes.set_xscale("log")
        axes.set_xlim(0.9, 1.1 * count)
        ticks = [digit * 10**power for power in range(9) for digit in (1, 2, 5) if digit * 10**power <= count]
        axes.set_xticks(ticks, [f"{tick}" for tick in ticks])
        axes.set_xticks([], minor=True)
    else:
        whole = math.ceil(count)
        step = next(digit * 10**p for p in range(9) for digit in (1, 2, 5) if whole / (digit * 10**p) <= 6)
        axes.set_xticks(sorted({1, *range(step, whole + 1, step)} - ({step} if step == 2 else set())))
        axes.set_xlim(1 - 0.03 * count, count + 0.03 * count)
    plain = all(tuple(each) == tuple(range(1, len(each) + 1)) for each in passes)
    axes.set_xlabel("epoch" if plain else "passes over the data")


def finite(values: Iterable[float]) -> list[float]:
    """The finite values."""
    return [value for value in values if math.isfinite(value)]


def with_gaps(values: Iterable[float]) -> list[float]:
    """The values, with NaN for those that are not finite, so that lines have gaps there."""
    return [value if math.isfinite(value) else math.nan for value in values]


def strict_median(values: Sequence[float]) -> float:
    """The median of runs with diverged ones counted as infinite: finite if most runs are."""
    return median(math.inf if math.isnan(value) else value for value in values) if values else math.nan


def error_axis(axes: Any, which: str, values: Iterable[float], *, scale: float = 1.0) -> None:
    """A linear axis, or a logarithmic one if the values are positive with a wide range; ticks are plain numbers.

    Args:
        axes: matplotlib axes.
        which: ``"x"`` or ``"y"``.
        values: all values that will be drawn.
        scale: factor of the values at the ticks: 100 for percent.
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
    """A name that fits in the figure: the end of a long one, such as a path.

    Example:
        >>> short_name("sgd"), short_name("../optimizers/of/mine/lion.py:Lion")
        ('sgd', '…rs/of/mine/lion.py:Lion')
    """
    return name if len(name) <= 24 else f"…{name[-23:]}"


def name_rows(axes: Any, names: Sequence[str]) -> None:
    """One named row per optimizer, from top to bottom."""
    axes.set_yticks(range(len(names)), [short_name(name) for name in names])
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0, labelcolor=INK)
    axes.grid(visible=False, axis="y")
    axes.spines["left"].set_visible(False)
