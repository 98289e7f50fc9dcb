"""`manifold-nets export`: a converted model given back as an ordinary one, in a file."""

from __future__ import annotations

from pathlib import Path

import click

from manifold_nets.conversion.export import FileFormat, export_model

from .options import OutputFile, Request, model_options, require_ending
from .outcome import Outcome, reported
from .render import progress, rows_table

_BY_ENDING: dict[str, FileFormat] = {".safetensors": "safetensors", ".onnx": "onnx", ".pt2": "pt2"}


@click.command()
@model_options
@click.option("--output", type=OutputFile(), required=True, help="File to write.")
@click.option(
    "--format",
    "file_format",
    type=click.Choice(["safetensors", "onnx", "pt2"]),
    help="Default: by the name of the file, .onnx or .pt2, else safetensors.",
)
@reported
def export(request: Request, output: Path, file_format: FileFormat | None) -> Outcome:
    """Give the converted MODEL (--weights FILE) back as an ordinary one: weights, ONNX or .pt2.

    The reverted model is compared with the converted one, and the written file, read back, with the reverted model.
    """
    ending = output.suffix.lower()
    if file_format is None:
        require_ending(output, tuple(_BY_ENDING), "name the format of the file with --format")
    elif _BY_ENDING.get(ending, file_format) != file_format:
        require_ending(output, (f".{file_format}",))
    with progress(f"Exporting {request.spec} and comparing both …"):
        model = request.model()
        chosen = file_format or _BY_ENDING.get(ending, "safetensors")
        record = export_model(model, output, request.inputs(model), format=chosen)
    unread = "not run" if record.file_difference is None else record.file_difference
    rows = {
        "weights taken off their spheres": record.reverted,
        "largest relative difference, evaluation mode": record.verification.eval_difference,
        "largest relative difference, training mode": record.verification.train_difference,
        "largest relative difference, file read back": unread,
        "read back by": record.read_by,
        "batch sizes that the file takes": record.batch or "",
        "written": output,
    }
    shown = {name: value for name, value in rows.items() if value != ""}
    document = {"output": str(output), "export": record.to_dict()}
    return Outcome(document, (rows_table(f"{request.spec} as {chosen}", shown),))
