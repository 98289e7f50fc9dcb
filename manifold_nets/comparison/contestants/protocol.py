"""Contestants for models whose filters are held at their norms, and the scaled metric with a classifier by columns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from manifold_nets.comparison.contestants.steppers import TorchStepper
from manifold_nets.comparison.errors import SettingsError
from manifold_nets.comparison.models.forms import weight_layers
from manifold_nets.comparison.protocols import Stepper
from manifold_nets.comparison.records import Settings
from manifold_nets.groups import Partition, filter_partition
from manifold_nets.optim import RiemannianSGD, ScaledMetricSGD, param_groups, scaled_metric_groups

__all__ = ["constrained", "scaled_metric_by_columns"]

_NORMALIZATIONS = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)


def constrained(
    kind: Callable[..., torch.optim.Optimizer], **options: Any
) -> Callable[[nn.Module, float, Settings], Stepper]:
    """Make one of our optimizers for whatever lies on spheres in a model.

    Args:
        kind: its class; `RiemannianSGD` takes the momentum of the settings unless it is among the options.
        options: further options.
    """

    def make(model: nn.Module, rate: float, settings: Settings) -> Stepper:
        groups = param_groups(model, weight_decay=settings.weight_decay)
        momentum = {"momentum": settings.momentum} if kind is RiemannianSGD else {}
        return TorchStepper(kind(groups, lr=rate, **{**momentum, **options}))

    return make


def scaled_metric_by_columns(model: nn.Module, rate: float, settings: Settings) -> Stepper:
    """Make the scaled metric with hidden layers by rows and the classifier by columns, without momentum.

    ``W ← W − λ Diag(W Wᵀ) ∇W`` and ``θ ← θ − λ ∇θ Diag(θᵀ θ)``. By rows a layer is invariant where a normalization
    follows it. Without normalization the scales of a filter are passed on to the columns of the next layer; of that
    symmetry the metric is known for one hidden layer, the first, but not for those between it and the classifier.

    Raises:
        SettingsError: the model has several hidden layers and one of them is not followed by a normalization.

    References:
        Badrinarayanan, Mishra, Cipolla, *Symmetry-invariant optimization in deep networks*, arXiv:1511.01754.
    """
    layers = list(weight_layers(model).items())
    bare = _without_normalization(model)
    if len(layers) > 2 and bare:
        raise SettingsError(
            "optimizers",
            f"sm-columns, for a model with {len(layers) - 1} hidden layers and no normalization after {bare[0]}",
            "a normalization after every hidden layer, or one hidden layer: no metric is known for the layers between "
            "the first and the classifier without normalization",
        )
    partitions: dict[str, Partition | None] = {f"{name}.weight": filter_partition(layer) for name, layer in layers}
    name, classifier = layers[-1]
    shape = tuple(classifier.weight.shape)
    partitions[f"{name}.weight"] = Partition(shape, shape, (1,))
    groups = scaled_metric_groups(model, partitions, weight_decay=settings.weight_decay)
    return TorchStepper(ScaledMetricSGD(groups, lr=rate))


def _without_normalization(model: nn.Module) -> list[str]:
    """Names of the hidden layers after which, in the order of the modules, no normalization comes next."""
    layers, last = weight_layers(model), None
    bare: list[str] = []
    for name, module in model.named_modules():
        if name in layers:
            bare += [] if last is None else [last]
            last = name
        elif isinstance(module, _NORMALIZATIONS):
            last = None
    return bare
