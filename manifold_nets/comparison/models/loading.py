"""Networks by name, made to fit a task."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from manifold_nets.comparison.models.mlp import multilayer_perceptron
from manifold_nets.comparison.models.resnet import SmallResNet
from manifold_nets.comparison.models.segnet import SegNetBasic
from manifold_nets.comparison.models.series import convolutions_1d
from manifold_nets.comparison.models.towers import TwoTowers
from manifold_nets.comparison.models.transformer import CharacterTransformer
from manifold_nets.comparison.tasks.errors import TaskNameError, TaskSourceError
from manifold_nets.comparison.tasks.task import Task
from manifold_nets.errors import ModelSpecError, near_matches
from manifold_nets.sources import ModelSpec, load_model, load_object

__all__ = ["MODEL_NAMES", "build_model", "is_built_in"]

MODEL_NAMES = ("mlp", "mlp-plain", "resnet", "segnet-basic", "conv1d", "transformer", "towers")
_KNOWN = (
    "mlp:WIDTHS, mlp-plain:WIDTHS, resnet:DEPTH,WIDTH, segnet-basic:FILTERS,BLOCKS, conv1d:WIDTHS, "
    "transformer:WIDTH,BLOCKS,HEADS, towers:WIDTHS, file.py:callable, torchvision:NAME, timm:NAME"
)

# Axes of one example, without that of the batch.
_FOR_AXES = {"conv1d": 2, "transformer": 1, "towers": 1}

ModelSource = str | Callable[..., nn.Module]


def build_model(source: ModelSource, task: Task, *, seed: int) -> nn.Module:
    """Return a fresh plain network for a task; the same one for the same seed.

    ========================  ========================================================================================
    ``mlp:100,100``           linear layers of these widths with batch normalization and ReLU, and a classifier
    ``mlp-plain:100,100``     the same without normalization, with biases
    ``resnet:8,16``           a residual network of depth 8, 14, 20, … and 16 filters in its first stage
    ``segnet-basic:64,4``     SegNet-Basic with 64 filters and 4 blocks
    ``conv1d:64,128,64``      one-dimensional convolutions of these widths, for series
    ``transformer:64,2,4``    a character-level transformer with normalized queries, keys and block outputs
    ``towers:32,32,32``       two batch-normalized towers on embeddings, for pairs of a person and a thing
    ``torchvision:NAME``      with as many outputs as the task has classes; also ``timm:NAME``
    ``file.py:callable``      what a callable returns, which may take ``input_shape`` and ``outputs`` of the task
    ========================  ========================================================================================

    Args:
        source: one of these, settings left out at will, or a callable as in the last line.
        task: what the network is for.
        seed: of torch's generator while the network is made; the generator is put back.

    Raises:
        TaskNameError: the text names no network, or its settings have no meaning.
        ModelNotFoundError: the module, the file or the architecture does not exist.
        ModelBuildError: the callable raised, or made no network.
        TaskSourceError: the network does not fit the task.

    Example:
        >>> from manifold_nets.comparison.tasks import load_task
        >>> [tuple(p.shape) for p in build_model("mlp:20", load_task("digits"), seed=0).parameters()]
        [(20, 64), (20,), (20,), (10, 20), (10,)]
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = _named(source, task) if isinstance(source, str) else _called(source, task)
        _require_fit(model, source, task)
    return model


def is_built_in(source: str) -> bool:
    """Whether a name is that of a network of this package, of torchvision or of timm: `build_model` runs no other code.

    Example:
        >>> is_built_in("mlp:8"), is_built_in("timm:resnet18"), is_built_in("net.py:net"), is_built_in("timm:x.py:net")
        (True, True, False, False)
    """
    if source.partition(":")[0] in MODEL_NAMES:
        return True
    try:
        return ModelSpec.parse(source).kind in ("torchvision", "timm")
    except ModelSpecError:
        return False


