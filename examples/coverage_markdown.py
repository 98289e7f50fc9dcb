"""The coverage table as Markdown: one line a suite for the README, then one line a network."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

SUMMARY = (
    "suite", "networks analysed", "weights", "found", "certified", "groups certified", "unexplained",
    "shifts", "unexplained shifts", "contradictions", "converted", "of these keep their norms",
    "largest certificate", "evaluation", "training", "training, own norms", "seconds a network",
)  # fmt: skip
COLUMNS = (
    "network", "parameters", "weights", "found", "certified", "groups certified", "unexplained", "shifts",
    "unexplained shifts", "contradictions", "converted", "of these keep their norms",
    "largest certificate", "evaluation", "training", "training, own norms", "diagnose", "convert",
)  # fmt: skip


def machine() -> str:
    """The machine in words, with the versions that matter."""
    model = platform.processor() or platform.machine()
    try:
        with Path("/proc/cpuinfo").open() as stream:
            model = next((line.partition(":")[2].strip() for line in stream if line.startswith("model name")), model)
    except OSError:
        pass
    return f"{os.cpu_count()} cores of {model}, Python {platform.python_version()}, torch {torch.__version__}"


def page(rows: Sequence[Any], sizes: Mapping[str, int]) -> str:
    """Both tables, with what made them; ``sizes`` says how many networks each suite has."""
    command = "python examples/coverage_table.py --suite all --write examples/results"
    parts = [
        f"Command: `{command}`. Machine: {machine()}, shared with other work.",
        table(SUMMARY, summary(rows, sizes)),
    ]
    for suite in dict.fromkeys(row.suite for row in rows):
        members = [row for row in rows if row.suite == suite]
        parts += [f"## {suite}", table(COLUMNS, map(cells, members))]
        remarks = [f"- {row.network}: {row.remark}" for row in members if row.remark]
        parts += ["\n".join(remarks)] if remarks else []
    return "\n\n".join(parts) + "\n"


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table of Markdown."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def summary(rows: Sequence[Any], sizes: Mapping[str, int]) -> list[list[Any]]:
    """One line a suite: sums, and the largest of what is better small."""
    lines = []
    for suite in dict.fromkeys(row.suite for row in rows):
        members = [row for row in rows if row.suite == suite]
        analysed = [row for row in members if row.weights]
        counts = (
            "weights found certified groups_certified groups_unexplained shifts shifts_unexplained contradictions "
            "converted kept_radius"
        )
        largest = "worst_certificate eval_difference train_difference keep_train_difference"
        seconds = sorted(row.diagnose_seconds + row.convert_seconds for row in analysed)
        lines.append(
            [
                suite,
                f"{len(analysed)} of {sizes[suite]}",
                *(sum(getattr(row, name) for row in analysed) for name in counts.split()),
                *(f"{max(getattr(row, name) for row in analysed):.0e}" for name in largest.split()),
                f"{seconds[len(seconds) // 2]:.1f}, at most {seconds[-1]:.1f}",
            ]
        )
    return lines


def cells(row: Any) -> list[Any]:
    """One line a network."""
    return [
        row.network, f"{row.parameters / 1e6:.1f} M" if row.parameters >= 1e5 else row.parameters,
        row.weights, row.found, row.certified, row.groups_certified, row.groups_unexplained, row.shifts,
        row.shifts_unexplained, row.contradictions, row.converted, row.kept_radius,
        *(f"{value:.0e}" for value in (row.worst_certificate, row.eval_difference, row.train_difference,
                                       row.keep_train_difference)),
        f"{row.diagnose_seconds:.1f} s", f"{row.convert_seconds:.1f} s",
    ]  # fmt: skip
