"""`manifold-nets diagnose`: which weights have a scale that the network does not see."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal

import click
from rich.console import RenderableType

from manifold_nets.symmetry import diagnose as find_symmetries
from manifold_nets.symmetry.learning_rates import matched_learning_rates
from manifold_nets.symmetry.optimizer_settings import OptimizerSettings
from manifold_nets.symmetry.page import write_page

from .learning_rates import optimizer_options, shown_rates
from .options import Number, OutputFile, Request, model_options
from .outcome import Outcome, reported
from .render import families_table, progress, report_table, shifts_table, unexplained_table


@click.command()
@model_options
@click.option(
    "--tolerance",
    type=Number(min=0, min_open=True, max=math.inf, max_open=True),
    metavar="NUMBER",
    default=1e-8,
    show_default=True,
    help="Largest certificate of an invariant group.",
)
@click.option(
    "--loss",
    type=click.Choice(["cross_entropy", "softmax"]),
    help="What the outputs are logits of: shifts of all logits count as well.",
)
@click.option(
    "--memory",
    type=click.Choice(["full", "small"]),
    default="full",
    show_default=True,
    help="small: float64 for one weight at a time, and no search beyond what the structure explains.",
)
@click.option("--html", type=OutputFile(".html", ".htm"), help="Also write the report as one self-contained HTML page.")
@reported
@optimizer_options
def diagnose(
    request: Request,
    tolerance: float,
    loss: str | None,
    memory: Literal["full", "small"],
    html: Path | None,
    settings: OptimizerSettings | None,
) -> Outcome:
    """Find the weights of MODEL whose scale its output does not depend on, why, how sure, and the remedy."""
    with progress(f"Tracing {request.spec} and certifying its symmetries …"):
        model = request.model()
        report = find_symmetries(
            model, request.inputs(model), tolerance=tolerance, seed=request.seed, loss=loss, memory=memory
        )
    found = f"{len(report.invariant)} of {len(report.weights)} weights are scale-invariant."
    remedies = [f"{weight.name}: {weight.remedy}" for weight in report.disagreements]
    remedies += [f"{family}: {family.remedy}" for family in report.refuted_families]
    remedies += [f"{shift}: {shift.remedy}" for shift in report.refuted_shifts]
    failures = [f"structure and certificate disagree on {text}" for text in remedies]
    document: dict[str, object] = {"report": report.to_dict()}
    shown: list[RenderableType] = [report_table(report), found]
    families = families_table(report)
    if families is not None:
        shown.append(families)
    if report.shifts:
        shown.append(shifts_table(report))
    if report.unexplained:
        shown.append(unexplained_table(report))
        counts = f"{report.unexplained_groups} invariant groups and {report.unexplained_shifts} shifts"
        shown.append(f"{counts} are not explained by the structure.")
    if report.not_searched:
        shown.append(f"Left out: {report.not_searched}.")
    if settings is not None:
        rates = matched_learning_rates(model, report, **vars(settings))
        document["learning_rates"] = rates.to_dict()
        shown += shown_rates(rates)
    if html is not None:
        write_page(report, model, html)
        document["html"] = str(html)
        shown.append(f"The page is in {html}.")
    return Outcome(document, tuple(shown), tuple(failures))
