"""`manifold-nets convert`: the scale-invariant weights of a model put on their spheres, and written to a file."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, cast

import click

from manifold_nets.conversion import REMEDIES, ConversionRecord, conversion_record
from manifold_nets.conversion import convert as put_on_spheres
from manifold_nets.conversion import write_plan as write_plan_file
from manifold_nets.conversion.actions import chosen_remedies
from manifold_nets.conversion.checkpoint import save
from manifold_nets.errors import OptionError

from .options import Number, OutputFile, Request, model_options
from .outcome import Outcome, reported
from .render import plan_table, progress, rows_table

_DONE = {
    "remove": "biases removed",
    "balance": "families of rescalings balanced",
    "joint sphere": "spheres across weights",
}


def _remedies(context: click.Context, parameter: click.Parameter, value: str) -> tuple[str, ...]:
    try:
        return chosen_remedies(value)
    except OptionError as error:
        raise click.BadParameter(str(error), context, parameter) from error


@click.command()
@model_options
@click.option(
    "--output",
    type=OutputFile(".safetensors", remedy="write ONNX and .pt2 files with manifold-nets export"),
    help="safetensors file to write; without it, the result is only shown.",
)
@click.option(
    "--remedies",
    callback=_remedies,
    default="spheres",
    show_default=True,
    metavar="NAMES",
    help=f"What to do: 'all', or some of {','.join(REMEDIES)}.",
)
@click.option(
    "--radius",
    type=click.Choice(["unit", "keep"]),
    default="unit",
    show_default=True,
    help="Norm of every group: 1 where eps allows it, or what it is.",
)
@click.option(
    "--train-tolerance",
    type=Number(min=0),
    default=1e-4,
    show_default=True,
    help="A layer whose training-mode output eps would change by more keeps its norms.",
)
@click.option(
    "--max-train-difference",
    type=Number(min=0),
    default=1e-2,
    show_default=True,
    help="Nothing is written where the network's training-mode output changes by more.",
)
@click.option("--include", multiple=True, metavar="PATTERN", help="Weights to convert, such as 'layer1.*'; repeatable.")
@click.option("--exclude", multiple=True, metavar="PATTERN", help="Weights to leave; repeatable.")
@click.option("--write-plan", type=OutputFile(".json"), help="Write the plan as JSON, to read and edit.")
@click.option(
    "--plan",
    "plan_file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Carry out this edited plan; not together with the options that choose what to do.",
)
@reported
def convert(
    request: Request,
    output: Path | None,
    remedies: tuple[str, ...],
    radius: Literal["unit", "keep"],
    train_tolerance: float,
    max_train_difference: float,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    write_plan: Path | None,
    plan_file: Path | None,
) -> Outcome:
    """Put the scale-invariant weights of MODEL on spheres, or carry out other remedies, check that it computes the
    same, and write it.
    """
    changed = remedies != ("spheres",) or radius != "unit" or include or exclude or train_tolerance != 1e-4
    if plan_file is not None and changed:
        raise click.UsageError(
            "--plan says all that --remedies, --radius, --train-tolerance, --include and --exclude say."
        )
    with progress(f"Converting {request.spec} and comparing both …"):
        model = request.model()
        converted = put_on_spheres(
            model,
            request.inputs(model),
            remedies="spheres" if plan_file is not None else remedies,
            radius=radius,
            include=include or None,
            exclude=exclude or None,
            train_tolerance=train_tolerance,
            plan=plan_file,
        )
    record = cast("ConversionRecord", conversion_record(converted))
    found, in_float64 = record.verification, record.verification.float64_eval_difference
    if write_plan is not None:
        write_plan_file(record.plan, write_plan)
    failures, nothing = [], "nothing" if write_plan is None else f"nothing but the plan, {write_plan},"
    if not found.train_difference <= max_train_difference:
        failures.append(
            f"{request.spec}: its output in training mode would change by {found.train_difference:.3g}, relative, more "
            f"than {max_train_difference:.3g}; {nothing} was written. Lower --train-tolerance, or use --radius keep."
        )
    elif output is not None:
        save(converted, output)
    written = output if output is not None and not failures else None
    rows = {
        "weights on spheres": sum(action.action in ("sphere", "already") for action in record.plan.actions),
        **{label: len(record.plan.of(what)) for what, label in _DONE.items() if record.plan.of(what)},
        "largest relative difference, evaluation mode": found.eval_difference,
        **({} if in_float64 is None else {"the same of float64 copies": in_float64}),
        "largest relative difference, training mode": found.train_difference,
        "written": written or "nothing",
        **({} if write_plan is None else {"plan written": write_plan}),
    }
    document = {"output": None if written is None else str(written), **record.to_dict()}
    return Outcome(document, (plan_table(record.plan), rows_table("Result", rows)), tuple(failures))
