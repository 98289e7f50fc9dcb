"""The parameters of a model as a point of a product manifold, and a point as the parameters of a model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pymanopt.manifolds import Euclidean, Product
from torch import nn

from manifold_nets.constraints import constrained_weights
from manifold_nets.conversion.projection import way_back
from manifold_nets.errors import PointError, UnsupportedManifoldError
from manifold_nets.joint_sphere import JointSphereMember
from manifold_nets.manifold import SphereProduct
from manifold_nets.pymanopt_bridge.sphere_product import SphereProductManifold

__all__ = [
    "Point",
    "parameter_names",
    "point_of",
    "product_manifold",
    "trained_parameters",
    "write_back",
]

Point = list[NDArray[Any]]

_DTYPES = (torch.float32, torch.float64)
_DECIMALS_LEFT = 1e-3  # a weight farther off its spheres than this was not left there by rounding


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that make up a point, by name: those that require a gradient, shared ones once.

    Raises:
        PointError: there is none, or one is neither float32 nor float64.
    """
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not named:
        remedy = "Call requires_grad_() on the parameters to be trained."
        raise PointError(type(model).__name__, "no parameter that requires a gradient", "at least one", remedy)
    for name, parameter in named.items():
        if parameter.dtype not in _DTYPES or parameter.is_meta:
            found = "no values" if parameter.is_meta else f"dtype {parameter.dtype}"
            remedy = "Call model.double(); second-order methods need its digits."
            raise PointError(name, found, "values in float32 or float64", remedy)
    return named


def parameter_names(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the parameters that make up a point, in the order of its arrays.

    Example:
        >>> parameter_names(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)))
        ('0.weight', '0.bias', '1.weight', '1.bias')
    """
    return tuple(trained_parameters(model))


def product_manifold(model: nn.Module) -> Product:
    """Return the manifold on which the parameters of a model live, as a `pymanopt.manifolds.Product`.

    Args:
        model: any module with real parameters; weights on a `manifold_nets.SphereProduct` are found through it.

    Raises:
        PointError: no parameter requires a gradient, one is neither float32 nor float64, or one lies on a sphere
            together with others.
        UnsupportedManifoldError: a parameter lies on a manifold that is no `manifold_nets.SphereProduct`.

    Example:
        >>> import manifold_nets as mn
        >>> int(product_manifold(mn.layers.UnitNormLinear(4, 3)).dim)  # 3 spheres of 3 dimensions, 3 biases
        12
    """
    spheres = _spheres(model)
    return Product(
        [
            SphereProductManifold(spheres[name]) if name in spheres else Euclidean(*(parameter.shape or (1,)))
            for name, parameter in trained_parameters(model).items()
        ]
    )


def point_of(model: nn.Module) -> Point:
    """Return the parameters of a model as a point: float64 copies, one array a parameter, in its shape.

    A weight on spheres is put on them once more, which removes what rounding left; a parameter without axes becomes
    an array of shape (1,). The network runs in its own dtype all the same.

    Raises:
        PointError: as `product_manifold`.
        OffManifoldError: a weight is not on its spheres.
        DegenerateGroupError: a group of a weight is zero or not finite.

    Example:
        >>> [array.shape for array in point_of(nn.Linear(4, 3))]
        [(3, 4), (3,)]
    """
    spheres = _spheres(model)
    point: Point = []
    for name, parameter in trained_parameters(model).items():
        value = parameter.detach().as_subclass(torch.Tensor).cpu().to(torch.float64, copy=True)
        if name in spheres:
            sphere = spheres[name]
            sphere.refuse_degenerate(value, name)
            remedy = way_back(model, name)
            sphere.require_point(value, name, rtol=_DECIMALS_LEFT, remedy=remedy)
            value = sphere.projx(value)
        point.append(value.numpy().reshape(value.shape or (1,)))
    return point


def write_back(model: nn.Module, point: Sequence[NDArray[Any]]) -> None:
    """Write a point into the parameters of a model, in place: parameter objects, manifolds and dtypes stay.

    Buffers, the running statistics of batch normalization among them, are left as they are;
    `NetworkProblem.write_back` also takes those anew.

    Args:
        model: the model, or another one of the same structure.
        point: one array a parameter, as in `point_of`.

    Raises:
        PointError: number or shape of the arrays is not that of the parameters, or an entry is not finite; the model
            is left as it was.

    Example:
        >>> first, second = nn.Linear(4, 3), nn.Linear(4, 3)
        >>> write_back(second, point_of(first))
        >>> bool((first.weight == second.weight).all())
        True
    """
    parameters = trained_parameters(model)
    _require_fit(parameters, point)
    with torch.no_grad():
        for parameter, array in zip(parameters.values(), point, strict=True):
            parameter.copy_(torch.from_numpy(np.ascontiguousarray(array)).reshape(parameter.shape))


def _require_fit(parameters: dict[str, nn.Parameter], point: Sequence[NDArray[Any]]) -> None:
    """Raise `PointError` unless a point has one finite array of the right shape for each parameter."""
    remedy = "Pass a point of this model, as point_of(model) or an optimizer's result.point."
    if len(point) != len(parameters):
        raise PointError("point", f"{len(point)} arrays", f"{len(parameters)}, one a parameter", remedy)
    for (name, parameter), array in zip(parameters.items(), point, strict=True):
        if math.prod(array.shape) != parameter.numel() or array.shape != (parameter.shape or (1,)):
            raise PointError(f"point, {name}", f"shape {array.shape}", f"shape {tuple(parameter.shape)}", remedy)
        if not np.isfinite(array).all():
            raise PointError(f"point, {name}", "entries that are not finite", "finite numbers", remedy)


def _spheres(model: nn.Module) -> dict[str, SphereProduct]:
    for name, parameter in model.named_parameters():
        manifold = getattr(parameter, "manifold", None)
        if not (manifold is None or isinstance(manifold, SphereProduct) or manifold.name == "Euclidean"):
            raise UnsupportedManifoldError(name, manifold)
    spheres = {weight.name: weight.manifold for weight in constrained_weights(model)}
    for name, manifold in spheres.items():
        if isinstance(manifold, JointSphereMember):
            found = f"a sphere together with {', '.join(manifold.others)}"
            remedy = "Convert without the remedy joint-spheres, or train with the optimizers of manifold_nets.optim."
            raise PointError(name, found, "spheres of its own", remedy)
    return spheres
