"""Results as tables for people, on standard output; progress and complaints, on standard error."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import click
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from manifold_nets.conversion import ConversionPlan
from manifold_nets.errors import listed
from manifold_nets.symmetry import SymmetryReport, WeightFinding
from manifold_nets.symmetry.report import ShiftSymmetry

__all__ = [
    "complain",
    "families_table",
    "note",
    "plan_table",
    "progress",
    "put_out",
    "report_table",
    "rows_table",
    "shifts_table",
    "show",
    "unexplained_table",
]

# Where output goes to a file there is no window to fit into, and a line should stay a line, however long.
_FILE_WIDTH = 100_000

_STYLES = {
    "invariant": "green",
    "constrained": "green",
    "sphere": "green",
    "already": "green",
    "remove": "green",
    "balance": "green",
    "joint sphere": "green",
    "not invariant": "yellow",
    "no evidence": "yellow",
    "leave": "yellow",
    "unknown": "magenta",
    "disagreement": "bold red",
}


def _console(*, stderr: bool = False) -> Console:
    # Names and paths are shown as they are, also where they look like rich's markup or like the name of an emoji.
    console = Console(stderr=stderr, highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console.width = _FILE_WIDTH
    return console


def show(*parts: RenderableType) -> None:
    """Print parts of a result to standard output."""
    console = _console()
    if console.is_terminal:
        console.print(*parts, sep="\n")
        return
    with console.capture() as captured:
        console.print(*parts, sep="\n")
    # Tables fill their lines with blanks, which a file need not keep.
    put_out("\n".join(line.rstrip() for line in captured.get().splitlines()))


def put_out(text: str) -> None:
    """Write to standard output; where it takes no more, say so and end the command with status 1."""
    try:
        click.echo(text)
    except BrokenPipeError:
        raise  # whoever read it has seen enough, which click knows
    except OSError as error:
        # What is left in the buffer would be tried again, and complained about, when Python ends.
        sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115
        complain(f"standard output: {error.strerror or error}; the result is not complete. Make room, or redirect it.")
        raise click.exceptions.Exit(1) from error


def note(text: str) -> None:
    """Say something on standard error."""
    _console(stderr=True).print(Text(text), soft_wrap=True)


def complain(text: str) -> None:
    """Say what went wrong on standard error."""
    _console(stderr=True).print(Text.assemble(("error: ", "bold red"), text), soft_wrap=True)


@contextmanager
def progress(text: str) -> Iterator[None]:
    """Show a spinner on standard error while a block runs, where standard error is a terminal."""
    console = _console(stderr=True)
    if not console.is_terminal:
        yield
        return
    with console.status(Text(text)):
        yield


def report_table(report: SymmetryReport) -> Table:
    """Tabulate a report: one row a weight, with what absorbs its scale or what breaks the chain."""
    columns = ("weight", "status", "certificate", "groups", "absorbed or broken by")
    table = _table(*columns, title=f"{report.model}: symmetries")
    for weight in report.weights:
        groups = weight.groups_in_words
        value = weight.certificate.value
        certificate = weight.certificate.verdict if value is None else f"{value:.1e}"
        table.add_row(weight.name, _styled(weight.status), certificate, groups, _why(weight))
    return table


def families_table(report: SymmetryReport) -> Table | None:
    """Tabulate the scale symmetries that several parameters share, one row a family; None where there are none."""
    shared = [family for family in report.families if len(family.parameters) > 1 or family.partial]
    if not shared:
        return None
    table = _table("kind", "count", "certificate", "multiplied", "divided", title="Symmetries across parameters")
    for family in shared:
        value = family.certificate.value
        certificate = f"{value:.1e}" if family.certificate.verdict == "invariant" else family.certificate.verdict
        parts = {
            sign: [
                f"{m.parameter} {m.part}" for m in family.members if (m.exponent is not None and m.exponent < 0) == sign
            ]
            for sign in (False, True)
        }
        table.add_row(
            family.kind, str(family.count), certificate, listed(parts[False], limit=2), listed(parts[True], limit=2)
        )
    return table


def shifts_table(report: SymmetryReport) -> Table:
    """Tabulate the shifts that the function does not see, one row for each kind and operation that absorbs them."""
    found: dict[tuple[str, str, str], list[ShiftSymmetry]] = {}
    for shift in report.shifts:
        operations = ", ".join(dict.fromkeys(absorber.op for absorber in shift.absorbers))
        operations += f", {shift.condition}" if shift.condition else ""
        found.setdefault((shift.kind, shift.certificate.verdict, operations), []).append(shift)
    table = _table("shift", "count", "certificate", "parameters", "absorbed by", title="Shifts without effect")
    for (kind, verdict, operations), shifts in found.items():
        values = [shift.certificate.value for shift in shifts if shift.certificate.value is not None]
        certificate = f"{max(values):.1e}" if verdict == "invariant" else f"{verdict}"
        names = dict.fromkeys(name for shift in shifts for name in shift.parameters)
        table.add_row(kind, str(sum(s.count for s in shifts)), certificate, listed(names, limit=2), operations)
    return table


def unexplained_table(report: SymmetryReport) -> Table:
    """Tabulate what the certificate finds invariant and structure does not explain, one row a parameter and kind."""
    table = _table(
        "parameters", "kind", "count", "certificate", "groups", title="Invariant, not explained by the structure"
    )
    for found in report.unexplained:
        names = " with ".join(found.parameters)
        table.add_row(names, found.kind, str(found.count), f"{found.value:.1e}", str(found.partition))
    return table


def plan_table(plan: ConversionPlan) -> Table:
    """Tabulate a plan: one row a weight, with what is done, what eps changes in training mode, and what stands out."""
    table = _table("weight", "action", "groups", "radius", "eps effect", "reason", title=f"{plan.model}: conversion")
    for action in plan.actions:
        groups = "" if action.partition is None else str(action.partition)
        effect = "" if action.train_deviation is None else f"{action.train_deviation:.1e}"
        reason = "" if action.radius == "unit" else action.reason
        if action.members:
            reason = f"{listed(action.members, limit=3)}: {reason}"
        table.add_row(action.name, _styled(action.action), groups, action.radius or "", effect, reason)
    return table


def rows_table(title: str, rows: Mapping[str, object]) -> Table:
    """Tabulate names and values."""
    table = Table(title=title, title_justify="left", show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(name, f"{value:.2e}" if isinstance(value, float) else str(value))
    return table


def _table(*columns: str, title: str) -> Table:
    table = Table(title=title, title_justify="left", pad_edge=False, box=None, header_style="bold")
    for column in columns:
        # Where a window is narrow, explanations are folded before names are.
        table.add_column(column, overflow="fold", no_wrap=column == "weight")
    return table


def _styled(word: str) -> Text:
    return Text(word, style=_STYLES.get(word, ""))


def _why(weight: WeightFinding) -> str:
    if weight.partition is None:
        return weight.broken_by or weight.remedy
    modules = dict.fromkeys(absorber.module or "model" for absorber in weight.absorbers)
    operations = dict.fromkeys(absorber.op for absorber in weight.absorbers)
    found = f"{listed(modules, limit=2)} ({', '.join(operations)})"
    if weight.certificate.because:
        found += f"; {weight.certificate.because}"
    return f"{found}; certificate{weight.certificate.place.removeprefix(',')}" if weight.certificate.taken_at else found
