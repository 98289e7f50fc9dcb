"""`manifold-nets convert`: put the scale-invariant weights of a model on spheres, and write the model to a file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click
from rich.table import Table

from manifold_nets.errors import listed

from .options import INPUT_FILE, Folder, Number, OutputFile, Parsed, Request, is_same_file, model_options
from .output import Outcome, columns_table, progress, reported, rows_table, styled

if TYPE_CHECKING:
    from manifold_nets.conversion import ConversionPlan, ConversionRecord
    from manifold_nets.conversion.actions import Remedy

_NAMES = "dead-biases,balance,spheres,joint-spheres"
_OUTPUT = OutputFile(".safetensors", remedy="write ONNX and .pt2 files with manifold-nets export", or_folder=True)
_RADIUS = click.Choice(["unit", "keep"])
_DEFAULTS = {"remedies": ("spheres",), "radius": "unit", "train_tolerance": 1e-4, "include": (), "exclude": ()}
_DONE = {
    "remove": "biases removed",
    "balance": "balanced families of rescalings",
    "joint sphere": "joint spheres",
}


def _chosen_remedies(text: str) -> tuple[Remedy, ...]:
    from manifold_nets.conversion.actions import chosen_remedies

    return chosen_remedies(text)


@click.command()
@model_options
@click.option("--output", type=_OUTPUT, help="safetensors file to write, or FOLDER/ for hf: models.")
@click.option(
    "--remedies", type=Parsed("NAMES", _chosen_remedies), default="spheres", help=f"'all', or some of {_NAMES}."
)
@click.option("--radius", type=_RADIUS, default="unit", help="Norm of every group: 1 if eps allows it, or its own.")
@click.option(
    "--train-tolerance",
    type=Number(min=0),
    default=1e-4,
    help="Layers that eps would change more keep their norms.",
)
@click.option(
    "--max-train-difference",
    type=Number(min=0),
    default=1e-2,
    help="Write nothing if training-mode outputs change more.",
)
@click.option("--include", multiple=True, metavar="PATTERN", help="Weights to convert, such as 'layer1.*'; repeatable.")
@click.option("--exclude", multiple=True, metavar="PATTERN", help="Weights to leave; repeatable.")
@click.option("--write-plan", type=OutputFile(".json"), help="Write the plan as JSON, to read and edit.")
@click.option("--plan", "plan_file", type=INPUT_FILE, help="Edited plan to apply, in place of the other options.")
@reported
def convert(
    request: Request,
    output: Path | Folder | None,
    max_train_difference: float,
    write_plan: Path | None,
    plan_file: Path | None,
    **choices: Any,
) -> Outcome:
    """Put the scale-invariant weights of MODEL on spheres, or apply other remedies.

    The outputs before and after are compared, and the converted model is written.
    """
    from manifold_nets import conversion
    from manifold_nets.sources import save_pretrained

    _check_folder(output, request)
    if plan_file is not None and choices != _DEFAULTS:
        options = "--remedies, --radius, --train-tolerance, --include and --exclude"
        raise click.UsageError(f"--plan replaces {options}. Leave them out, or edit the plan.")
    choices |= {name: choices[name] or None for name in ("include", "exclude")}
    if plan_file is not None:
        del choices["remedies"]
    with progress(f"Converting {request.spec} and comparing both …"):
        model = request.model()
        converted = conversion.convert(model, request.inputs(model), plan=plan_file, **choices)
    record = cast("ConversionRecord", conversion.conversion_record(converted))
    if write_plan is not None:
        conversion.write_plan(record.plan, write_plan)
    failures: tuple[str, ...] = ()
    difference = record.verification.train_difference
    if not difference <= max_train_difference:
        written = "nothing" if write_plan is None else f"nothing but the plan, {write_plan},"
        change = f"would change by a relative {difference:.3g}, more than {max_train_difference:.3g}"
        remedy = "Lower --train-tolerance, or use --radius keep."
        failures = (f"{request.spec}: its output in training mode {change}; {written} was written. {remedy}",)
        output = None
    elif isinstance(output, Folder):
        save_pretrained(converted, output.path)
    elif output is not None:
        conversion.save(converted, output)
    document = {"output": None if output is None else str(output), **record.to_dict()}
    return Outcome(document, (_plan_table(record.plan), _result_table(record, output, write_plan)), failures)


def _check_folder(output: Path | Folder | None, request: Request) -> None:
    """Refuse a folder as the output of a model that is not written as one, and the folder of MODEL itself."""
    if not isinstance(output, Folder):
        return
    if request.spec.kind != "hf":
        raise click.UsageError(
            f"--output {output} names a folder; expected the name of a file. Only hf: models are written as folders."
        )
    if is_same_file(output.path, Path(request.spec.name)):
        raise click.UsageError(f"--output and MODEL name the same folder {output}. Choose another folder.")


def _result_table(record: ConversionRecord, output: Path | Folder | None, plan_file: Path | None) -> Table:
    """Tabulate what was done, how much the outputs changed, and what was written."""
    plan, found = record.plan, record.verification
    rows: dict[str, object] = {
        "weights on spheres": len(plan.of("sphere")) + len(plan.of("already")),
        **{label: len(plan.of(action)) for action, label in _DONE.items() if plan.of(action)},
        "largest relative difference, evaluation mode": found.eval_difference,
    }
    if found.float64_eval_difference is not None:
        rows["the same for float64 copies"] = found.float64_eval_difference
    rows |= {"largest relative difference, training mode": found.train_difference, "written": output or "nothing"}
    if plan_file is not None:
        rows["plan written"] = plan_file
    return rows_table("Result", rows)


def _plan_table(plan: ConversionPlan) -> Table:
    """Tabulate a plan, one row per weight: what is done, what eps changes in training mode, and why."""
    columns = ("weight", "action", "groups", "radius", "eps effect", "reason")
    table = columns_table(*columns, title=f"{plan.model}: conversion")
    for action in plan.actions:
        groups = "" if action.partition is None else str(action.partition)
        effect = "" if action.train_deviation is None else f"{action.train_deviation:.1e}"
        reason = "" if action.radius == "unit" else action.reason
        if action.members:
            reason = f"{listed(action.members, limit=3)}: {reason}"
        table.add_row(action.name, styled(action.action), groups, action.radius or "", effect, reason)
    return table
