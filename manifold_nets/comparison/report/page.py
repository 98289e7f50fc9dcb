"""The report as one HTML page that needs nothing else."""

from __future__ import annotations

import re
from importlib import resources

from manifold_nets.comparison.report.figures import FIGURES, NARROW, WIDE, Drawing
from manifold_nets.comparison.report.summary import Summary
from manifold_nets.comparison.report.tables import (
    Table,
    conclusions,
    difference_table,
    mean_text,
    result_table,
    robustness_table,
)
from manifold_nets.page import Section, document
from manifold_nets.page.markup import escape, facts, plural, table
from manifold_nets.page.plots import figure_svg, plot_settings, series_style_sheet

__all__ = ["page_html"]


def page_html(summary: Summary) -> str:
    """Return a comparison as a self-contained page: conclusions, tables, and figures for wide and narrow windows.

    Args:
        summary: what is to be told.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    style = resources.files("manifold_nets.comparison.report").joinpath("report.css").read_text(encoding="utf-8")
    sections = [Section("summary", "Summary", _opening(summary))]
    sections += [
        Section(drawing.name, drawing.title, _figure(drawing, summary))
        for drawing in FIGURES
        if drawing.has_data(summary)
    ]
    sections += [
        Section("differences", "All differences", _differences(summary)),
        Section("settings", "What was run", _settings(summary)),
    ]
    return document(summary.title, "comparison of optimizers", sections, style=series_style_sheet() + style)


def _opening(summary: Summary) -> str:
    robustness = robustness_table(summary)
    said = " ".join(escape(sentence) for sentence in conclusions(summary))
    return (
        f'<p class="lead">{said}</p><p>Means over the seeds with half of Student\'s 95 % interval; differences seed by '
        "seed, in points of a percent, with 95 % bootstrap intervals, which are too narrow for few seeds; p-values of "
        "the paired t-test, corrected for all pairs by Holm's method.</p>"
        f"{_table(result_table(summary))}<p>{escape(robustness.caption)}.</p>{_table(robustness)}"
    )


def _table(found: Table) -> str:
    rows = [[_unbroken(escape(cell)) for cell in row] for row in found.rows]
    head = [escape(name if name.startswith("p ") else name[:1].upper() + name[1:]) for name in found.head]
    return table(escape(found.caption), head, rows) if rows else ""


def _unbroken(text: str) -> str:
    """The same with intervals that no line breaks."""
    return re.sub(r"\[[^]]*\]|\([\d. …]*\)|\S* ± \S*", lambda found: found[0].replace(" ", "\u00a0"), text)


def _figure(drawing: Drawing, summary: Summary) -> str:
    titles = {
        f"series-{i}": f"{contestant.name}: test error {mean_text(contestant.test)} %"
        for i, contestant in enumerate(summary.contestants)
    }
    told = drawing.told(summary)
    drawn = []
    for size, css in ((WIDE, "wide"), (NARROW, "narrow")):
        with plot_settings(size.font):
            figure = drawing.draw(summary, size)
            drawn.append(
                figure_svg(
                    figure, label=f"{drawing.title}. {told}", prefix=f"{drawing.name}-{css}", titles=titles, css=css
                )
            )
    return f'<figure class="plot-card">{"".join(drawn)}<figcaption>{escape(told)}</figcaption></figure>'


def _differences(summary: Summary) -> str:
    found = difference_table(summary)
    if not found.rows:
        return ""
    return f"<details><summary>{plural(len(found.rows), 'pair')}</summary>{_table(found)}</details>"


def _settings(summary: Summary) -> str:
    return facts((escape(name), escape(value)) for name, value in summary.settings) if summary.settings else ""
