"""Callables of Python files and modules: imported from their folder, called, and what goes wrong on the way."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from manifold_nets.errors import ModelBuildError, ModelNotFoundError, ModelSpecError, described, near_matches
from manifold_nets.files import is_link_loop
from manifold_nets.sources.spec import LIBRARIES, ModelSpec
from manifold_nets.sources.torchvision_import import torchvision_repaired

__all__ = ["load_attribute", "load_object"]

# What another's code may raise: where it means to end its own program, it is no part of ours that ends.
FAULTS = (Exception, SystemExit)


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
    with attribute(spec) as found:
        if not callable(found):
            return found
        accepted = inspect.signature(found).parameters
        return call(spec, found, {name: value for name, value in (kwargs or {}).items() if name in accepted})


def load_attribute(spec: ModelSpec) -> Any:
    """Return what a specification of a Python file or module names, without calling it.

    Raises:
        ModelNotFoundError: the module, the file or the attribute does not exist.
        ModelBuildError: the import raised, SystemExit included.

    Example:
        >>> load_attribute(ModelSpec.parse("math:pi"))
        3.141592653589793
    """
    with attribute(spec) as found:
        return found


def python_model(spec: ModelSpec, kwargs: dict[str, Any]) -> nn.Module:
    with attribute(spec) as found:
        if isinstance(found, nn.Module) and not kwargs:
            return found
        if not callable(found) or isinstance(found, nn.Module):
            raise ModelBuildError(spec, f"{spec.name} is a {type(found).__name__}, which takes no arguments")
        return built_model(spec, found, kwargs)


@contextlib.contextmanager
def attribute(spec: ModelSpec) -> Iterator[Any]:
    """Give what a specification names, while the folder that it came from is importable."""
    path = Path(spec.place)
    if spec.kind not in ("file", "module") or not spec.name:
        raise ModelSpecError(str(spec))
    if spec.kind == "file" and not path.is_file():
        why = "its path is a loop of symbolic links" if is_link_loop(path) else f"there is no file {path}"
        raise ModelNotFoundError(spec, why, "Write the path from the working directory.")
    folder = path.resolve().parent if spec.kind == "file" else Path.cwd()
    with _importable(folder, spec.place), torchvision_repaired():
        with _importing(spec):
            found: Any = _import_file(path) if spec.kind == "file" else importlib.import_module(spec.place)
        for part in spec.name.split("."):
            if not hasattr(found, part):
                names = [name for name in vars(found) if callable(getattr(found, name)) and not name.startswith("_")]
                raise ModelNotFoundError(spec, f"{spec.place} has no attribute {spec.name!r}", near(part, names))
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
            remedy = f"{near_matches(spec.place, LIBRARIES)} {remedy}".strip()
            raise ModelNotFoundError(spec, f"there is no module {error.name!r}", remedy) from error
        raise ModelBuildError(spec, f"importing {spec.place} raised {described(error)}", _remedy(error)) from error
    except FAULTS as error:
        raise ModelBuildError(spec, f"importing {spec.place} raised {described(error)}", _remedy(error)) from error


def _remedy(error: BaseException) -> str:
    """What to do about an import that failed."""
    if isinstance(error, ModuleNotFoundError):
        return f"Install {error.name}, or run from the folder that holds it."
    if isinstance(error, ImportError) and "relative import" in str(error):
        return "Name a file of a package as package.module:callable, from the folder that holds the package."
    if isinstance(error, SystemExit):
        return 'Move what parses arguments or trains under `if __name__ == "__main__":`.'
    return "Check that the file can be imported in Python."


def _import_file(path: Path) -> ModuleType:
    name = f"_manifold_nets_model_{path.stem}"
    location = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(location)  # type: ignore[arg-type]
    # Classes look their own module up by name (dataclasses, pickle), also after the import.
    sys.modules[name] = module
    try:
        location.loader.exec_module(module)  # type: ignore[union-attr]
    except FAULTS:
        del sys.modules[name]
        raise
    return module


def call(spec: ModelSpec, build: Callable[..., Any], kwargs: dict[str, Any]) -> Any:
    try:
        return build(**kwargs)
    except FAULTS as error:
        shown = ", ".join(f"{name}={value!r}" for name, value in kwargs.items())
        raise ModelBuildError(spec, f"{spec.name}({shown}) raised {described(error)}") from error


def built_model(spec: ModelSpec, build: Callable[..., Any], kwargs: dict[str, Any]) -> nn.Module:
    found = call(spec, build, kwargs)
    if isinstance(found, nn.Module):
        return found
    raise ModelBuildError(spec, f"{spec.name} returned an object of type {type(found).__name__}")


@contextlib.contextmanager
def _importable(folder: Path, place: str) -> Iterator[None]:
    """Put a folder first on the import path, as Python does for a script, which is started without arguments."""
    entry, arguments = str(folder), sys.argv
    sys.path.insert(0, entry)
    sys.argv = [place]  # a script that parses its arguments would else read those of this program
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.argv = arguments
        with contextlib.suppress(ValueError):
            sys.path.remove(entry)


def near(name: str, known: Iterable[str]) -> str:
    names = sorted(known)
    near = near_matches(name, names)
    if near:
        return near
    return f"It has {', '.join(names[:8])}{' and others' if len(names) > 8 else ''}." if names else "It has none."
