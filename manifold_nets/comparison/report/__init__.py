"""The report of a comparison: a self-contained page, plots, tables and data files."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from manifold_nets.comparison.report import tables
from manifold_nets.comparison.report.figures import FIGURES, Drawing
from manifold_nets.comparison.report.style import NARROW, WIDE, Size
from manifold_nets.comparison.report.summary import LayerTrace, OptimizerSummary, RescaledStart, Summary, summarise
from manifold_nets.comparison.results import Comparison
from manifold_nets.files import atomic_file
from manifold_nets.page import Section, document
from manifold_nets.page.markup import escape, facts, plural, table
from manifold_nets.page.plots import figure_svg, plot_settings, save_figure, series_style_sheet, settled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "LayerTrace",
    "OptimizerSummary",
    "RescaledStart",
    "Summary",
    "latex_report",
    "markdown_report",
    "page_html",
    "summarise",
    "write_report",
]

PAGE_NAME = "report.html"
Figures = Mapping[str, tuple["Figure", "Figure"]]


def write_report(comparison: Comparison, folder: str | os.PathLike[str]) -> Path:
    """Write the page, the plots, the tables and the data of a comparison into a folder; return the page.

    ``report.html`` needs no other file. ``plots/`` has each figure as PNG and SVG, ``tables.md`` and ``tables.tex`` the
    tables in Markdown and in LaTeX, ``summary.json`` the numbers behind tables and figures, ``runs.csv`` and
    ``epochs.csv`` one row per run and one per run and epoch, ``times.csv`` the times measured on the machine. Each file
    is replaced atomically.

    Args:
        comparison: a finished comparison, of any number of optimizers, learning rates and seeds.
        folder: the folder; it and its parents are created if needed.

    Raises:
        MissingExtraError: matplotlib is not installed.
        OSError: the folder cannot be created or written.
    """
    place = Path(folder)
    plots = place / "plots"
    plots.mkdir(parents=True, exist_ok=True)
    summary = summarise(comparison)
    figures = _draw_figures(summary)
    for name, text in (
        ("runs.csv", tables.runs_csv(comparison)),
        ("epochs.csv", tables.epochs_csv(comparison)),
        ("times.csv", tables.times_csv(comparison)),
        ("summary.json", tables.summary_json(summary)),
        ("tables.md", markdown_report(summary)),
        ("tables.tex", latex_report(summary)),
        (PAGE_NAME, page_html(summary, figures)),
    ):
        with atomic_file(place / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
    for path in (plots / f"{drawing.name}.{kind}" for drawing in FIGURES for kind in ("png", "svg")):
        if path.stem not in figures:  # of an earlier report in the same folder
            path.unlink(missing_ok=True)
            continue
        with plot_settings(WIDE.font), atomic_file(path) as temporary:
            save_figure(figures[path.stem][0], temporary, path.suffix[1:])
    return place / PAGE_NAME


def markdown_report(summary: Summary) -> str:
    """Conclusions and tables in Markdown, for a paper or a README."""
    result, robustness = tables.result_table(summary), tables.robustness_table(summary)
    rescaled = tables.rescaled_table(summary)
    settings = "; ".join(f"{name}: {value}" for name, value in summary.settings)
    parts = [
        tables.markdown_text(" ".join(tables.conclusions(summary))),
        tables.markdown(result),
        tables.markdown_text(f"{result.caption}. {tables.explanation(summary)}"),
        tables.markdown(robustness),
        tables.markdown_text(f"{robustness.caption}."),
        *((tables.markdown(rescaled), f"{rescaled.caption}.") if rescaled.rows else ()),
        tables.markdown_text(f"{settings[:1].upper()}{settings[1:]}."),
    ]
    return "\n\n".join(parts) + "\n"


def latex_report(summary: Summary) -> str:
    """The tables in LaTeX, for the packages ``booktabs`` and ``graphicx``."""
    found = {
        "results": tables.result_table(summary),
        "robustness": tables.robustness_table(summary),
        "rescaled": tables.rescaled_table(summary),
        "differences": tables.difference_table(summary),
    }
    head = "% \\usepackage{booktabs,graphicx}"
    return "\n\n".join([head, *(tables.latex(table, name) for name, table in found.items() if table.rows)]) + "\n"


# ---- the page --------------------------------------------------------------------------------------------------------


def _draw_figures(summary: Summary) -> Figures:
    """Draw every figure that has data, wide and narrow, by its name."""

    def draw(drawing: Drawing, size: Size) -> Figure:
        with plot_settings(size.font):
            return settled(drawing.draw(summary, size))

    return {found.name: (draw(found, WIDE), draw(found, NARROW)) for found in FIGURES if found.has_data(summary)}


def page_html(summary: Summary, figures: Figures | None = None) -> str:
    """Return a comparison as a self-contained page: conclusions, tables, and figures for wide and narrow windows.

    Args:
        summary: what to show.
        figures: the figures to show, wide and narrow (default: drawn here).

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    style = resources.files("manifold_nets.comparison.report").joinpath("report.css").read_text(encoding="utf-8")
    figures = _draw_figures(summary) if figures is None else figures
    differences = tables.difference_table(summary)
    pairs = f"<details><summary>{plural(len(differences.rows), 'pair')}</summary>{_table(differences)}</details>"
    sections = [
        Section("summary", "Summary", _opening(summary)),
        *(
            Section(drawing.name, drawing.title, _figure(drawing, summary, figures[drawing.name]))
            for drawing in FIGURES
            if drawing.name in figures
        ),
        Section("differences", "All differences", pairs if differences.rows else ""),
        Section("choices", "How the learning rates were chosen", _facts(summary.choices)),
        Section("settings", "What was run", _facts(summary.settings)),
    ]
    return document(summary.title, "comparison of optimizers", sections, style=series_style_sheet() + style)


def _opening(summary: Summary) -> str:
    robustness = tables.robustness_table(summary)
    sentences = escape(" ".join(tables.conclusions(summary)))
    return (
        f'<p class="lead">{sentences}</p><p>{escape(tables.explanation(summary))}</p>'
        f"{_table(tables.result_table(summary))}<p>{escape(robustness.caption)}.</p>{_table(robustness)}"
    )


def _table(found: tables.Table) -> str:
    if not found.rows:
        return ""
    rows = [[_unbroken(escape(cell)) for cell in row] for row in found.rows]
    head = [escape(name if name.startswith("p ") else name[:1].upper() + name[1:]) for name in found.head]
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
    caption, drawn = drawing.caption(summary), ""
    for figure, size, css in zip(pair, (WIDE, NARROW), ("wide", "narrow"), strict=True):
        label, prefix = f"{drawing.title}. {caption}", f"{drawing.name}-{css}"
        with plot_settings(size.font):
            drawn += figure_svg(figure, label=label, prefix=prefix, titles=titles, css=css)
    beside = _table(tables.rescaled_table(summary)) if drawing.name == "rescaled" else ""
    return f'<figure class="plot-card">{drawn}<figcaption>{escape(caption)}</figcaption></figure>{beside}'


def _facts(pairs: Sequence[tuple[str, str]]) -> str:
    return facts((escape(name), escape(value)) for name, value in pairs) if pairs else ""
