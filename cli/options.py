"""What every command reads alike: the model, its weights, and the shape of its inputs."""

from __future__ import annotations

import functools
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor, nn

from manifold_nets.errors import OutputFileError
from manifold_nets.files import is_stream
from manifold_nets.sources import ModelSpec, load_model
from manifold_nets.symmetry.diagnose import LARGEST_SEED
from manifold_nets.weights import load_weights

__all__ = ["Number", "OutputFile", "OutputFolder", "Request", "model_options", "require_ending"]

DTYPES = {"float32": torch.float32, "float64": torch.float64, "float16": torch.float16, "bfloat16": torch.bfloat16}


class _Model(click.ParamType[ModelSpec]):
    name = "MODEL"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> ModelSpec:
        try:
            return value if isinstance(value, ModelSpec) else ModelSpec.parse(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


class _Shape(click.ParamType[tuple[int, ...]]):
    name = "N,N,…"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        try:
            shape = tuple(int(size) for size in value.split(","))
        except ValueError:
            shape = (0,)
        if min(shape) < 1:
            self.fail(
                f"{value!r} is no shape; expected positive sizes without the batch, such as 3,224,224", param, ctx
            )
        return shape


class _Arguments(click.ParamType[dict[str, Any]]):
    name = "JSON"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> dict[str, Any]:
        if isinstance(value, dict):
            return value
        try:
            arguments = json.loads(value)
        except ValueError as error:
            self.fail(f"{value!r} is no JSON ({error}); expected an object such as '{{\"width\": 64}}'", param, ctx)
        if not isinstance(arguments, dict):
            self.fail(f"{value!r} is no JSON object; expected one such as '{{\"width\": 64}}'", param, ctx)
        return arguments


# Endings of names that say what is in a file. What has another ending, or none, may hold anything.
_ENDINGS = frozenset(
    ".safetensors .onnx .pt2 .pt .pth .bin .ckpt .pkl .pickle .npy .npz .h5 .hdf5 .tflite .pb .gguf .mlmodel .py "
    ".json .yaml .yml .toml .csv .html .htm .pdf .png .svg .db .zip .gz .tar".split()
)


def require_ending(path: Path, written: Sequence[str], remedy: str = "") -> None:
    """Refuse a name whose ending says that the file is of another kind than what is written into it.

    Args:
        path: the name.
        written: endings for what is written.
        remedy: what to do instead, where there is something.

    Raises:
        click.UsageError: the ending is that of another kind of file.
    """
    ending = path.suffix.lower()
    if ending in _ENDINGS and ending not in written:
        advice = f"End the name in {' or '.join(written)}{f', or {remedy}' if remedy else ''}."
        raise click.UsageError(f"{path}: no {ending} file would be written. {advice}")


class OutputFile(click.Path):
    """A file that a command is to write: its folder must exist, and it must not be a folder itself.

    Args:
        endings: of names that say what is written; any when left out.
        remedy: what to do to get another kind of file.
    """

    def __init__(self, *endings: str, remedy: str = "") -> None:
        super().__init__(dir_okay=False, writable=True, path_type=Path)
        self._endings, self._remedy = endings, remedy

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """Refuse, before any work is done, a path that could not be written in the end, or holds something else."""
        if os.path.basename(os.fspath(value)) in ("", ".", ".."):  # noqa: PTH119 (pathlib drops the separator)
            self.fail(f"{value!r} names a folder; expected the name of a file", param, ctx)
        path = Path(super().convert(value, param, ctx))  # type: ignore[arg-type]
        try:
            is_stream(path)
        except OutputFileError as error:
            self.fail(str(error), param, ctx)
        if not path.absolute().parent.is_dir():
            self.fail(f"the folder {path.parent} does not exist", param, ctx)
        if self._endings:
            require_ending(path, self._endings, self._remedy)
        return path


class OutputFolder(click.Path):
    """A folder that a command is to write into."""

    def __init__(self) -> None:
        super().__init__(file_okay=False, path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """Refuse a file, and what is named like one."""
        path = Path(super().convert(value, param, ctx))  # type: ignore[arg-type]
        if path.suffix.lower() in _ENDINGS and not path.is_dir():
            self.fail(f"{value!r} is named like a file; expected the name of a folder", param, ctx)
        return path


class Number(click.FloatRange):
    """A number in a range, which NaN never is, though it compares as neither too small nor too large."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Refuse NaN, and what is out of the range."""
        number = super().convert(value, param, ctx)
        if math.isnan(number):
            self.fail(f"{value} is not in the range {self._describe_range()}.", param, ctx)
        return float(number)


@dataclass(frozen=True)
class Request:
    """A model and its inputs, as asked for on the command line."""

    spec: ModelSpec
    kwargs: dict[str, Any]
    weights: Path | None
    input_shapes: tuple[tuple[int, ...], ...]
    batch_size: int
    token_ids: int | None
    dtype: torch.dtype | None
    seed: int

    def model(self) -> nn.Module:
        """Build the model, from the seed where it has no weights of its own."""
        torch.manual_seed(self.seed)
        model = load_model(self.spec, kwargs=self.kwargs)
        if self.dtype is not None:
            model = model.to(self.dtype)
        return model if self.weights is None else load_weights(model, self.weights)

    def inputs(self, model: nn.Module) -> tuple[Tensor, ...]:
        """Draw a batch of random inputs: standard normal in the model's dtype, or token ids."""
        generator = torch.Generator().manual_seed(self.seed)
        shapes = [(self.batch_size, *shape) for shape in self.input_shapes]
        if self.token_ids is not None:
            return tuple(torch.randint(self.token_ids, shape, generator=generator) for shape in shapes)
        floating = (p.dtype for p in model.parameters() if p.is_floating_point())
        dtype = next(floating, torch.get_default_dtype())
        return tuple(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes)


_OPTIONS: tuple[Callable[[Callable[..., Any]], Callable[..., Any]], ...] = (
    click.argument("spec", metavar="MODEL", type=_Model()),
    click.option("--kwargs", type=_Arguments(), default="{}", help="Keyword arguments of the callable."),
    click.option(
        "--weights",
        type=click.Path(exists=True, dir_okay=False, path_type=Path),
        help="safetensors file, torch file of weights (no code is run), or converted model.",
    ),
    click.option(
        "--input-shape",
        "input_shapes",
        type=_Shape(),
        multiple=True,
        required=True,
        help="Shape of one input without the batch, such as 3,224,224; once for each input.",
    ),
    click.option("--batch-size", type=click.IntRange(min=1), default=4, show_default=True),
    click.option(
        "--token-ids", type=click.IntRange(min=2), metavar="N", help="Inputs are integers below N, not normal noise."
    ),
    click.option("--dtype", type=click.Choice(list(DTYPES)), help="Cast the model before its weights are loaded."),
    click.option(
        "--seed",
        type=click.IntRange(0, LARGEST_SEED),
        metavar="N",
        default=0,
        show_default=True,
        help="Seed of weights and inputs.",
    ),
)


def model_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options about model and inputs to a command, which gets them as one `Request`."""

    @functools.wraps(command)
    def parsed(**given: Any) -> Any:
        dtype = given.pop("dtype")
        names = ("spec", "kwargs", "weights", "input_shapes", "batch_size", "token_ids", "seed")
        request = Request(**{name: given.pop(name) for name in names}, dtype=DTYPES[dtype] if dtype else None)
        _require_different_files(request, given)
        return command(request, **given)

    decorated: Callable[..., Any] = parsed
    for option in reversed(_OPTIONS):
        decorated = option(decorated)
    return decorated


def _require_different_files(request: Request, given: Mapping[str, Any]) -> None:
    """Refuse to write a file that the command reads, or one file twice."""
    read = [("--weights", request.weights)] if request.weights is not None else []
    read += [("MODEL", Path(request.spec.place))] if request.spec.kind == "file" else []
    written: list[tuple[str, Path]] = []
    for parameter in click.get_current_context().command.params:
        path = given.get(parameter.name or "")
        if isinstance(path, Path) and not is_stream(path):
            files = written if isinstance(parameter.type, OutputFile) else read
            files.append((parameter.opts[0], path))
    for number, (flag, path) in enumerate(written):
        for other, used in read + written[:number]:
            if _is_same_file(path, used):
                raise click.UsageError(f"{flag} {path} is the file of {other} too. Choose another name for one.")


def _is_same_file(path: Path, other: Path) -> bool:
    try:
        return path.samefile(other)
    except OSError:  # one of them does not exist
        return path.resolve() == other.resolve()
