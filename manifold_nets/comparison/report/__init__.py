"""The report of a comparison: a page, plots, tables and data files."""

from __future__ import annotations

import os
from pathlib import Path

from manifold_nets.comparison.report import tables
from manifold_nets.comparison.report.figures import FIGURES, WIDE
from manifold_nets.comparison.report.page import draw_figures, page_html
from manifold_nets.comparison.report.summary import LayerTrace, OptimizerSummary, RescaledStart, Summary, summarise
from manifold_nets.comparison.results import Comparison
from manifold_nets.files import atomic_file
from manifold_nets.page.plots import plot_settings, save_figure

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


def write_report(comparison: Comparison, folder: str | os.PathLike[str]) -> Path:
    """Write the page, the plots, the tables and the data of a comparison into a folder; return the page.

    ``report.html`` needs no other file. ``plots/`` has each figure as PNG and SVG, ``tables.md`` and
    ``tables.tex`` the tables in Markdown and in LaTeX, ``summary.json`` the numbers behind tables and figures,
    ``runs.csv`` and ``epochs.csv`` one row per run and one per run and epoch, ``times.csv`` what was measured on the
    machine. Each file is replaced as a whole.

    Args:
        comparison: a finished comparison, of any number of optimizers, learning rates and seeds.
        folder: where to; it and its parents are made.

    Raises:
        MissingExtraError: matplotlib is not installed.
        OSError: the folder cannot be made or written.
    """
    place = Path(folder)
    plots = place / "plots"
    plots.mkdir(parents=True, exist_ok=True)
    summary = summarise(comparison)
    figures = draw_figures(summary)
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
    for drawing in FIGURES:
        for kind in ("png", "svg"):
            path = plots / f"{drawing.name}.{kind}"
            if drawing.name not in figures:  # of an earlier report in the same folder
                path.unlink(missing_ok=True)
                continue
            with plot_settings(WIDE.font), atomic_file(path) as temporary:
                save_figure(figures[drawing.name][0], temporary, kind)
    return place / PAGE_NAME


def markdown_report(summary: Summary) -> str:
    """Conclusions and tables in Markdown, for a paper or a README."""
    result, robustness, rescaled = (
        tables.result_table(summary),
        tables.robustness_table(summary),
        tables.rescaled_table(summary),
    )
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
