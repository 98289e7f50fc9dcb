"""What the benchmark of the optimizers times: weights, networks, and the optimizers that step them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import geoopt
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.parametrize import register_parametrization

import manifold_nets as mn
from manifold_nets.sources import import_torchvision

Step = Callable[[], object]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Contestant:
    """An optimizer of the benchmark.

    Attributes:
        name: the optimizer, and what is done to the weights.
        execution: how it takes its steps, in the words of its options.
        weights: ``"plain"``, ``"spheres"``, or ``"rows"``: matrices with one filter a row, for optimizers that know no
            other form; in whole training steps also ``"weight_norm"`` and ``"normalized"``, plain weights that a
            parametrization normalizes in each forward pass.
        make: makes the optimizer of the weights.
        matrices_only: whether it refuses all weights that are no matrices, and so whole networks.
    """

    name: str
    execution: str
    weights: str
    make: Callable[..., torch.optim.Optimizer]
    matrices_only: bool = False


@dataclass(frozen=True)
class Timed:
    """A step to time, its optimizer, and the bytes of the weights that it steps."""

    step: Step
    optimizer: torch.optim.Optimizer
    weight_bytes: int


def resnet50() -> Iterator[Shape]:
    """Yield the shapes of the 53 convolution weights of ResNet-50, 23.5 million entries."""
    yield (64, 3, 7, 7)
    channels = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            yield from ((width, channels, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1))
            if block == 0:
                yield (4 * width, channels, 1, 1)
            channels = 4 * width


def mobilenet() -> Iterator[Shape]:
    """Yield the shapes of the 52 convolution weights of MobileNetV3-small, 0.9 million entries."""
    yield (16, 3, 3, 3)
    widths = (16, 16, 24, 24, 40, 40, 40, 48, 48, 96, 96, 96)
    inner = ((16, 3, 8), (72, 3, 0), (88, 3, 0), (96, 5, 24), (240, 5, 64), (240, 5, 64), (120, 5, 32), (144, 5, 40))
    for before, after, (width, kernel, squeeze) in zip(
        widths, widths[1:], (*inner, (288, 5, 72), (576, 5, 144), (576, 5, 144)), strict=False
    ):
        if width != before:
            yield (width, before, 1, 1)
        yield (width, 1, kernel, kernel)
        if squeeze:
            yield from ((squeeze, width, 1, 1), (width, squeeze, 1, 1))
        yield (after, width, 1, 1)
    yield (576, 96, 1, 1)


def transformer() -> Iterator[Shape]:
    """Yield the shapes of the matrices of a transformer of 12 layers of width 768, 100 million entries."""
    yield (20_480, 768)
    for _ in range(12):
        yield from ((2304, 768), (768, 768), (3072, 768), (768, 3072))


SHAPES: dict[str, Callable[[], Iterator[Shape]]] = {
    "resnet50": resnet50,
    "mobilenet": mobilenet,
    "transformer": transformer,
}
# Whole training steps: the network, its batch of images, and the dtype of autocast or None.
TRAINING: dict[str, tuple[str, Shape, torch.dtype | None]] = {
    "training": ("resnet18", (32, 3, 32, 32), None),
    "training-resnet50": ("resnet50", (64, 3, 224, 224), torch.bfloat16),
}


def contestants(method: str, *, relatives: bool = False) -> list[Contestant]:
    """Return the optimizers, torch's fused one and its foreach first; those that are not installed are left out."""
    sgd = method == "sgd"
    options: dict[str, Any] = {"lr": 1e-3, "momentum": 0.9} if sgd else {"lr": 1e-3}
    plain = torch.optim.SGD if sgd else torch.optim.Adam
    ours = mn.optim.RiemannianSGD if sgd else mn.optim.RiemannianAdam
    other = geoopt.optim.RiemannianSGD if sgd else geoopt.optim.RiemannianAdam
    name = plain.__name__

    def with_options(kind: Callable[..., torch.optim.Optimizer], **more: Any) -> Callable[..., torch.optim.Optimizer]:
        return lambda weights: kind(weights, **{**options, **more})

    found = [
        *(
            Contestant(f"torch {name}", f"{how}=True", "plain", with_options(plain, **{how: True}))
            for how in ("fused", "foreach")
        ),
        Contestant(f"Riemannian{name}", "default", "spheres", with_options(ours)),
        Contestant(f"Riemannian{name}, from_torch", "default", "spheres", with_options(partial(following, ours))),
        *(
            Contestant(
                f"on_spheres({name})", f"{how}=True", "spheres", with_options(partial(tangent, plain), **{how: True})
            )
            for how in ("fused", "foreach")
        ),
        *(
            Contestant(f"Riemannian{name}", f"{how}={on}", "spheres", with_options(ours, **{how: on}))
            for how, on in (("foreach", True), ("compile", True), ("foreach", False))
        ),
        Contestant(f"geoopt Riemannian{name}", "one by one", "rows", with_options(other)),
    ]
    found += _of_other_packages(sgd, name, with_options)
    for parametrization in ("weight_norm", "normalized"):
        fused = with_options(plain, fused=True)
        found.append(Contestant(f"torch {name}, {parametrization}", "fused=True", parametrization, fused))
    if relatives:
        for key, row in mn.optim.OPTIMIZERS.items():
            if row.adaptive == sgd or row.kind is ours:
                continue
            make = row.kind if row.weights == "spheres" else in_scaled_metric
            found.append(Contestant(key, "default", row.weights, with_options(make, **row.options)))
    return found


