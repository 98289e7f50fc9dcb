"""`manifold-nets export`: revert a converted model to an ordinary one, and write it to a file."""

from __future__ import annotations

from pathlib import Path

import click

from .options import OutputFile, Request, model_options, require_ending
from .output import Outcome, progress, reported, rows_table

_FORMATS = ("safetensors", "onnx", "pt2")


@click.command()
@model_options
@click.option("--output", type=OutputFile(), required=True, help="File to write.")
@click.option("--format", "file_format", type=click.Choice(_FORMATS), help="Default: by the ending, else safetensors.")
@reported
def export(request: Request, output: Path, file_format: str | None) -> Outcome:
    """Revert the converted MODEL (--weights FILE) to an ordinary one: weights, ONNX or .pt2.

    The reverted model is compared with the converted one, and the written file, read back, with the reverted model.
    """
    from manifold_nets.conversion.export import export_model

    named = output.suffix.lower().removeprefix(".")
    if file_format is None:
        endings = tuple(f".{name}" for name in _FORMATS)
        require_ending(output, endings, "name the format of the file with --format")
        file_format = named if named in _FORMATS else "safetensors"
    elif named in _FORMATS:
        require_ending(output, (f".{file_format}",))
    with progress(f"Exporting {request.spec} and comparing both …"):
        model = request.model()
        record = export_model(model, output, request.inputs(model), format=file_format)  # type: ignore[arg-type]
    unread = "not run" if record.file_difference is None else record.file_difference
    rows: dict[str, object] = {
        "weights taken off their spheres": record.reverted,
        "largest relative difference, evaluation mode": record.verification.eval_difference,
        "largest relative difference, training mode": record.verification.train_difference,
        "largest relative difference, file read back": unread,
        "read back by": record.read_by,
        **({} if record.batch is None else {"batch sizes that the file takes": record.batch}),
        "written": output,
    }
    document = {"output": str(output), "export": record.to_dict()}
    return Outcome(document, (rows_table(f"{request.spec} as {file_format}", rows),))
