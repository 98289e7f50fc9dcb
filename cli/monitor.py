"""`manifold-nets monitor`: show a file of `manifold_nets.Monitor` as a table, in words, and as a page."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from manifold_nets.documents import without_infinities
from manifold_nets.errors import ManifoldNetsError

from .options import INPUT_FILE, OutputFile
from .output import columns_table, echo, print_error, show

if TYPE_CHECKING:
    from rich.table import Table

    from manifold_nets.monitor_records import History


@click.command()
@click.argument("run", metavar="RUN.csv", type=INPUT_FILE)
@click.option("--html", type=OutputFile(".html", ".htm"), help="Also write one self-contained HTML page with plots.")
@click.option("--depth", type=click.IntRange(min=1), help="Group weights by so many leading parts of their names.")
@click.option("--total-steps", type=click.IntRange(min=1), help="Length of the run.  [default: the last step]")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document to standard output.")
def monitor(run: Path, html: Path | None, depth: int | None, total_steps: int | None, *, as_json: bool) -> None:
    """Show how the scale-invariant weights of a run turned, from the file that Monitor(…, writer="RUN.csv") wrote."""
    from manifold_nets.monitor_records import History

    try:
        history = History.from_csv(run)
        findings = history.findings(total_steps or history.steps[-1] + 1)
        if html is not None:
            from manifold_nets.monitor_page import write_page

            write_page(history, html, title=run.stem, total_steps=total_steps or history.steps[-1] + 1)
    except (ManifoldNetsError, OSError) as error:
        if as_json:
            document = {"command": "monitor", "run": str(run), "ok": False, "failures": [str(error)]}
            echo(json.dumps({**document, "error": type(error).__name__}, indent=2, ensure_ascii=False))
        print_error(str(error))
        raise click.exceptions.Exit(1) from error
    if as_json:
        document = {"command": "monitor", "run": str(run), "ok": True, "failures": [], "steps": history.steps}
        document |= {"findings": [vars(finding) for finding in findings], "summary": history.summary(depth)}
        document |= {} if html is None else {"html": str(html)}
        echo(json.dumps(without_infinities(document), indent=2, ensure_ascii=False, allow_nan=False))
        return
    sentences = [finding.text for finding in findings] or ["Nothing unusual found."]
    show(_table(history, depth), *sentences, *([] if html is None else [f"The page is in {html}."]))


def _table(history: History, depth: int | None) -> Table:
    """One row for each weight or layer, with its numbers at the last measured step."""
    title = f"Steps {history.steps[0]:,} to {history.steps[-1]:,}; values at the last step"
    names = ("groups", "norm", "radians per step", "in equilibrium", "steps left at this rate", "radial gradient")
    table = columns_table("weight" if depth is None else "layer", *names, title=title)
    for row in history.summary(depth):
        numbers = (row[name] for name in ("norm", "rotation", "equilibrium_rotation"))
        steps = row["steps_to_equilibrium"]
        table.add_row(
            row.get("weight", row.get("layer")),
            str(row["groups"]),
            *map(_cell, numbers),
            f"{steps:,.0f}" if math.isfinite(steps) else _cell(steps),
            _cell(row["radial_gradient"]),
        )
    return table


def _cell(value: Any) -> str:
    return "–" if math.isnan(value) else f"{value:.3g}"
