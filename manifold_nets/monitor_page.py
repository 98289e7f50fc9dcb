"""The page of a monitored run: findings, a table of all weights, and plots over the steps."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from manifold_nets.files import atomic_file
from manifold_nets.monitor_records import History
from manifold_nets.page import Section, document
from manifold_nets.page.markup import dotted, escape, number, plural, table
from manifold_nets.page.plots import SERIES, figure_svg, plot_settings, series_style_sheet, settled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["page_html", "write_page"]

_STYLE = """
.plot-card{background:var(--panel);border:1px solid var(--line);border-radius:8px;padding:.75rem;margin:1rem 0}
.figure-svg{display:block;width:100%;height:auto;font-family:inherit;fill:none}
.figure-svg text{stroke:none}
.narrow{display:none}
figcaption{color:var(--soft);font-size:.875rem;margin-top:.5rem;max-width:46rem}
thead th{vertical-align:bottom}
td{font-variant-numeric:tabular-nums}
@media (max-width:40rem){.wide{display:none}.narrow{display:block}.plot-card{padding:.5rem}}
"""
# Width in inches and size of the letters in points, of a figure for a wide window and for a telephone.
_SIZES = {"wide": (9.0, 9.0), "narrow": (4.75, 11.0)}
# Two numbers on the way to equilibrium; after a schedule the second is by far the larger one.
_EXPECTED, _REMAINING = "Expected at step", "Steps until then at the last rate"
_LINES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (5, 1.2, 1.2, 1.2)))


@dataclass(frozen=True)
class _Plot:
    """One figure: a quantity of each layer along the steps."""

    quantity: str
    title: str
    label: str
    caption: str
    beside: str | None = None  # drawn dashed, the median over all layers


_PLOTS = (
    _Plot(
        "rotation",
        "Rotation",
        "radians per step",
        "The angle by which a step turns a group, median over the groups of a layer. Dashed: the equilibrium rotation "
        "for the present learning rate, momentum and weight decay, if known.",
        beside="equilibrium_rotation",
    ),
    _Plot(
        "norm",
        "Norm",
        "norm of a group",
        "The function does not depend on this norm. A group of twice the norm turns by a quarter of the angle with "
        "SGD, and by half the angle with Adam.",
    ),
    _Plot(
        "effective_lr",
        "Effective learning rate",
        "effective learning rate",
        "Learning rate over the squared norm for SGD, over the norm for Adam and its variants; on spheres the learning "
        "rate itself.",
    ),
    _Plot(
        "steps_to_equilibrium",
        "Steps to equilibrium",
        "steps",
        "Steps until the rotation is within a tenth of its equilibrium, at the present learning rate, if gradients are "
        "mostly noise. No line: it is in equilibrium, or the equilibrium is unknown.",
    ),
    _Plot(
        "radial_step",
        "Radial share of the step",
        "share along the weight",
        "The share of a step that changes the norm instead of the direction.",
    ),
    _Plot(
        "radial_gradient",
        "Radial share of the gradient",
        "share along the weight",
        "Zero up to rounding if the scale has no effect, as diagnosed.",
    ),
)


def write_page(
    history: History, path: str | os.PathLike[str], *, title: str = "run", total_steps: int | None = None
) -> None:
    """Write the page of `page_html` to a file, atomically.

    Raises:
        MissingExtraError: matplotlib is not installed.
        OSError: the file cannot be written.
    """
    text = page_html(history, title=title, total_steps=total_steps)
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def page_html(history: History, *, title: str = "run", total_steps: int | None = None) -> str:
    """Return the page of a run as self-contained HTML.

    Args:
        history: the measurements of a monitor.
        title: name of the model or the file.
        total_steps: the length of the run, for the findings about the equilibrium.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    sections = [Section("summary", "Summary", _summary(history, total_steps))]
    if history.steps:
        sections.append(Section("weights", "Weights", _weights(history)))
        sections += [Section(plot.quantity, plot.title, _figures(plot, history)) for plot in _PLOTS]
    return document(title, "scale-invariant weights in training", sections, style=series_style_sheet() + _STYLE)


def _summary(history: History, total_steps: int | None) -> str:
    if not history.steps:
        return "<p>Nothing was measured.</p>"
    first, last = history.steps[0], history.steps[-1]
    found = [escape(finding.text) for finding in history.findings(total_steps)]
    text = f"{plural(len(history.weights), 'weight')} whose scale has no effect, in steps {first:,} to {last:,}."
    items = "".join(f"<li>{sentence}</li>" for sentence in found)
    said = f'<ul class="findings">{items}</ul>' if found else "<p>Nothing unusual found.</p>"
    return f'<p class="lead">{text}</p>{said}'


