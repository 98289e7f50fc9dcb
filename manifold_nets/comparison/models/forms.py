"""A network in plain form and on spheres: one function, several sets of parameters."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import nn

from manifold_nets.constraints import attach
from manifold_nets.conversion import convert
from manifold_nets.errors import FunctionChangedError
from manifold_nets.groups import filter_partition
from manifold_nets.manifold import SphereProduct

__all__ = ["Form", "constrained_form", "converted_form", "weight_layers"]

Form = Literal["plain", "converted", "constrained", "constrained-all"]
Layer = nn.Linear | nn.modules.conv._ConvNd


def weight_layers(model: nn.Module) -> dict[str, Layer]:
    """Return the linear and convolution layers of a model by name, in the order in which it names them.

    Example:
        >>> list(weight_layers(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))))
        ['0', '2']
    """
    kinds = (nn.Linear, nn.modules.conv._ConvNd)
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


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


def converted_form(model: nn.Module, report_or_example_inputs: Any, *, inplace: bool = False) -> nn.Module:
    """Put a plain network on spheres: of radius 1, or of the radii that its filters have where radius 1 does not do.

    A division by a norm rounds, and rounding can decide which of two equal values a max-pooling takes; where its
    indices are used again (max-unpooling) the output then changes by more than rounding, and `manifold_nets.convert`
    refuses where float64 copies differ as well. With ``radius="keep"`` every weight stays what it is, bit for bit.
    Optimizers on spheres follow the same path of functions at every radius, but for the eps of the normalizations.

    Args:
        model: the network.
        report_or_example_inputs: what `manifold_nets.diagnose` returned for it, or example inputs.
        inplace: rewrite the model itself.

    Raises:
        NothingToConvertError: no weight is scale-invariant.
        ManifoldNetsError: as `manifold_nets.convert`.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
        >>> converted_form(net, torch.randn(8, 4))[0].weight.manifold.uniform_radius
        1.0
    """
    try:
        return convert(model, report_or_example_inputs, inplace=inplace)
    except FunctionChangedError:
        return convert(model, report_or_example_inputs, radius="keep", inplace=inplace)
