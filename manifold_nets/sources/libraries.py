"""Models of torchvision, timm and transformers; converted models as folders that transformers reads."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import logging
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from manifold_nets.conversion.checkpoint import contents_to_save, load_contents
from manifold_nets.conversion.revert import revert
from manifold_nets.conversion.storage import read_document, write_document
from manifold_nets.errors import CheckpointError, ModelNotFoundError, described
from manifold_nets.files import atomic_file
from manifold_nets.sources.python import FAULTS, built_model, near
from manifold_nets.sources.spec import ModelSpec
from manifold_nets.sources.torchvision_import import import_torchvision, torchvision_repaired

__all__ = ["load_pretrained", "pretrained_model", "save_pretrained", "timm_model", "torchvision_model"]

_log = logging.getLogger(__name__)
_CONVERSION = "manifold_nets.json"


def _library(spec: ModelSpec, name: str, extra: str) -> ModuleType:
    """Import a library, or say which extra of the package brings it."""
    try:
        if name != "transformers":
            import_torchvision()  # timm needs it as well
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        found = f"{error.name} is not installed"
        raise ModelNotFoundError(spec, found, f"Run pip install 'manifold_nets[{extra}]'.") from error


def torchvision_model(spec: ModelSpec, kwargs: dict[str, Any]) -> nn.Module:
    """Build an architecture of torchvision with fresh weights."""
    models = _library(spec, "torchvision", "vision").models
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
    timm = _library(spec, "timm", "vision")
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


def pretrained_model(spec: ModelSpec, kwargs: dict[str, Any], class_name: str | None = None) -> nn.Module:
    """Build a model of transformers from a folder that ``save_pretrained`` wrote, or from the hub, with its weights."""
    transformers = _library(spec, "transformers", "hf")
    folder = Path(spec.name)
    if not folder.is_dir() and (folder.is_absolute() or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", spec.name)):
        remedy = "Name a folder that save_pretrained wrote, or a model of the hub, such as org/name."
        raise ModelNotFoundError(spec, f"there is no folder {folder}", remedy)
    with torchvision_repaired(), _no_progress_bars():
        build = _pretrained_class(spec, transformers, class_name, kwargs).from_pretrained
        model = built_model(spec, build, {"pretrained_model_name_or_path": spec.name, **kwargs})
    return load_pretrained(model, folder) if folder.is_dir() else model


@contextlib.contextmanager
def _no_progress_bars() -> Iterator[None]:
    transformers = sys.modules.get("transformers")
    if transformers is None:
        yield
        return
    bars = transformers.utils.logging
    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            bars.enable_progress_bar()


def _pretrained_class(spec: ModelSpec, transformers: ModuleType, name: str | None, kwargs: dict[str, Any]) -> Any:
    """The class that is asked for, else the one that the configuration names, else the bare model of its kind."""
    if name is None:
        trusted = {key: kwargs[key] for key in ("trust_remote_code", "revision", "subfolder") if key in kwargs}
        try:
            config = transformers.AutoConfig.from_pretrained(spec.name, **trusted)
        except FAULTS as error:
            remedy = "Name a folder that save_pretrained wrote, or a model of the hub that can be reached from here."
            raise ModelNotFoundError(spec, f"no configuration could be read ({described(error)})", remedy) from error
        name = next(iter(config.architectures or ()), None)
        if name is None:
            name = "AutoModel"
            _log.warning("%s: config.json names no architecture; took AutoModel (--class names another)", spec)
    try:
        return getattr(transformers, name)
    except AttributeError:
        remedy = f"{near(name, dir(transformers))} Name a class of transformers with --class, such as AutoModel."
        raise ModelNotFoundError(spec, f"transformers has no class {name!r}", remedy) from None


def save_pretrained(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Write a converted model of transformers as a folder that ``from_pretrained`` reads as a plain model.

    The folder holds what ``save_pretrained`` of the reverted model writes, and ``manifold_nets.json``: with it
    ``load_model("hf:FOLDER")`` and `load_pretrained` give the converted model.

    Args:
        model: a model with ``save_pretrained``; it is not changed.
        folder: the folder; it is made if there is none.

    Raises:
        CheckpointError: the model has no ``save_pretrained``, or its weights cannot be saved; see `save`.
        OutputFileError: the disk is full; files that were there are unchanged.
        OffManifoldError: the norm of a group is not its radius.

    Example:
        >>> import tempfile, torch, manifold_nets as mn
        >>> from manifold_nets.weights import load_weights
        >>> class Net(nn.Sequential):  # stands for a model of transformers
        ...     def save_pretrained(self, folder):
        ...         torch.save(self.state_dict(), f"{folder}/weights.pt")
        >>> def net():
        ...     return Net(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_pretrained(mn.convert(net(), torch.randn(16, 4)), folder)
        ...     plain = load_weights(net(), f"{folder}/weights.pt")
        ...     load_pretrained(plain, folder)[0].weight.manifold
        SphereProduct(8 filters of 4, radius 1) manifold
    """
    file = Path(folder) / _CONVERSION
    write = getattr(model, "save_pretrained", None)
    if write is None:
        raise CheckpointError(folder, f"{type(model).__name__} has no save_pretrained. Save it to a file.")
    contents = contents_to_save(model, file)
    Path(folder).mkdir(parents=True, exist_ok=True)
    with (
        atomic_file(file) as last,
        tempfile.TemporaryDirectory(dir=folder, prefix=".") as temporary,
        _no_progress_bars(),
    ):
        revert(model).save_pretrained(temporary)  # type: ignore[operator]
        write_document(last, contents)
        file.unlink(missing_ok=True)  # until the end the folder is that of a plain model
        for part in Path(temporary).iterdir():
            part.replace(Path(folder) / part.name)
    if not (contents.manifolds or contents.removed or contents.conversions):
        file.unlink()


def load_pretrained(model: nn.Module, folder: str | os.PathLike[str]) -> nn.Module:
    """Put a plain model back on its spheres that was read from a folder of `save_pretrained`.

    Args:
        model: what ``from_pretrained`` made of the folder.
        folder: the folder.

    Returns:
        The same model; unchanged where the folder is that of a plain model.

    Raises:
        CheckpointFormatError: the conversion in the folder is damaged, or that of other weights.
        CheckpointMismatchError: the model is of another class than the one that was saved.

    Example:
        >>> load_pretrained(nn.Linear(2, 2), "a folder of a plain model")
        Linear(in_features=2, out_features=2, bias=True)
    """
    file = Path(folder) / _CONVERSION
    if not file.is_file():
        return model
    return load_contents(model, file, read_document(file, model.state_dict()))