def _weights(history: History) -> str:
    """A table of the first and last numbers of each weight."""
    start, now = history.rows(0), history.rows()
    rows = [
        [
            f'<span class="name">{dotted(b["weight"])}</span>',
            str(b["groups"]),
            f"{_cell(a['norm'])} → {_cell(b['norm'])}",
            f"{_cell(a['rotation'])} → {_cell(b['rotation'])}",
            _cell(b["equilibrium_rotation"]),
            _steps(arrival, reached="0") if math.isfinite(arrival) else "–",
            _steps(b["steps_to_equilibrium"]),
        ]
        for a, b, arrival in zip(start, now, history.arrival.tolist(), strict=True)
    ]
    head = ("Weight", "Groups", "Norm", "Radians per step", "In equilibrium", _EXPECTED, _REMAINING)
    note = (
        "The expected step of equilibrium is the earliest estimate along the run, which had larger learning rates than "
        "at the end; the findings above use it. The remaining steps are computed at the rate of the last measured step."
    )
    return table("First and last measured step", head, rows) + f"<p>{escape(note)}</p>"


def _cell(value: float) -> str:
    return "–" if math.isnan(value) else number(value)


def _steps(value: float, reached: str = "there") -> str:
    if math.isnan(value):
        return "–"
    return reached if value == 0 else f"{float(f'{value:.2g}'):,.0f}" if math.isfinite(value) else "never"


# ---- plots -----------------------------------------------------------------------------------------------------------


def _shown(history: History) -> tuple[int | None, list[str], str]:
    """How many parts of a name make a layer so that there are few lines, the layers drawn, and a word about others."""
    most, layers = len(SERIES), list(history.weights)
    shown: int | None = None
    for depth in range(max(name.count(".") for name in history.weights), 0, -1):
        if len(layers) <= most:
            break
        joined = list(history.layers(depth))
        if len(joined) < 3:  # so few that they hide what is different
            break
        shown, layers = depth, joined
    if len(layers) <= most:
        return shown, layers, ""
    places = np.linspace(0, len(layers) - 1, most).round().astype(int)
    return shown, [layers[place] for place in places], f" Drawn are {most} of {len(layers)} layers."


def _figures(plot: _Plot, history: History) -> str:
    depth, layers, note = _shown(history)
    lines = {layer: values for layer, values in history.by_layer(plot.quantity, depth).items() if layer in layers}
    lines = {layer: np.where(values > 0, values, np.nan) for layer, values in lines.items()}
    lines = {layer: values for layer, values in lines.items() if np.isfinite(values).any()}
    if not lines:
        return ""
    caption, drawn = plot.caption + note, []
    beside = None if plot.beside is None else _finite_median(history.of(plot.beside))
    for css, (width, font) in _SIZES.items():
        with plot_settings(font):
            figure = settled(_draw(plot, history.steps, lines, beside, width=width, font=font))
            titles = {f"line-{number}": layer for number, layer in enumerate(lines)}
            label = f"{plot.title} along the steps. {caption}"
            drawn.append(figure_svg(figure, label=label, prefix=f"{plot.quantity}-{css}", titles=titles, css=css))
    return f'<figure class="plot-card">{"".join(drawn)}<figcaption>{escape(caption)}</figcaption></figure>'


def _finite_median(values: NDArray[np.float64]) -> NDArray[np.float64] | None:
    known = np.isfinite(values).any(axis=1)
    return None if not known.all() else np.nanmedian(values, axis=1)


def _draw(
    plot: _Plot,
    steps: Sequence[int],
    lines: dict[str, NDArray[np.float64]],
    beside: NDArray[np.float64] | None,
    *,
    width: float,
    font: float,
) -> Figure:
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator

    from manifold_nets.page.plots import COLOURS

    columns = max(1, int(width * 72 / font / (0.62 * max(map(len, lines)) + 6.5)))
    rows = math.ceil(len(lines) / columns)
    figure = Figure(figsize=(width, 0.36 * width + 0.9 + 0.02 * font * rows), layout="constrained")
    axes = figure.subplots()
    for place, (layer, values) in enumerate(lines.items()):
        (line,) = axes.plot(
            steps, values, color=SERIES[place][0], linestyle=_LINES[place % len(_LINES)], label=layer,
            marker="o" if len(steps) == 1 else "",
        )  # fmt: skip
        line.set_gid(f"line-{place}")
    if beside is not None:
        axes.plot(steps, beside, color=COLOURS["soft"], linestyle="--", linewidth=1.2)
    axes.set_yscale("log")
    axes.set_ylabel(plot.label)
    axes.set_xlabel("step")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    written: Callable[[float, Any], str] = lambda value, _: f"{value:,.0f}" if 100 <= value < 1e6 else number(value)  # noqa: E731 (typed for matplotlib)
    axes.yaxis.set_major_formatter(FuncFormatter(written))
    axes.yaxis.set_minor_formatter(FuncFormatter(lambda *_: ""))
    least, most = (edge([edge(values[np.isfinite(values)]) for values in lines.values()]) for edge in (np.min, np.max))
    if most < 30 * least:
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    axes.margins(x=0.01)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=math.ceil(len(lines) / rows))
    return figure
