"""Export a model for other programs: plain safetensors, ONNX, or torch's own `.pt2`."""

from __future__ import annotations

import importlib
import inspect
import io
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import is_concrete_int
from torch.utils import _pytree as pytree

from manifold_nets._torch import nothing_left_behind
from manifold_nets.constraints import constrained_weights
from manifold_nets.conversion.revert import revert
from manifold_nets.conversion.verify import Verification, both_modes, compare_outputs, eval_limit, verify
from manifold_nets.errors import ExportError, FunctionChangedError, MissingExtraError, OptionError
from manifold_nets.files import atomic_file
from manifold_nets.models import disable_cache, dtype_of
from manifold_nets.running import Inputs, output_tensors, split_inputs

__all__ = ["ExportRecord", "FileFormat", "export_model"]

FileFormat = Literal["safetensors", "onnx", "pt2"]


@dataclass(frozen=True)
class ExportRecord:
    """What an export wrote and how it was checked.

    Args:
        path: the file.
        format: ``"safetensors"``, ``"onnx"`` or ``"pt2"``.
        reverted: number of weights that were on spheres.
        verification: differences between the model and the reverted one.
        file_difference: largest relative difference in evaluation mode between the reverted model and the file after
            reading it back; None if nothing could run the file.
        read_by: the program that read the file back.
        batch: the batch sizes that the file accepts: ``"any"``, or that of the example inputs; None for a file of
            weights.
    """

    path: Path
    format: FileFormat
    reverted: int
    verification: Verification
    file_difference: float | None
    read_by: str
    batch: int | Literal["any"] | None

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {**vars(self), "path": str(self.path), "verification": self.verification.to_dict()}


def export_model(
    model: nn.Module,
    path: str | os.PathLike[str],
    example_inputs: Any,
    *,
    format: FileFormat = "safetensors",  # noqa: A002
) -> ExportRecord:
    """Export a model as an ordinary one: revert it, compare both, write the file, read it back, and compare again.

    A safetensors file holds the plain `state_dict`. ONNX and `.pt2` files hold the network in evaluation mode, with a
    dynamic batch size if the network allows it; ONNX needs the extra ``onnx``. The file is written completely and
    checked, or not at all.

    Args:
        model: a converted model, or any other; it is not changed.
        path: the file to write.
        example_inputs: as for `diagnose`.
        format: ``"safetensors"``, ``"onnx"`` or ``"pt2"``.

    Returns:
        An `ExportRecord` with the measured differences.

    Raises:
        FunctionChangedError: the output of the reverted model, or of the file, differs by more than rounding.
        ExportError: the model cannot be exported to this format, or the file cannot be run.
        MissingExtraError: a package that the format needs is not installed.
        ExampleInputsError: the model does not accept the inputs.
        FileNotFoundError: the folder of ``path`` does not exist.

    Example:
        >>> import tempfile, torch
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU())
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     record = export_model(net, f"{folder}/net.pt2", torch.randn(2, 4), format="pt2")
        >>> record.file_difference, record.batch
        (0.0, 'any')
    """
    if format not in get_args(FileFormat):
        raise OptionError("format", format, f"one of {', '.join(get_args(FileFormat))}")
    if format == "onnx":
        _require_onnx()
    plain = revert(model)
    verification = verify(model, plain, example_inputs)
    limit = eval_limit(dtype_of(plain))
    for mode, difference in (("evaluation", verification.eval_difference), ("training", verification.train_difference)):
        if not difference <= limit:
            remedy = "No file was written. Export a model whose output depends only on its inputs and the seed."
            raise FunctionChangedError(type(model).__name__, mode, difference, limit, remedy)
    write = {"safetensors": _write_safetensors, "onnx": _write_onnx, "pt2": _write_pt2}[format]
    with atomic_file(path) as temporary:
        found, read_by, batch = write(plain, temporary, split_inputs(example_inputs), Path(path))
        # Another engine sums in another order, and first folds the normalizations into the weights.
        allowed = 10 * limit if format == "onnx" else limit
        if found is not None and not found <= allowed:
            remedy = "No file was written. Export only the weights, in the safetensors format."
            raise FunctionChangedError(f"{path} ({type(model).__name__})", "evaluation", found, allowed, remedy)
    count = sum(1 for _ in constrained_weights(model))
    return ExportRecord(Path(path), format, count, verification, found, read_by, batch)


# The difference between the outputs of the model and those of the file, where it was run; what read it; the batch.
_Written = tuple[float | None, str, int | Literal["any"] | None]