def tangent(kind: Callable[..., torch.optim.Optimizer], params: list[Any], **options: Any) -> torch.optim.Optimizer:
    """Return an optimizer of torch whose steps are made tangent."""
    return mn.optim.on_spheres(kind(params, **options), nn.Module())


def following(kind: Callable[..., torch.optim.Optimizer], params: list[Any], **options: Any) -> torch.optim.Optimizer:
    """Return an optimizer that follows the run of a plain one, as `manifold_nets.optim.from_torch` makes it."""
    groups = params if isinstance(params[0], dict) else [{"params": params}]
    return kind([{**group, "transfer": "follow"} for group in groups], **options)


def in_scaled_metric(weights: list[Tensor], **options: Any) -> torch.optim.Optimizer:
    """Return the optimizer that scales the filters of every weight."""
    partitions = [mn.Partition.filters(w.shape).to_dict() if w.ndim > 1 else None for w in weights]
    return mn.optim.ScaledMetricSGD([{"params": weights, "partitions": partitions}], **options)


def _of_other_packages(sgd: bool, name: str, with_options: Callable[..., Any]) -> list[Contestant]:
    found = []
    try:
        import_torchvision()  # timm imports it, and it may need help
        from timm.optim import SGDP, AdamP

        found.append(Contestant(f"timm {name}P", "one by one", "plain", with_options(SGDP if sgd else AdamP)))
    except ImportError:
        pass
    try:
        from emerging_optimizers.riemannian_optimizers import ObliqueAdam, ObliqueSGD

        kind = ObliqueSGD if sgd else ObliqueAdam
        found.append(Contestant(f"NVIDIA Oblique{name}", "one by one", "rows", with_options(kind, dim=1), True))
    except ImportError:
        pass
    return found


def steps_over(shapes: list[Shape], chosen: list[Contestant], device: str) -> list[Timed]:
    """Return a step of each optimizer; all share the memory of weights and gradients, which they change very little."""
    points = [mn.SphereProduct(s).random_uniform(device=device).as_subclass(Tensor) for s in shapes]
    # Long ones would turn the weights along them within a few dozen steps, as the gradients are always the same.
    gradients = [1e-4 * torch.randn(s, device=device) for s in shapes]
    size = sum(point.nbytes for point in points)
    steps = []
    for contestant in chosen:
        weights = []
        for point, gradient in zip(points, gradients, strict=True):
            if contestant.weights == "plain":
                weight: Tensor = nn.Parameter(point)
            elif contestant.weights == "spheres":
                weight = geoopt.ManifoldParameter(point, manifold=mn.SphereProduct(point.shape))
            else:
                weight = geoopt.ManifoldParameter(point.flatten(1), manifold=geoopt.Sphere())
            weight.grad = gradient.view(weight.shape)
            weights.append(weight)
        optimizer = contestant.make(weights)
        steps.append(Timed(optimizer.step, optimizer, size))
    return steps


def training_steps(workload: str, chosen: list[Contestant], device: str) -> list[Timed]:
    """Return whole training steps of a network: forward pass, backward pass and the optimizer's step."""
    network, shape, dtype = TRAINING[workload]
    classes = 10 if network == "resnet18" else 1000
    images, labels = torch.randn(shape, device=device), torch.randint(classes, shape[:1], device=device)
    plain = getattr(import_torchvision().models, network)(num_classes=classes)
    # Its weights' groups are the same for every batch.
    converted = mn.convert(plain, torch.randn(4, *shape[1:]))
    steps = []
    for contestant in chosen:
        model = _prepared(converted if contestant.weights == "spheres" else plain, contestant.weights).to(device)
        model.train()
        params: Any = mn.param_groups(model) if contestant.weights == "spheres" else list(model.parameters())
        optimizer = contestant.make(params)

        def step(model: nn.Module = model, optimizer: torch.optim.Optimizer = optimizer) -> None:
            optimizer.zero_grad()
            with torch.autocast(device, dtype or torch.bfloat16, enabled=dtype is not None):
                loss = nn.functional.cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()

        steps.append(Timed(step, optimizer, sum(p.nbytes for p in plain.parameters())))
    return steps


class Normalized(nn.Module):
    """A parametrization that divides each filter by its norm in every forward pass."""

    def forward(self, weight: Tensor) -> Tensor:
        """Return filters of unit norm."""
        return weight / weight.flatten(1).norm(dim=1).view(-1, *[1] * (weight.ndim - 1))


class OfRows(nn.Module):
    """A parametrization that gives a matrix of rows the shape of a convolution's weight."""

    def __init__(self, shape: torch.Size) -> None:
        super().__init__()
        self.shape = shape

    def forward(self, rows: Tensor) -> Tensor:
        """Return the weight."""
        return rows.view(self.shape)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Return the rows, of unit norm."""
        rows = weight.flatten(1)
        return rows / rows.norm(dim=1, keepdim=True)


def _prepared(model: nn.Module, weights: str) -> nn.Module:
    """Return a copy of a model whose convolutions have the kind of weights that an optimizer wants."""
    model = copy.deepcopy(model)
    for module in list(model.modules()):
        if not isinstance(module, nn.Conv2d):
            continue
        if weights == "weight_norm":
            weight_norm(module)
        elif weights == "normalized":
            register_parametrization(module, "weight", Normalized())
        elif weights == "rows":
            register_parametrization(module, "weight", OfRows(module.weight.shape))
            held: Any = module.parametrizations["weight"]
            held.original = geoopt.ManifoldParameter(held.original.detach(), manifold=geoopt.Sphere())
    return model
