"""The options that commands share: the model, its weights, its inputs, and the files to write."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem

from manifold_nets.errors import ManifoldNetsError, OutputFileError
from manifold_nets.files import is_stream

if TYPE_CHECKING:
    from torch import nn

    from manifold_nets.sources import ModelSpec

    _ParamType = click.ParamType[Any]
else:
    _ParamType = click.ParamType  # which takes no parameter before click 8.4

INPUT_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
DTYPES = ("float32", "float64", "float16", "bfloat16")


class Parsed(_ParamType):
    """Text that a function turns into a value.

    Args:
        name: what help calls the text.
        parse: the function; its ValueError is shown as wrong usage.
        may_be_file: whether shells complete the names of files.
    """

    def __init__(self, name: str, parse: Callable[[str], Any], *, may_be_file: bool = False) -> None:
        self.name, self._parse, self._may_be_file = name, parse, may_be_file

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Leave names of files to the shell."""
        return [CompletionItem(incomplete, type="file")] if self._may_be_file else []

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Parse, except while a shell completes the command, where nothing is checked."""
        if not isinstance(value, str) or (ctx is not None and ctx.resilient_parsing):
            return value
        try:
            return self._parse(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


def _model_spec(text: str) -> ModelSpec:
    from manifold_nets.sources import ModelSpec

    return ModelSpec.parse(text)


def _shape(text: str) -> tuple[int, ...]:
    words = text.split(",")
    if not all(word.strip().isdecimal() and int(word) > 0 for word in words):
        raise ValueError(f"{text!r} is not a shape; expected positive sizes without the batch, such as 3,224,224")
    return tuple(int(word) for word in words)


def _arguments(text: str) -> dict[str, Any]:
    expected = "expected an object such as '{\"width\": 64}'"
    try:
        arguments = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{text!r} is not valid JSON ({error}); {expected}") from error
    if not isinstance(arguments, dict):
        raise ValueError(f"{text!r} is not a JSON object; {expected}")
    return arguments


# Endings that say what is in a file. A file with another ending, or with none, may hold anything.
_ENDINGS = frozenset(
    ".safetensors .onnx .pt2 .pt .pth .bin .ckpt .pkl .pickle .npy .npz .h5 .hdf5 .tflite .pb .gguf .mlmodel .py "
    ".json .yaml .yml .toml .csv .html .htm .pdf .png .svg .db .zip .gz .tar".split()
)


def require_ending(path: Path, written: Sequence[str], remedy: str = "") -> None:
    """Refuse a file name whose ending belongs to another kind of file than is written.

    Args:
        path: the file name.
        written: the endings of the kind that is written.
        remedy: what else the user can do.

    Raises:
        click.UsageError: the ending belongs to another kind of file.
    """
    ending = path.suffix.lower()
    if ending in _ENDINGS and ending not in written:
        advice = f"End the name in {' or '.join(written)}{f', or {remedy}' if remedy else ''}."
        raise click.UsageError(f"{path}: this command does not write {ending} files. {advice}")


@dataclass(frozen=True)
class Folder:
    """A folder to write, where a file could be written as well."""

    path: Path

    def __str__(self) -> str:
        return str(self.path)


class OutputFile(click.Path):
    """A file to write, checked before any work is done: its folder exists, and it is not a folder itself.

    Args:
        endings: of the kind of file that is written; any if left out.
        remedy: how to get another kind of file.
        or_folder: what is a folder already, or is written with a slash at its end, becomes a `Folder`.
    """

    def __init__(self, *endings: str, remedy: str = "", or_folder: bool = False) -> None:
        super().__init__(dir_okay=False, writable=True, path_type=Path)
        self._endings, self._remedy, self._or_folder = endings, remedy, or_folder

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Refuse a path that could not be written in the end, or that holds something else."""
        if self._or_folder and (os.fspath(value).endswith(("/", os.sep)) or Path(value).is_dir()):
            return Folder(OutputFolder().convert(value, param, ctx))
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
    """A folder to write into."""

    def __init__(self) -> None:
        super().__init__(file_okay=False, path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """Refuse a file, and a name that looks like one."""
        path = Path(super().convert(value, param, ctx))  # type: ignore[arg-type]
        if path.suffix.lower() in _ENDINGS and not path.is_dir():
            self.fail(f"{value!r} is named like a file; expected the name of a folder", param, ctx)
        return path


class Number(click.FloatRange):
    """A number in a range; unlike `click.FloatRange` it refuses NaN."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Refuse NaN, and what is out of the range."""
        number = super().convert(value, param, ctx)
        if math.isnan(number):
            self.fail(f"{value} is not in the range {self._describe_range()}.", param, ctx)
        return float(number)


@dataclass(frozen=True)
class Request:
    """A model and its inputs, as named on the command line."""

    spec: ModelSpec
    kwargs: dict[str, Any]
    class_name: str | None
    weights: Path | None
    key: str | None
    prefix: str
    allow_pickle: bool
    inputs_file: Path | None
    input_shapes: tuple[tuple[int, ...], ...]
    batch_size: int
    token_ids: int | None
    dtype: str | None
    seed: int

    def model(self) -> nn.Module:
        """Build the model from the seed, and load its weights if there are any."""
        import torch

        from manifold_nets.sources import load_model
        from manifold_nets.weights import load_weights

        torch.manual_seed(self.seed)
        model = load_model(self.spec, kwargs=self.kwargs, class_name=self.class_name)
        if self.dtype is not None:
            model = model.to(getattr(torch, self.dtype))
        if self.weights is None:
            return model
        reading = {"key": self.key, "prefix": self.prefix, "allow_pickle": self.allow_pickle}
        return load_weights(model, self.weights, **reading)  # type: ignore[arg-type]

    def inputs(self, model: nn.Module) -> Any:
        """Read the inputs from their file, or draw a batch of random ones in the model's dtype, or of token ids."""
        import torch

        from manifold_nets.models import dtype_of
        from manifold_nets.sources import guess_inputs, read_inputs

        if self.inputs_file is not None:
            return read_inputs(self.inputs_file, dtype_of(model))
        generator = torch.Generator().manual_seed(self.seed)
        if self.spec.kind == "hf" or not self.input_shapes:
            shapes, batch, tokens = self.input_shapes, self.batch_size, self.token_ids
            return guess_inputs(model, batch_size=batch, shapes=shapes, token_ids=tokens, generator=generator)
        drawn = [(self.batch_size, *shape) for shape in self.input_shapes]
        if self.token_ids is not None:
            return tuple(torch.randint(self.token_ids, shape, generator=generator) for shape in drawn)
        dtype = dtype_of(model)
        return tuple(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in drawn)


_SHAPE, _SEED = Parsed("N,N,…", _shape), click.IntRange(0, 2**32 - 3)
_SHAPE_HELP = (
    "Shape of one input without the batch, such as 3,224,224; once for each input. hf: and timm: models know theirs."
)
_INPUTS_HELP = ".npz, .npy, .pt or .safetensors file of real inputs: by name, or by order where they have none."
_OPTIONS: tuple[Callable[[Callable[..., Any]], Callable[..., Any]], ...] = (
    click.argument("spec", metavar="MODEL", type=Parsed("MODEL", _model_spec, may_be_file=True)),
    click.option("--kwargs", type=Parsed("JSON", _arguments), default="{}", help="Keyword arguments of the callable."),
    click.option("--class", "class_name", metavar="NAME", help="Class of transformers, for an hf: model."),
    click.option("--weights", type=INPUT_FILE, help="safetensors, torch file (no code is run), or converted model."),
    click.option("--key", metavar="NAME", help="Where in the file the weights are, such as state_dict_ema."),
    click.option("--prefix", metavar="TEXT", default="", help="Prefix of the names in the file, such as module."),
    click.option("--allow-pickle", is_flag=True, help="Run the code that a torch file names. Only if you trust it."),
    click.option("--inputs", "inputs_file", type=INPUT_FILE, help=_INPUTS_HELP),
    click.option("--input-shape", "input_shapes", type=_SHAPE, multiple=True, help=_SHAPE_HELP),
    click.option("--batch-size", type=click.IntRange(min=1), default=4),
    click.option("--token-ids", type=click.IntRange(min=2), metavar="N", help="Inputs are integers below N."),
    click.option("--dtype", type=click.Choice(DTYPES), help="Cast the model before its weights are loaded."),
    click.option("--seed", type=_SEED, metavar="N", default=0, help="Seed of weights and inputs."),
)


def model_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options about model and inputs to a command, which gets them as one `Request`."""

    @functools.wraps(command)
    def parsed(**given: Any) -> Any:
        request = Request(**{name: given.pop(name) for name in Request.__dataclass_fields__})
        _require_different_files(request)
        request = _with_model(request)
        _require_consistent(request)
        return command(request, **given)

    decorated: Callable[..., Any] = parsed
    for option in reversed(_OPTIONS):
        decorated = option(decorated)
    return decorated


def _with_model(request: Request) -> Request:
    """Name the one model of a Python file that stands alone, and say which it is and what importing the file runs."""
    if request.spec.name:
        return request
    from manifold_nets.sources.finding import code_run_by_import, find_model

    try:
        spec = find_model(request.spec, request.kwargs)
    except ManifoldNetsError as error:
        raise click.UsageError(str(error)) from error
    click.echo(f"{request.spec}: taking {spec.name}, its only model that needs no other arguments.", err=True)
    if run := code_run_by_import(spec.place):
        click.echo(f"{request.spec}: importing it runs {'; '.join(run)}.", err=True)
    return dataclasses.replace(request, spec=spec)


def _require_consistent(request: Request) -> None:
    """Refuse options without what they belong to, and a model without inputs."""
    if request.class_name is not None and request.spec.kind != "hf":
        raise click.UsageError("--class works only with hf: models. Leave it out.")
    weights_options = {"key": request.key, "prefix": request.prefix, "allow-pickle": request.allow_pickle}
    for flag in [flag for flag, value in weights_options.items() if value and request.weights is None]:
        raise click.UsageError(f"--{flag} can be used only with --weights.")
    if request.inputs_file is not None:
        drawn = {"input-shape": request.input_shapes, "token-ids": request.token_ids}
        for flag in [flag for flag, value in drawn.items() if value]:
            raise click.UsageError(f"--inputs cannot be used with --{flag}. Leave one out.")
    elif not request.input_shapes and not request.spec.knows_inputs:
        raise click.MissingParameter("Or name a file with --inputs.", param_type="option", param_hint="'--input-shape'")


def _require_different_files(request: Request) -> None:
    """Refuse to write a file that the command reads, or one file twice."""
    context = click.get_current_context()
    read = [("MODEL", Path(request.spec.place))] if request.spec.kind == "file" else []
    written: list[tuple[str, Path]] = []
    for parameter in context.command.params:
        path = context.params.get(parameter.name or "")
        if isinstance(path, Path) and not is_stream(path):
            files = written if isinstance(parameter.type, OutputFile) else read
            files.append((parameter.opts[0], path))
    for number, (flag, path) in enumerate(written):
        for other, used in read + written[:number]:
            if is_same_file(path, used):
                raise click.UsageError(f"{flag} and {other} name the same file {path}. Choose another name for one.")


def is_same_file(path: Path, other: Path) -> bool:
    """Whether two paths lead to one file or folder, also where there is none yet."""
    try:
        return path.samefile(other)
    except OSError:  # one of them does not exist
        return path.resolve() == other.resolve()
