"""Architectures of torchvision and timm by name."""

from __future__ import annotations

import importlib
import inspect
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from manifold_nets.errors import ModelNotFoundError
from manifold_nets.sources.python import built_model, near
from manifold_nets.sources.spec import ModelSpec
from manifold_nets.sources.torchvision_import import import_torchvision

__all__ = ["library", "timm_model", "torchvision_model"]


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