def _named(source: str, task: Task) -> nn.Module:
    name, _, settings = source.partition(":")
    if name in MODEL_NAMES:
        numbers = _numbers(source, settings)
        try:
            return _own(name, task, numbers)
        except (ValueError, IndexError) as error:
            raise TaskNameError("model", source, _KNOWN, str(error)) from error
    try:
        spec = ModelSpec.parse(source)
    except ModelSpecError as error:
        remedy = f"{near_matches(name, MODEL_NAMES)} Choose one of these.".strip()
        raise TaskNameError("model", source, _KNOWN, remedy) from error
    if spec.kind == "torchvision":
        return load_model(spec, kwargs={"num_classes": task.outputs})
    if spec.kind == "timm":
        return load_model(spec, kwargs={"num_classes": task.outputs, "in_chans": task.input_shape[0]})
    return _module(load_object(spec, kwargs=_facts(task)), source)


def _own(name: str, task: Task, numbers: list[int]) -> nn.Module:
    if name in ("mlp", "mlp-plain"):
        return multilayer_perceptron(task.input_shape, task.outputs, numbers or [100, 100], normalize=name == "mlp")
    if name in _FOR_AXES:
        if len(task.input_shape) != _FOR_AXES[name]:
            raise ValueError(f"Such a network takes examples with {_FOR_AXES[name]} axes, not {task.input_shape}.")
        return _for_sequences(name, task, numbers)
    if len(task.input_shape) != 3 or len(numbers) > 2:
        raise ValueError("Such a network has at most two settings and takes images (channels, height, width).")
    channels = task.input_shape[0]
    if name == "resnet":
        return SmallResNet(channels, task.outputs, **dict(zip(("depth", "width"), numbers, strict=False)))
    return SegNetBasic(channels, task.outputs, **dict(zip(("filters", "blocks"), numbers, strict=False)))


def _for_sequences(name: str, task: Task, numbers: list[int]) -> nn.Module:
    if name == "conv1d":
        return convolutions_1d(task.input_shape[0], task.outputs, numbers or (64, 128, 64))
    if name == "towers":
        return TwoTowers(widths=numbers or (32, 32, 32))
    settings = dict(zip(("width", "blocks", "heads"), numbers, strict=False))
    return CharacterTransformer(task.outputs, task.input_shape[0], **settings)


def _numbers(source: str, settings: str) -> list[int]:
    words = settings.split(",") if ":" in source else []
    if not all(re.fullmatch(r"[1-9]\d*", word) for word in words):
        raise TaskNameError("model", source, _KNOWN, "Write the settings as positive whole numbers with commas.")
    return [int(word) for word in words]


def _facts(task: Task) -> dict[str, Any]:
    return {"input_shape": task.input_shape, "outputs": task.outputs}


def _called(source: Callable[..., nn.Module], task: Task) -> nn.Module:
    accepted = inspect.signature(source).parameters
    made = source(**{name: value for name, value in _facts(task).items() if name in accepted})
    return _module(made, getattr(source, "__qualname__", repr(source)))


def _module(made: Any, source: str) -> nn.Module:
    if not isinstance(made, nn.Module):
        raise TaskSourceError(source, f"an object of type {type(made).__name__}", "a torch.nn.Module")
    return made


@torch.no_grad()
def _require_fit(model: nn.Module, source: ModelSource, task: Task) -> None:
    """Run the network once in evaluation mode, where nothing of it changes, and count what it says."""
    name = source if isinstance(source, str) else getattr(source, "__qualname__", repr(source))
    inputs, targets = task.parts["train"].batch(torch.arange(min(2, len(task.parts["train"]))))
    modes = [(module, module.training) for module in model.modules()]
    try:
        task.measure(model.eval()(inputs), targets)
    except (Exception, SystemExit) as error:
        found = f"{type(error).__name__}: {error}"
        shape = (*task.input_shape,)
        raise TaskSourceError(
            name, found, f"a network for inputs of shape {shape} and {task.outputs} outputs"
        ) from error
    finally:
        for module, training in modes:
            module.training = training
