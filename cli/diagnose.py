"""`manifold-nets diagnose`: the symmetries of a model's weights, and matching learning rates on spheres."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from manifold_nets.errors import OptionError, listed

from .options import Number, OutputFile, Request, model_options
from .output import Outcome, columns_table, progress, reported, styled

if TYPE_CHECKING:
    from manifold_nets.symmetry import LearningRates, SymmetryReport, WeightFinding
    from manifold_nets.symmetry.report import ShiftSymmetry

_TOLERANCE = Number(min=0, min_open=True, max=math.inf, max_open=True)
_LOSS = click.Choice(["cross_entropy", "softmax"])
_MEMORY = click.Choice(["full", "small"])
_OPTIMIZERS = click.Choice(["sgd", "adam", "adamw"])


@click.command()
@model_options
@click.option("--tolerance", type=_TOLERANCE, metavar="NUMBER", default=1e-8, help="Largest certificate of a symmetry.")
@click.option("--loss", type=_LOSS, help="Loss on the logits: also find shifts of all logits.")
@click.option("--memory", type=_MEMORY, default="full", help="small: float64 for one weight at a time, and no search.")
@click.option("--html", type=OutputFile(".html", ".htm"), help="Also write the report as one self-contained HTML page.")
@reported
@click.option(
    "--optimizer", type=_OPTIMIZERS, help="Optimizer of the plain network: find the matching rates on spheres."
)
@click.option("--lr", type=float, help="Its learning rate.")
@click.option("--momentum", type=float, help="Momentum of sgd.  [default: 0]")
@click.option("--betas", type=float, nargs=2, help="Both betas of adam and adamw.  [default: 0.9 0.999]")
@click.option("--weight-decay", type=float, help="Its weight decay.  [default: 0]")
def diagnose(
    request: Request, tolerance: float, loss: str | None, memory: Literal["full", "small"], html: Path | None,
    **optimizer_settings: Any,
) -> Outcome:  # fmt: skip
    """Find the scale-invariant weights of MODEL: which groups, why, with what certainty, and what to do."""
    from manifold_nets import symmetry

    settings = _checked_settings(**optimizer_settings)
    with progress(f"Diagnosing {request.spec} …"):
        model = request.model()
        report = symmetry.diagnose(
            model, request.inputs(model), tolerance=tolerance, seed=request.seed, loss=loss, memory=memory
        )
    refuted = [(weight.name, weight.remedy) for weight in report.disagreements]
    refuted += [(str(family), family.remedy) for family in report.refuted_families]
    refuted += [(str(shift), shift.remedy) for shift in report.refuted_shifts]
    failures = tuple(f"structure and certificate disagree on {name}: {remedy}" for name, remedy in refuted)
    document: dict[str, object] = {"report": report.to_dict()}
    shown = list(_report_parts(report))
    if settings is not None:
        rates = symmetry.matched_learning_rates(model, report, **settings)
        document["learning_rates"] = rates.to_dict()
        shown += _rates_parts(rates)
    if html is not None:
        from manifold_nets.symmetry.page import write_page

        write_page(report, model, html)
        document["html"] = str(html)
        shown.append(f"The page is in {html}.")
    return Outcome(document, tuple(shown), failures)


def _checked_settings(optimizer: str | None, **options: Any) -> dict[str, Any] | None:
    """The settings of the plain network's optimizer, checked before the work begins; None if none is named."""
    given = {name: value for name, value in options.items() if value is not None}
    if optimizer is None:
        if given:
            flags = ", ".join(f"--{name.replace('_', '-')}" for name in given)
            raise click.UsageError(f"{flags} can be used only with --optimizer.")
        return None
    if "lr" not in given:
        raise click.UsageError("--optimizer needs --lr with its learning rate.")
    other = "betas" if optimizer == "sgd" else "momentum"
    if other in given:
        raise click.UsageError(f"--optimizer {optimizer} has no --{other}; leave that out.")
    from manifold_nets.symmetry.optimizer_settings import OptimizerSettings

    try:
        return vars(OptimizerSettings(optimizer, **given))
    except OptionError as error:
        raise click.UsageError(str(error)) from error


