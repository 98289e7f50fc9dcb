"""Models by name: a callable of Python code, an architecture of torchvision or timm, or a model of transformers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from manifold_nets.errors import ModelSpecError
from manifold_nets.sources.finding import ModelCandidate, find_model, find_models
from manifold_nets.sources.inputs import guess_inputs, read_inputs
from manifold_nets.sources.libraries import (
    load_pretrained,
    pretrained_model,
    save_pretrained,
    timm_model,
    torchvision_model,
)
from manifold_nets.sources.python import load_attribute, load_object, python_model
from manifold_nets.sources.spec import ModelSpec
from manifold_nets.sources.torchvision_import import import_torchvision
from manifold_nets.weights import load_weights

__all__ = [
    "ModelCandidate",
    "ModelSpec",
    "find_model",
    "find_models",
    "guess_inputs",
    "import_torchvision",
    "load_attribute",
    "load_model",
    "load_object",
    "load_pretrained",
    "read_inputs",
    "save_pretrained",
]


def load_model(
    spec: str | ModelSpec,
    *,
    kwargs: Mapping[str, Any] | None = None,
    weights: str | Path | None = None,
    class_name: str | None = None,
) -> nn.Module:
    """Build the model that a specification names, and optionally load its weights from a file.

    Architectures of torchvision and timm, including their backbones, start from fresh weights; only ``hf:NAME`` and
    ``timm:hf-hub:`` access the network. If torchvision was built for another torch, it is imported as by
    `import_torchvision`, whatever code imports it.

    Args:
        spec: one of

            - ``package.module:callable`` or ``file.py:callable``. The folder of the file, or the working directory for
              a module, is importable while the model is built. An attribute that is itself a `torch.nn.Module` object
              is returned unchanged.
            - ``file.py``, if `find_model` finds exactly one model in it.
            - ``torchvision:NAME`` or ``timm:NAME``; ``timm:FOLDER`` and ``timm:hf-hub:NAME`` have weights of their own.
            - ``hf:FOLDER``, a folder written by ``save_pretrained``, or ``hf:NAME``, a model on the hub. The folder of
              a converted model gives the converted model.
        kwargs: keyword arguments of the callable; with ``hf:`` those of ``from_pretrained``.
        weights: a file for `load_weights`: safetensors, a torch file, or a converted model written by `save`.
        class_name: a class of transformers, such as ``"AutoModelForCausalLM"``, instead of the one in the
            configuration; only with ``hf:``.

    Raises:
        ModelSpecError: the specification has none of the forms, or takes no class.
        ModelNotFoundError: a module, a file, an attribute or an architecture does not exist.
        ModelBuildError: the callable or the import raised an error or SystemExit, or did not return a model.
        CheckpointFormatError: the file cannot be read.
        CheckpointMismatchError: its names or shapes are not the model's.

    Example:
        >>> load_model("torch.nn:Linear", kwargs={"in_features": 4, "out_features": 2})
        Linear(in_features=4, out_features=2, bias=True)
    """
    spec = ModelSpec.parse(spec) if isinstance(spec, str) else spec
    arguments = dict(kwargs or {})
    if class_name is not None and spec.kind != "hf":
        raise ModelSpecError(str(spec), "hf:FOLDER or hf:NAME with a class of transformers", "Leave out the class.")
    if not spec.name:
        spec = find_model(spec, arguments)
    builders: dict[str, Callable[[ModelSpec, dict[str, Any]], nn.Module]] = {
        "torchvision": torchvision_model,
        "timm": timm_model,
        "hf": functools.partial(pretrained_model, class_name=class_name),
    }
    model = builders.get(spec.kind, python_model)(spec, arguments)
    return model if weights is None else load_weights(model, weights)