def _write_safetensors(plain: nn.Module, file: Path, inputs: Inputs, final: Path) -> _Written:
    safetensors.torch.save_model(plain, str(file))
    # Reading it into a model with other values shows that the file alone holds everything.
    copied = revert(plain)
    with torch.no_grad():
        for value in copied.state_dict().values():
            value.zero_()
    safetensors.torch.load_model(copied, file)
    return verify(plain, copied, inputs).eval_difference, "safetensors", None


def _write_pt2(plain: nn.Module, file: Path, inputs: Inputs, final: Path) -> _Written:
    program = _program(plain, inputs, final)
    # torch ends the process where it cannot write to a file; memory does not refuse it.
    content = io.BytesIO()
    torch.export.save(program, content)
    file.write_bytes(content.getbuffer())
    with file.open("rb") as stream:
        run = torch.export.load(stream).module()
    with torch.no_grad():
        outputs = output_tensors(run(*inputs[0], **inputs[1]))
    return _difference(plain, inputs, outputs), "torch.export", _batch(program)


def _write_onnx(plain: nn.Module, file: Path, inputs: Inputs, final: Path) -> _Written:
    program = _program(plain, inputs, final)
    with warnings.catch_warnings():
        # torch's exporter uses a function of torch that is deprecated.
        warnings.filterwarnings("ignore", ".*LeafSpec.*", FutureWarning)
        translate: Callable[..., Any] = torch.onnx.export
        try:
            onnx_program = translate(program, dynamo=True, verbose=False)
            onnx_program.save(str(file), external_data=False)
        except Exception as error:
            raise ExportError(final, "ONNX", error) from error
    importlib.import_module("onnx").checker.check_model(str(file))
    try:
        outputs = _run_onnx(file, inputs)
    except Exception as error:
        raise ExportError(final, "onnxruntime", error) from error
    if outputs is None:
        return None, "onnx.checker (onnxruntime is not installed: the file was not run)", _batch(program)
    return _difference(plain, inputs, outputs), "onnxruntime", _batch(program)


def _run_onnx(file: Path, inputs: Inputs) -> list[Tensor] | None:
    """Outputs of an ONNX file on the inputs, or None without a runtime."""
    try:
        runtime = importlib.import_module("onnxruntime")
    except ModuleNotFoundError:
        return None
    session = runtime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    given = [leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor)]
    names = [entry.name for entry in session.get_inputs()]
    arrays = [tensor.detach().cpu().numpy() for tensor in given]
    return [torch.from_numpy(array) for array in session.run(None, dict(zip(names, arrays, strict=True)))]


def _program(plain: nn.Module, inputs: Inputs, final: Path) -> torch.export.ExportedProgram:
    """Trace a model in evaluation mode, with a dynamic first axis of every input if the model allows it."""
    plain = plain.eval()
    disable_cache(plain)
    bound = inspect.signature(plain.forward).bind(*inputs[0], **inputs[1]).arguments

    def first_axis(leaf: Any) -> dict[int, Any] | None:
        # torch.export takes a size of 1 as fixed.
        return {0: torch.export.Dim.AUTO} if isinstance(leaf, Tensor) and leaf.ndim and leaf.shape[0] > 1 else None

    shapes = pytree.tree_map(first_axis, dict(bound))
    try:
        with torch.no_grad(), nothing_left_behind(plain):
            return torch.export.export(plain, inputs[0], inputs[1], dynamic_shapes=shapes)
    except Exception as error:
        raise ExportError(final, "torch.export", error) from error


def _batch(program: torch.export.ExportedProgram) -> int | Literal["any"] | None:
    names = set(program.graph_signature.user_inputs)
    values = [node.meta["val"] for node in program.graph.find_nodes(op="placeholder") if node.name in names]
    sizes: list[Any] = [value.shape[0] for value in values if isinstance(value, Tensor) and value.ndim]
    fixed = [int(size) for size in sizes if is_concrete_int(size)]
    return fixed[0] if fixed else "any" if sizes else None


def _difference(plain: nn.Module, inputs: Inputs, outputs: list[Tensor]) -> float:
    """Relative difference between a model's outputs in evaluation mode and those of its file."""
    expected = both_modes(plain, inputs)["eval"]
    floating = [output for output in outputs if output.is_floating_point()]
    return compare_outputs({"eval": expected, "train": []}, {"eval": floating, "train": []}).eval_difference


def _require_onnx() -> None:
    for package in ("onnx", "onnxscript"):
        try:
            importlib.import_module(package)
        except ModuleNotFoundError as error:
            raise MissingExtraError(package, "ONNX files", "onnx") from error
