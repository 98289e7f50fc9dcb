"""The report as one HTML page that needs nothing else."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import TYPE_CHECKING

from manifold_nets.comparison.report import tables
from manifold_nets.comparison.report.figures import FIGURES, NARROW, WIDE, Drawing
from manifold_nets.comparison.report.summary import Summary
from manifold_nets.page import Section, document
from manifold_nets.page.markup import escape, facts, plural, table
from manifold_nets.page.plots import figure_svg, plot_settings, series_style_sheet, settled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Figures", "draw_figures", "page_html"]


Figures = Mapping[str, tuple["Figure", "Figure"]]


def draw_figures(summary: Summary) -> Figures:
    """Draw every figure that there is something to show for, wide and narrow, by its name.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    drawn = {}
    for drawing in FIGURES:
        if drawing.has_data(summary):
            pair = []
            for size in (WIDE, NARROW):
                with plot_settings(size.font):
                    pair.append(settled(drawing.draw(summary, size)))
            drawn[drawing.name] = pair[0], pair[1]
    return drawn


def page_html(summary: Summary, figures: Figures | None = None) -> str:
    """Return a comparison as a self-contained page: conclusions, tables, and figures for wide and narrow windows.

    Args:
        summary: what to show.
        figures: what `draw_figures` made of it; drawn where left out.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    style = resources.files("manifold_nets.comparison.report").joinpath("report.css").read_text(encoding="utf-8")
    sections = [Section("summary", "Summary", _opening(summary))]
    figures = draw_figures(summary) if figures is None else figures
    sections += [
        Section(drawing.name, drawing.title, _figure(drawing, summary, figures[drawing.name]))
        for drawing in FIGURES
        if drawing.name in figures
    ]
    sections += [
        Section("differences", "All differences", _differences(summary)),
        Section("choices", "How the learning rates were chosen", _facts(summary.choices)),
        Section("settings", "What was run", _facts(summary.settings)),
    ]
    return document(summary.title, "comparison of optimizers", sections, style=series_style_sheet() + style)


def _opening(summary: Summary) -> str:
    robustness = tables.robustness_table(summary)
    sentences = " ".join(escape(sentence) for sentence in tables.conclusions(summary))
    return (
        f'<p class="lead">{sentences}</p><p>{escape(tables.explanation(summary))}</p>'
        f"{_table(tables.result_table(summary))}<p>{escape(robustness.caption)}.</p>{_table(robustness)}"
    )


def _table(found: tables.Table) -> str:
    rows = [[_unbroken(escape(cell)) for cell in row] for row in found.rows]
    head = [escape(name if name.startswith("p ") else name[:1].upper() + name[1:]) for name in found.head]
    if not rows:
        return ""
    caption = escape(found.caption)
    # A table that is too wide for the window is moved sideways by itself, also with the keyboard.
    return f'<div class="scrolled" role="region" aria-label="{caption}" tabindex="0">{table(caption, head, rows)}</div>'


def _unbroken(text: str) -> str:
    """The same, with intervals that are not broken across lines."""
    return re.sub(r"\[[^]]*\]|\([\d. …]*\)|\S* ± \S*", lambda found: found[0].replace(" ", "\u00a0"), text)


def _figure(drawing: Drawing, summary: Summary, pair: tuple[Figure, Figure]) -> str:
    titles = {
        f"series-{i}": f"{o.name}: test error {tables.mean_text(o.test, summary.unit, o.not_finite, sign=True)}"
        for i, o in enumerate(summary.optimizers)
    }
    caption = drawing.caption(summary)
    drawn = []
    for figure, size, css in zip(pair, (WIDE, NARROW), ("wide", "narrow"), strict=True):
        label, prefix = f"{drawing.title}. {caption}", f"{drawing.name}-{css}"
        with plot_settings(size.font):
            drawn.append(figure_svg(figure, label=label, prefix=prefix, titles=titles, css=css))
    beside = _table(tables.rescaled_table(summary)) if drawing.name == "rescaled" else ""
    return f'<figure class="plot-card">{"".join(drawn)}<figcaption>{escape(caption)}</figcaption></figure>{beside}'


def _differences(summary: Summary) -> str:
    found = tables.difference_table(summary)
    if not found.rows:
        return ""
    return f"<details><summary>{plural(len(found.rows), 'pair')}</summary>{_table(found)}</details>"


def _facts(pairs: Sequence[tuple[str, str]]) -> str:
    return facts((escape(name), escape(value)) for name, value in pairs) if pairs else ""
