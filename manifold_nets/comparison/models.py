"""The built-in networks of a comparison: plain torch modules, made to fit a task."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn

from manifold_nets.comparison.errors import TaskNameError, TaskSourceError, what_to_write
from manifold_nets.comparison.tasks import Task
from manifold_nets.comparison.tasks.task import evaluation_mode
from manifold_nets.errors import ModelSpecError
from manifold_nets.sources import ModelSpec, load_model, load_object

MODEL_NAMES = ("mlp", "mlp-plain", "resnet")
_KNOWN = "mlp:WIDTHS, mlp-plain:WIDTHS, resnet:DEPTH,WIDTH, file.py:callable, torchvision:NAME, timm:NAME"

ModelSource = str | Callable[..., nn.Module]


def build_model(source: ModelSource, task: Task, *, seed: int) -> nn.Module:
    """Return a fresh plain network for a task; the same one for the same seed.

    ========================  ========================================================================================
    ``mlp:100,100``           linear layers of these widths with batch normalization and ReLU, and a classifier
    ``mlp-plain:100,100``     the same without normalization, with biases
    ``resnet:8,16``           a residual network of depth 8, 14, 20, … and 16 filters in its first stage
    ``torchvision:NAME``      with as many outputs as the task has classes; also ``timm:NAME``
    ``file.py:callable``      the network that a callable returns; it may take ``input_shape`` and ``outputs`` of the
    task ========================
    ========================================================================================

    Args:
        source: one of these, with or without the numbers, or a callable as in the last line.
        task: the task that the network is for.
        seed: seed of torch's generator while the network is built; its state is restored.

    Raises:
        TaskNameError: the name is unknown, or its numbers are invalid.
        ModelNotFoundError: the module, the file or the architecture does not exist.
        ModelBuildError: the callable raised an error, or did not return a network.
        TaskSourceError: the network does not fit the task.

    Example:
        >>> from manifold_nets.comparison.tasks import load_task
        >>> [tuple(p.shape) for p in build_model("mlp:20", load_task("digits"), seed=0).parameters()]
        [(20, 64), (20,), (20,), (10, 20), (10,)]
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = _by_name(source, task) if isinstance(source, str) else _by_call(source, task)
        _require_fit(model, source, task)
    return model