def _report_parts(report: SymmetryReport) -> Iterable[RenderableType]:
    """Yield the tables of a report, and sentences about them."""
    table = columns_table(
        "weight", "status", "certificate", "groups", "absorbed or broken by", title=f"{report.model}: symmetries"
    )
    for weight in report.weights:
        certificate = _certificate(weight.certificate.verdict, weight.certificate.value)
        table.add_row(weight.name, styled(weight.status), certificate, weight.groups_in_words, _why(weight))
    yield table
    yield f"{len(report.invariant)} of {len(report.weights)} weights are scale-invariant."
    if any(len(family.parameters) > 1 or family.partial for family in report.families):
        yield _families_table(report)
    if report.shifts:
        yield _shifts_table(report)
    if report.unexplained:
        title = "Invariant, not explained by the structure"
        table = columns_table("parameters", "kind", "count", "certificate", "groups", title=title)
        for found in report.unexplained:
            names = " with ".join(found.parameters)
            table.add_row(names, found.kind, str(found.count), f"{found.value:.1e}", str(found.partition))
        yield table
        counts = f"{report.unexplained_groups} invariant groups and {report.unexplained_shifts} shifts"
        yield f"{counts} are not explained by the structure."
    if report.not_searched:
        yield f"Left out: {report.not_searched}."


def _families_table(report: SymmetryReport) -> Table:
    """Tabulate the scale symmetries that several parameters share, one row per family."""
    title = "Symmetries across parameters"
    table = columns_table("kind", "count", "certificate", "multiplied", "divided", title=title)
    for family in report.families:
        if len(family.parameters) == 1 and not family.partial:
            continue
        parts: tuple[list[str], list[str]] = ([], [])
        for member in family.members:
            divided = member.exponent is not None and member.exponent < 0
            parts[divided].append(f"{member.parameter} {member.part}")
        found = family.certificate
        certificate = _certificate(found.verdict, found.value if found.verdict == "invariant" else None)
        table.add_row(family.kind, str(family.count), certificate, *(listed(names, limit=2) for names in parts))
    return table


def _shifts_table(report: SymmetryReport) -> Table:
    """Tabulate the shifts that change no output, one row for each kind and operation that absorbs them."""
    found: dict[tuple[str, str, str], list[ShiftSymmetry]] = {}
    for shift in report.shifts:
        operations = ", ".join(dict.fromkeys(absorber.op for absorber in shift.absorbers))
        operations += f", {shift.condition}" if shift.condition else ""
        found.setdefault((shift.kind, shift.certificate.verdict, operations), []).append(shift)
    title = "Shifts without effect"
    table = columns_table("shift", "count", "certificate", "parameters", "absorbed by", title=title)
    for (kind, verdict, operations), shifts in found.items():
        values = [shift.certificate.value for shift in shifts if shift.certificate.value is not None]
        certificate = _certificate(verdict, max(values) if verdict == "invariant" else None)
        names = dict.fromkeys(name for shift in shifts for name in shift.parameters)
        table.add_row(kind, str(sum(s.count for s in shifts)), certificate, listed(names, limit=2), operations)
    return table


def _certificate(verdict: str, value: float | None) -> str:
    return verdict if value is None else f"{value:.1e}"


def _why(weight: WeightFinding) -> str:
    if weight.partition is None:
        return weight.broken_by or weight.remedy
    modules = dict.fromkeys(absorber.module or "model" for absorber in weight.absorbers)
    operations = dict.fromkeys(absorber.op for absorber in weight.absorbers)
    found = f"{listed(modules, limit=2)} ({', '.join(operations)})"
    if weight.certificate.because:
        found += f"; {weight.certificate.because}"
    return f"{found}; certificate{weight.certificate.place.removeprefix(',')}" if weight.certificate.taken_at else found


def _rates_parts(rates: LearningRates) -> Iterable[RenderableType]:
    """Yield a table of learning rates, one row per weight and one for all groups together, between two sentences."""
    # A title or a caption would be folded to the width of the table.
    yield Text(f"\nLearning rates on spheres that match the next step of {rates.settings}:")
    table = columns_table("weight", "groups", "median norm", "median", "quartiles", "smallest … largest")
    spreads = [(w.name, w.groups, f"{w.norms.median:.3g}", w.next_step) for w in rates.weights]
    if rates.next_step is not None:
        spreads.append(("all", sum(weight.groups for weight in rates.weights), "", rates.next_step))
    for name, groups, norm, spread in spreads:
        quartiles = f"{spread.lower_quartile:.3g} … {spread.upper_quartile:.3g}"
        ends = f"{spread.smallest:.3g} … {spread.largest:.3g}"
        table.add_row(name, str(groups), norm, f"{spread.median:.3g}", quartiles, ends)
    yield table
    yield Text(f"{rates.long_run[0].upper()}{rates.long_run[1:]}.")
