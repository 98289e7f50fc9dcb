"""The report of a comparison: a page, plots, tables and data files."""

from __future__ import annotations

import os
from pathlib import Path

from manifold_nets.comparison.report.figures import FIGURES, WIDE
from manifold_nets.comparison.report.page import draw_figures, page_html
from manifold_nets.comparison.report.summary import LayerTrace, OptimizerSummary, RescaledStart, Summary, summarise
from manifold_nets.comparison.report.tables import (
    conclusions,
    difference_table,
    epochs_csv,
    explanation,
    latex,
    markdown,
    markdown_text,
    rescaled_table,
    result_table,
    robustness_table,
    runs_csv,
    summary_json,
    times_csv,
)
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
        ("runs.csv", runs_csv(comparison)),
        ("epochs.csv", epochs_csv(comparison)),
        ("times.csv", times_csv(comparison)),
        ("summary.json", summary_json(summary)),
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
    result, robustness, rescaled = result_table(summary), robustness_table(summary), rescaled_table(summary)
    settings = "; ".join(f"{name}: {value}" for name, value in summary.settings)
    parts = [
        markdown_text(" ".join(conclusions(summary))),
        markdown(result),
        markdown_text(f"{result.caption}. {explanation(summary)}"),
        markdown(robustness),
        markdown_text(f"{robustness.caption}."),
        *((markdown(rescaled), f"{rescaled.caption}.") if rescaled.rows else ()),
        markdown_text(f"{settings[:1].upper()}{settings[1:]}."),
    ]
    return "\n\n".join(parts) + "\n"


def latex_report(summary: Summary) -> str:
    """The tables in LaTeX, for the packages ``booktabs`` and ``graphicx``."""
    tables = {
        "results": result_table(summary),
        "robustness": robustness_table(summary),
        "rescaled": rescaled_table(summary),
        "differences": difference_table(summary),
    }
    head = "% \\usepackage{booktabs,graphicx}"
    return "\n\n".join([head, *(latex(table, name) for name, table in tables.items() if table.rows)]) + "\n"
