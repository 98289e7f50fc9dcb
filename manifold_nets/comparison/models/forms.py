"""A network in plain and in converted form: one function, two sets of parameters."""

from __future__ import annotations

from typing import Any

from torch import nn

from manifold_nets.conversion import convert
from manifold_nets.errors import FunctionChangedError

__all__ = ["converted_form"]


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
