"""Models by name: a callable of a module or of a file, or an architecture of torchvision or timm, with its weights."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import inspect
import logging
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from manifold_nets.errors import ModelBuildError, ModelNotFoundError, ModelSpecError, described, near_matches
from manifold_nets.files import is_link_loop
from manifold_nets.weights import load_weights

__all__ = ["ModelSpec", "import_torchvision", "load_attribute", "load_model", "load_object"]

_log = logging.getLogger(__name__)
_declared_operators: list[torch.library.Library] = []
# What another's code may raise: where it means to end its own program, it is no part of ours that ends.
_FAULTS = (Exception, SystemExit)


@dataclass(frozen=True)
class ModelSpec:
    """Where a model comes from, as written on a command line: ``PLACE:NAME``.

    Args:
        kind: ``"torchvision"``, ``"timm"``, ``"file"`` or ``"module"``.
        place: the library, the path of the file, or the dotted name of the module.
        name: the architecture, or the (dotted) attribute that is called.

    Example:
        >>> ModelSpec.parse("torchvision:resnet18").kind
        'torchvision'
        >>> ModelSpec.parse("nets/small.py:build")
        ModelSpec(kind='file', place='nets/small.py', name='build')
    """

    kind: str
    place: str
    name: str

    @classmethod
    def parse(cls, text: str) -> ModelSpec:
        """Read ``package.module:callable``, ``file.py:callable``, ``torchvision:NAME`` or ``timm:NAME``.

        Raises:
            ModelSpecError: the text has none of these forms.
        """
        place, _, name = text.rpartition(":")
        if place in ("torchvision", "timm") and name:
            return cls(place, place, name)
        dotted = name if place.endswith(".py") else f"{place}.{name}"
        if not place or not all(part.isidentifier() for part in dotted.split(".")):
            raise ModelSpecError(text)
        return cls("file" if place.endswith(".py") else "module", place, name)

    def __str__(self) -> str:
        return f"{self.place}:{self.name}"


def load_model(
    spec: str | ModelSpec, *, kwargs: Mapping[str, Any] | None = None, weights: str | Path | None = None
) -> nn.Module:
    """Build the model that a specification names, and load its weights from a file.

    Nothing is downloaded: architectures of torchvision and timm start from fresh weights, also their backbones.

    Args:
        spec: ``package.module:callable``, ``file.py:callable``, ``torchvision:NAME`` or ``timm:NAME``. The folder of
            the file, or the working directory for a module, is importable while the model is built. An attribute that
            is itself a `torch.nn.Module` object is taken as it is.
        kwargs: keyword arguments of the callable.
        weights: a file for `load_weights`: safetensors, a torch file, or a converted model written by `save`.

    Raises:
        ModelSpecError: the specification has none of the forms.
        ModelNotFoundError: a module, a file, an attribute or an architecture does not exist.
        ModelBuildError: the callable or the import raised, SystemExit included, or returned something that is no model.
        CheckpointFormatError: the file cannot be read.
        CheckpointMismatchError: its names or shapes are not the model's.

    Example:
        >>> load_model("torch.nn:Linear", kwargs={"in_features": 4, "out_features": 2})
        Linear(in_features=4, out_features=2, bias=True)
    """
    spec = ModelSpec.parse(spec) if isinstance(spec, str) else spec
    build = _from_library if spec.kind in ("torchvision", "timm") else _from_python
    model = build(spec, dict(kwargs or {}))
    return model if weights is None else load_weights(model, weights)


def load_object(spec: str | ModelSpec, *, kwargs: Mapping[str, Any] | None = None) -> Any:
    """Return what the callable of a Python file or module returns; an attribute that is not callable, as it is.

    Args:
        spec: ``package.module:callable`` or ``file.py:callable``, looked up as in `load_model`.
        kwargs: keyword arguments of the callable, those of them that it takes.

    Raises:
        ModelSpecError: the specification has neither form.
        ModelNotFoundError: the module, the file or the attribute does not exist.
        ModelBuildError: the callable or the import raised, SystemExit included.

    Example:
        >>> load_object("math:gcd.__name__")
        'gcd'
    """
    spec = ModelSpec.parse(spec) if isinstance(spec, str) else spec
    if spec.kind not in ("file", "module"):
        raise ModelSpecError(str(spec))
    with _attribute(spec) as found:
        if not callable(found):
            return found
        accepted = inspect.signature(found).parameters
        return _call(spec, found, {name: value for name, value in (kwargs or {}).items() if name in accepted})


def load_attribute(spec: ModelSpec) -> Any:
    """Return what a specification of a Python file or module names, without calling it.

    Raises:
        ModelNotFoundError: the module, the file or the attribute does not exist.
        ModelBuildError: the import raised, SystemExit included.

    Example:
        >>> load_attribute(ModelSpec.parse("math:pi"))
        3.141592653589793
    """
    with _attribute(spec) as found:
        return found


def import_torchvision() -> ModuleType:
    """Import torchvision, also where its wheel was built for another device than torch.

    A torchvision wheel carries compiled operators. Beside a torch built for another device they do not load, and the
    import fails where torchvision registers Python code for them (``operator torchvision::nms does not exist``).
    Declaring the names of these operators is enough for every model made of torch's own operators; the compiled ones
    (non-maximum suppression, RoI pooling, deformable convolution) stay unavailable. A warning is logged once.

    Raises:
        ModuleNotFoundError: torchvision is not installed.
        RuntimeError: the import fails for another reason.
    """
    declared: list[str] = []
    while True:
        try:
            module = importlib.import_module("torchvision")
            break
        except RuntimeError as error:
            found = re.fullmatch(r"operator torchvision::(\w+) does not exist", str(error))
            if found is None or found[1] in declared:
                raise
            declared.append(found[1])
            _declare_operator(found[1])
            for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
                del sys.modules[name]
    if declared:
        _log.warning(
            "this torchvision was built for another torch: its models work, its compiled operators (%s, …) do not",
            ", ".join(declared),
        )
    return module


def _declare_operator(name: str) -> None:
    # The schema is never called; the object is kept because the declaration goes when it does.
    library = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
    library.define(f"{name}(Tensor x) -> Tensor")  # type: ignore[no-untyped-call]
    _declared_operators.append(library)


def _from_library(spec: ModelSpec, kwargs: dict[str, Any]) -> nn.Module:
    try:
        models = import_torchvision().models
        timm = importlib.import_module("timm") if spec.kind == "timm" else None
    except ModuleNotFoundError as error:
        found = f"{error.name} is not installed"
        raise ModelNotFoundError(spec, found, "Install the extra: pip install 'manifold_nets[vision]'.") from error
    if not (timm.is_model(spec.name) if timm is not None else spec.name in models.list_models()):
        known = (timm or models).list_models()
        raise ModelNotFoundError(spec, f"{spec.kind} has no model {spec.name!r}", _near(spec.name, known))
    if timm is not None:
        return _model(spec, timm.create_model, {"model_name": spec.name, "pretrained": False, **kwargs})
    builder = models.get_model_builder(spec.name)
    # Segmentation and detection models download a trained backbone by default.
    accepted = inspect.signature(builder).parameters
    offline = {name: None for name in ("weights", "weights_backbone") if name in accepted}
    with warnings.catch_warnings():
        # googlenet and inception_v3 announce a future change of their initialization at every call.
        warnings.filterwarnings("ignore", "The default weight initialization of", FutureWarning)
        return _model(spec, builder, {**offline, **kwargs})


def _from_python(spec: ModelSpec, kwargs: dict[str, Any]) -> nn.Module:
    with _attribute(spec) as found:
        if isinstance(found, nn.Module) and not kwargs:
            return found
        if not callable(found) or isinstance(found, nn.Module):
            raise ModelBuildError(spec, f"{spec.name} is a {type(found).__name__}, which takes no arguments")
        return _model(spec, found, kwargs)


@contextlib.contextmanager
def _attribute(spec: ModelSpec) -> Iterator[Any]:
    """Give what a specification names, while the folder that it came from is importable."""
    path = Path(spec.place)
    if spec.kind == "file" and not path.is_file():
        why = "its symbolic links lead back to themselves" if is_link_loop(path) else f"there is no file {path}"
        raise ModelNotFoundError(spec, why, "Write the path from the working directory.")
    with _importable(path.resolve().parent if spec.kind == "file" else Path.cwd()):
        with _importing(spec):
            found: Any = _import_file(path) if spec.kind == "file" else importlib.import_module(spec.place)
        for part in spec.name.split("."):
            if not hasattr(found, part):
                names = [name for name in vars(found) if callable(getattr(found, name)) and not name.startswith("_")]
                raise ModelNotFoundError(spec, f"{spec.place} has no attribute {spec.name!r}", _near(part, names))
            found = getattr(found, part)
        yield found


@contextlib.contextmanager
def _importing(spec: ModelSpec) -> Iterator[None]:
    """Turn what an import raises into an error about the specification."""
    try:
        yield
    except ModuleNotFoundError as error:
        if spec.kind == "module" and error.name is not None and f"{spec.place}.".startswith(f"{error.name}."):
            remedy = "Install the package, run from the folder that holds it, or name a file: path/to/file.py:callable."
            remedy = f"{near_matches(spec.place, ('torchvision', 'timm'))} {remedy}".strip()
            raise ModelNotFoundError(spec, f"there is no module {error.name!r}", remedy) from error
        raise ModelBuildError(spec, f"importing {spec.place} raised {described(error)}") from error
    except _FAULTS as error:
        raise ModelBuildError(spec, f"importing {spec.place} raised {described(error)}") from error


def _import_file(path: Path) -> ModuleType:
    name = f"_manifold_nets_model_{path.stem}"
    location = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(location)  # type: ignore[arg-type]
    # Classes look their own module up by name (dataclasses, pickle), also after the import.
    sys.modules[name] = module
    try:
        location.loader.exec_module(module)  # type: ignore[union-attr]
    except _FAULTS:
        del sys.modules[name]
        raise
    return module


def _call(spec: ModelSpec, build: Callable[..., Any], kwargs: dict[str, Any]) -> Any:
    try:
        return build(**kwargs)
    except _FAULTS as error:
        shown = ", ".join(f"{name}={value!r}" for name, value in kwargs.items())
        raise ModelBuildError(spec, f"{spec.name}({shown}) raised {described(error)}") from error


def _model(spec: ModelSpec, build: Callable[..., Any], kwargs: dict[str, Any]) -> nn.Module:
    found = _call(spec, build, kwargs)
    if isinstance(found, nn.Module):
        return found
    raise ModelBuildError(spec, f"{spec.name} returned an object of type {type(found).__name__}")


@contextlib.contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """Put a folder first on the import path, as Python does for a script."""
    entry = str(folder)
    sys.path.insert(0, entry)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(entry)


def _near(name: str, known: Iterable[str]) -> str:
    names = sorted(known)
    near = near_matches(name, names)
    if near:
        return near
    return f"It has {', '.join(names[:8])}{' and others' if len(names) > 8 else ''}." if names else "It has none."
