"""Optimizers of the paper's protocol: filters held at their norms, and the scaled metric with a classifier by columns.

    manifold-nets compare --optimizers sgd,examples/paper/protocol.py:un --initialization balanced …

References:
    Badrinarayanan, Mishra, Cipolla, *Understanding symmetries in deep networks*, arXiv:1511.01029.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from manifold_nets.comparison import OptimizerSpec, Settings, Stepper, TorchStepper
from manifold_nets.comparison.errors import SettingsError
from manifold_nets.comparison.experiment import weight_layers
from manifold_nets.comparison.optimizers import Make
from manifold_nets.constraints import attach
from manifold_nets.groups import Partition, filter_partition
from manifold_nets.manifold import SphereProduct
from manifold_nets.optim import RiemannianAdam, RiemannianSGD, ScaledMetricSGD, param_groups, scaled_metric_groups

__all__ = ["constrained_form", "radam_all", "rsgd_all", "sm_columns", "un"]

_NORMALIZATIONS = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)


def constrained_form(model: nn.Module, *, classifier: bool = False) -> nn.Module:
    """Hold every filter of the linear and convolution layers at the norm that it has, in place.

    Where a normalization absorbs the norms this is the converted form. Where none does, it is another class of models:
    the same function at the start, but norms that training could change are constants now.

    Args:
        model: a plain network.
        classifier: whether the last of these layers is constrained as well.

    Raises:
        ManifoldNetsError: a filter is zero or not finite.

    Example:
        >>> net = constrained_form(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)))
        >>> [hasattr(net[i].weight, "manifold") for i in (0, 2)]
        [True, False]
    """
    layers = list(weight_layers(model).values())
    for module in layers if classifier else layers[:-1]:
        partition = filter_partition(module)
        norms = partition.norms(module.weight.detach().double()).flatten()
        rounding = 8 * torch.finfo(module.weight.dtype).eps
        unit = bool(((norms - 1).abs() <= rounding).all())
        attach(module, "weight", SphereProduct(partition, radius=1.0 if unit else norms))
    return model


def constrained(kind: Any, *, classifier: bool = False, **options: Any) -> Make:
    """Hold every filter at its norm, and make a Riemannian optimizer for the model.

    Args:
        kind: its class; `RiemannianSGD` takes the momentum of the settings unless it is among the options.
        classifier: whether the last layer is constrained as well.
        options: further options.
    """

    def make(model: nn.Module, rate: float, settings: Settings) -> Stepper:
        constrained_form(model, classifier=classifier)
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


un, sm_columns, rsgd_all, radam_all = (
    OptimizerSpec(name, "plain", family, "manifold_nets", make, description=description)
    for name, family, make, description in (
        ("un", "sgd", constrained(RiemannianSGD, momentum=0.0), "hidden filters held at their norms, no momentum"),
        (
            "sm-columns",
            "sgd",
            scaled_metric_by_columns,
            "the scaled metric; the classifier by the columns of its inputs",
        ),
        ("rsgd-all", "sgd", constrained(RiemannianSGD, classifier=True), "Riemannian SGD, classifier held too"),
        ("radam-all", "adam", constrained(RiemannianAdam, classifier=True), "Riemannian Adam, classifier held too"),
    )
)