def is_built_in(source: str) -> bool:
    """Whether a name is a network of this package, torchvision or timm, for which `build_model` runs no other code.

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


def _by_name(source: str, task: Task) -> nn.Module:
    try:
        if source.partition(":")[0] in MODEL_NAMES:
            return _built_in(source, task)
        spec = ModelSpec.parse(source)
        if spec.kind == "hf" or not spec.name:
            raise ModelSpecError(source)
    except ModelSpecError as error:
        raise TaskNameError("model", repr(source), _KNOWN, what_to_write("--model", source, MODEL_NAMES)) from error
    except ValueError as error:
        raise TaskNameError("model", repr(source), _KNOWN, str(error)) from error
    if spec.kind == "torchvision":
        return load_model(spec, kwargs={"num_classes": task.outputs})
    if spec.kind == "timm":
        return load_model(spec, kwargs={"num_classes": task.outputs, "in_chans": task.input_shape[0]})
    return _module(load_object(spec, kwargs={"input_shape": task.input_shape, "outputs": task.outputs}), source)


def _built_in(source: str, task: Task) -> nn.Module:
    name, colon, numbers = source.partition(":")
    words = numbers.split(",") if colon else []
    if not all(re.fullmatch(r"[1-9]\d*", word) for word in words):
        raise ValueError("Write the settings as positive whole numbers, separated by commas.")
    sizes = [int(word) for word in words]
    if name in ("mlp", "mlp-plain"):
        return multilayer_perceptron(task.input_shape, task.outputs, sizes or [100, 100], normalize=name == "mlp")
    if len(task.input_shape) != 3 or len(sizes) > 2:
        raise ValueError("A resnet has at most two settings and takes images (channels, height, width).")
    return SmallResNet(task.input_shape[0], task.outputs, **dict(zip(("depth", "width"), sizes, strict=False)))


def _by_call(source: Callable[..., nn.Module], task: Task) -> nn.Module:
    accepted = inspect.signature(source).parameters
    made = source(**{name: getattr(task, name) for name in ("input_shape", "outputs") if name in accepted})
    return _module(made, getattr(source, "__qualname__", repr(source)))


def _module(made: Any, source: str) -> nn.Module:
    if not isinstance(made, nn.Module):
        raise TaskSourceError(source, f"an object of type {type(made).__name__}", "a torch.nn.Module")
    return made


@torch.no_grad()
def _require_fit(model: nn.Module, source: ModelSource, task: Task) -> None:
    """Run the network once in evaluation mode, which does not change it, and score its outputs."""
    name = source if isinstance(source, str) else getattr(source, "__qualname__", repr(source))
    inputs, targets = task.parts["train"].batch(torch.arange(min(2, len(task.parts["train"]))))
    try:
        with evaluation_mode(model):
            task.measure(model(inputs), targets)
    except (Exception, SystemExit) as error:
        expected = f"a network for inputs of shape {(*task.input_shape,)} and {task.outputs} outputs"
        raise TaskSourceError(name, f"{type(error).__name__}: {error}", expected) from error


def multilayer_perceptron(
    input_shape: Sequence[int], outputs: int, widths: Sequence[int], *, normalize: bool = True
) -> nn.Sequential:
    """Return a perceptron: (linear → batch normalization → ReLU) for each width, then a linear classifier.

    Linear layers in front of a normalization have no bias, which it would remove.

    Args:
        input_shape: shape of one example; it is flattened.
        outputs: number of outputs.
        widths: widths of the hidden layers.
        normalize: whether to normalize; without, the hidden layers have biases.

    Example:
        >>> multilayer_perceptron((1, 8, 8), 10, [100])
        Sequential(
          (0): Flatten(start_dim=1, end_dim=-1)
          (1): Linear(in_features=64, out_features=100, bias=False)
          (2): BatchNorm1d(100, eps=1e-05, momentum=0.1, affine=True, bias=True, track_running_stats=True)
          (3): ReLU()
          (4): Linear(in_features=100, out_features=10, bias=True)
        )
    """
    sizes, layers = [math.prod(input_shape), *widths], list[nn.Module]()
    for before, width in pairwise(sizes):
        layers += [
            nn.Linear(before, width, bias=not normalize),
            *([nn.BatchNorm1d(width)] if normalize else []),
            nn.ReLU(),
        ]
    return nn.Sequential(nn.Flatten(), *layers, nn.Linear(sizes[-1], outputs))


class BasicBlock(nn.Module):
    """Two 3×3 convolutions with batch normalization around a shortcut, which is projected where shapes differ.

    Args:
        channels_in: channels of the input.
        channels_out: channels of the output.
        stride: stride of the first convolution and of the projection.
    """

    def __init__(self, channels_in: int, channels_out: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels_out)
        self.relu = nn.ReLU()
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels_in != channels_out:
            projection = nn.Conv2d(channels_in, channels_out, 1, stride, bias=False)
            self.shortcut = nn.Sequential(projection, nn.BatchNorm2d(channels_out))

    def forward(self, x: Tensor) -> Tensor:
        """Map (n, channels_in, h, w) to (n, channels_out, h/stride, w/stride)."""
        residual = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return cast(Tensor, self.relu(residual + self.shortcut(x)))


class SmallResNet(nn.Module):
    """A residual network of depth 6n + 2 for small images: three stages of n basic blocks, with widths w, 2w and 4w.

    Args:
        channels: channels of the images.
        outputs: number of classes.
        depth: 8, 14, 20, …
        width: channels of the first stage.

    Raises:
        ValueError: the depth is not 6n + 2.

    References:
        He, Zhang, Ren, Sun, *Deep residual learning for image recognition*, arXiv:1512.03385, section 4.2; with
        projections in place of padded shortcuts.

    Example:
        >>> import torch
        >>> SmallResNet(1, 10, depth=8, width=4)(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """

    def __init__(self, channels: int, outputs: int, *, depth: int = 8, width: int = 16) -> None:
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(f"depth: found {depth}; expected 6n + 2. Use 8, 14, 20, …")
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
        )
        widths = [width * 2**stage for stage in range(3) for _ in range((depth - 2) // 6)]
        self.blocks = nn.Sequential(*(BasicBlock(a, b, b // a) for a, b in pairwise([width, *widths])))
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Map images (n, channels, h, w) to scores (n, outputs)."""
        return cast(Tensor, self.head(self.blocks(self.stem(x))))
