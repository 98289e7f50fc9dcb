"""The report of a comparison: a page, plots, tables and data files."""

from __future__ import annotations

from manifold_nets.comparison.report.build import summarise
from manifold_nets.comparison.report.page import page_html
from manifold_nets.comparison.report.summary import ContestantSummary, LayerTrace, RescaledStart, Summary
from manifold_nets.comparison.report.write import markdown_report, write_report

__all__ = [
    "ContestantSummary",
    "LayerTrace",
    "RescaledStart",
    "Summary",
    "markdown_report",
    "page_html",
    "summarise",
    "write_report",
]
