"""Architectures of torchvision and timm by name, and torchvision beside another build of torch."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.abc
import importlib.machinery
import inspect
import logging
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from manifold_nets.errors import ModelNotFoundError
from manifold_nets.sources.python import built_model, near
from manifold_nets.sources.spec import ModelSpec

__all__ = ["import_torchvision", "library", "timm_model", "torchvision_model", "torchvision_repaired"]

_log = logging.getLogger(__name__)
_declared_operators: list[torch.library.Library] = []


# ---- torchvision beside another build of torch -----------------------------------------------------------------------


def import_torchvision() -> ModuleType:
    """Import torchvision, also where its wheel was built for another device than torch.

    A torchvision wheel carries compiled operators. Beside a torch built for another device they do not load, and the
    import fails where torchvision registers Python code for them (``operator torchvision::nms does not exist``).
    Declaring the names of these operators is enough for every model made of torch's own operators; the compiled ones
    (non-maximum suppression, RoI pooling, deformable convolution) stay unavailable. A warning is logged once.

    Models of all sources are loaded with the same repair, whoever imports torchvision.

    Raises:
        ModuleNotFoundError: torchvision is not installed.
        RuntimeError: the import fails for another reason.
    """
    with torchvision_repaired():
        return importlib.import_module("torchvision")


@contextlib.contextmanager
def torchvision_repaired() -> Iterator[None]:
    """Let torchvision be imported within a block as `import_torchvision` does, by whatever code imports it."""
    finder = _TorchvisionFinder()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)


class _TorchvisionFinder(importlib.abc.MetaPathFinder):
    """Finds torchvision where Python does, and runs it again after declaring each operator that it misses."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != "torchvision":
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path)
        if spec is not None and spec.loader is not None:
            execute = functools.partial(_execute_repaired, spec.loader.exec_module)
            spec.loader.exec_module = execute  # type: ignore[method-assign]
        return spec


def _execute_repaired(execute: Callable[[ModuleType], None], module: ModuleType) -> None:
    declared: list[str] = []
    while True:
        try:
            execute(module)
            break
        except RuntimeError as error:
            found = re.fullmatch(r"operator torchvision::(\w+) does not exist", str(error))
            if found is None or found[1] in declared:
                raise
            declared.append(found[1])
            _declare_operator(found[1])
            for name in [name for name in sys.modules if name.startswith("torchvision.")]:
                del sys.modules[name]
    if declared:
        _log.warning(
            "this torchvision was built for another torch: its models work, its compiled operators (%s, …) do not",
            ", ".join(declared),
        )


def _declare_operator(name: str) -> None:
    # The schema is never called; the object is kept because the declaration goes when it does.
    library = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
    library.define(f"{name}(Tensor x) -> Tensor")  # type: ignore[no-untyped-call]
    _declared_operators.append(library)


# ---- models ----------------------------------------------------------------------------------------------------------


def torchvision_model(spec: ModelSpec, kwargs: dict[str, Any]) -> nn.Module:
    """Build an architecture of torchvision with fresh weights."""
    models = library(spec, "torchvision", "vision").models
    if spec.name not in models.list_models():
        remedy = near(spec.name, models.list_models())
        raise ModelNotFoundError(spec, f"torchvision has no model {spec.name!r}", remedy)
    builder = models.get_model_builder(spec.name)
    # Segmentation and detection models download a trained backbone by default.
    accepted = inspect.signature(builder).parameters
    offline = {name: None for name in ("weights", "weights_backbone") if name in accepted}
    with warnings.catch_warnings():
        # googlenet and inception_v3 announce a future change of their initialization at every call.
        warnings.filterwarnings("ignore", "The default weight initialization of", FutureWarning)
        return built_model(spec, builder, {**offline, **kwargs})


def timm_model(spec: ModelSpec, kwargs: dict[str, Any]) -> nn.Module:
    """Build an architecture of timm with fresh weights, or a model of a folder or of the hub with its own."""
    timm = library(spec, "timm", "vision")
    source, _, folder = spec.name.rpartition(":")
    if Path(spec.name).is_dir():
        source, folder = "local-dir", spec.name
    if source == "local-dir" and not (Path(folder) / "config.json").is_file():
        remedy = "Name a folder with the config.json and the weights that timm.models.save_for_hf writes."
        raise ModelNotFoundError(spec, f"the folder {folder} has no config.json", remedy)
    if not source and not timm.is_model(spec.name):
        raise ModelNotFoundError(spec, f"timm has no model {spec.name!r}", near(spec.name, timm.list_models()))
    name = f"{source}:{folder}" if source else spec.name
    return built_model(spec, timm.create_model, {"model_name": name, "pretrained": bool(source), **kwargs})


def library(spec: ModelSpec, name: str, extra: str) -> ModuleType:
    """Import a library, or say which extra of the package brings it."""
    try:
        if name != "transformers":
            import_torchvision()  # timm needs it as well
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        found = f"{error.name} is not installed"
        raise ModelNotFoundError(spec, found, f"Install the extra: pip install 'manifold_nets[{extra}]'.") from error
