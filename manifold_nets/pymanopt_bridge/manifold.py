"""The parameters of a model as a point of a product manifold of pymanopt, with spheres among its factors."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pymanopt.manifolds import Euclidean, Product
from pymanopt.manifolds.manifold import Manifold
from torch import Tensor, nn

from manifold_nets.constraints import constrained_weights
from manifold_nets.conversion.projection import way_back
from manifold_nets.errors import ParameterGroupError, PointError
from manifold_nets.joint_sphere import JointSphereMember
from manifold_nets.manifold import SphereProduct

__all__ = ["SphereProductManifold", "parameter_names", "point_of", "product_manifold", "write_back"]

Array = NDArray[Any]
Point = list[Array]

_DTYPES = (torch.float32, torch.float64)
_DECIMALS_LEFT = 1e-3  # a weight farther off its spheres than this was not left there by rounding


class SphereProductManifold(Manifold):  # type: ignore[misc]
    """A `manifold_nets.SphereProduct` as a manifold of pymanopt, with all methods that pymanopt's optimizers use.

    Points and tangent vectors are NumPy arrays in the natural shape of the weight; results have the dtype of the
    point. The metric is ``⟨ξ, η⟩ = Σ_G ⟨ξ_G, η_G⟩/r_G²``, so that gradient and Hessian of a cost with Euclidean
    gradient ``g`` and Euclidean Hessian ``H`` are, group by group,

        grad = r² (g − ⟨w, g⟩ w/r²),    Hess[u] = r² (H u − ⟨w, H u⟩ w/r²) − ⟨w, g⟩ u.

    `random_point` and `random_tangent_vector` use NumPy's global generator, like pymanopt's own manifolds, so that one
    ``numpy.random.seed`` seeds the whole product.

    Args:
        sphere: partition and radii.

    References:
        Absil, Mahony, Sepulchre, *Optimization Algorithms on Matrix Manifolds* (2008), chapter 5, for the Hessian of
        an embedded sphere; a constant factor of the metric changes the gradient, not the connection.

    Example:
        >>> import manifold_nets as mn
        >>> manifold = SphereProductManifold(mn.SphereProduct((8, 5), radius=0.5))
        >>> w = manifold.random_point()
        >>> manifold.dim, w.shape, float(np.linalg.norm(w, axis=1).round(12)[0])
        (32, (8, 5), 0.5)
    """

    def __init__(self, sphere: SphereProduct) -> None:
        self.sphere = sphere
        partition = sphere.partition
        super().__init__(str(sphere), partition.n_groups * (partition.group_size - 1))

    @property
    def typical_dist(self) -> float:
        """Diameter of the product in radians, ``π √n`` for n groups."""
        return math.pi * math.sqrt(self.sphere.partition.n_groups)

    # ---- the metric ------------------------------------------------------------------------------------------------

    def inner_product(self, point: Array, tangent_vector_a: Array, tangent_vector_b: Array) -> float:
        """Inner product ``Σ_G ⟨ξ_G, η_G⟩/r_G²`` of two tangent vectors."""
        return float(self.sphere.inner(_tensor(point), _tensor(tangent_vector_a), _tensor(tangent_vector_b)))

    def norm(self, point: Array, tangent_vector: Array) -> float:
        """Length of a tangent vector in radians."""
        return float(self.sphere.norm(_tensor(point), _tensor(tangent_vector)))

    def dist(self, point_a: Array, point_b: Array) -> float:
        """Geodesic distance in radians."""
        return float(self.sphere.dist(_tensor(point_a), _tensor(point_b)))

    # ---- tangent spaces --------------------------------------------------------------------------------------------

    def projection(self, point: Array, vector: Array) -> Array:
        """Orthogonal projection of a vector on the tangent space."""
        return _array(self.sphere.proju(_tensor(point), _tensor(vector)))

    def to_tangent_space(self, point: Array, vector: Array) -> Array:
        """Put a vector back into the tangent space; the projection."""
        return self.projection(point, vector)

    def zero_vector(self, point: Array) -> Array:
        """Zero of the tangent space."""
        return np.zeros_like(point)

    def euclidean_to_riemannian_gradient(self, point: Array, euclidean_gradient: Array) -> Array:
        """Riemannian gradient from the Euclidean one."""
        return _array(self.sphere.egrad2rgrad(_tensor(point), _tensor(euclidean_gradient)))

    def euclidean_to_riemannian_hessian(
        self, point: Array, euclidean_gradient: Array, euclidean_hessian: Array, tangent_vector: Array
    ) -> Array:
        """Riemannian Hessian along a tangent vector ``u`` from the Euclidean gradient and ``H u``."""
        w, gradient, along, u = map(_tensor, (point, euclidean_gradient, euclidean_hessian, tangent_vector))
        radial = self.sphere.partition.inner(w, gradient)
        return _array(self.sphere.egrad2rgrad(w, along) - self.sphere.partition.multiply(u, radial))

    # ---- moving ----------------------------------------------------------------------------------------------------

    def retraction(self, point: Array, tangent_vector: Array) -> Array:
        """Metric projection of ``w + u``, a retraction of second order."""
        return _array(self.sphere.retr(_tensor(point), _tensor(tangent_vector)))

    def exp(self, point: Array, tangent_vector: Array) -> Array:
        """Geodesic from a point."""
        return _array(self.sphere.expmap(_tensor(point), _tensor(tangent_vector)))

    def log(self, point_a: Array, point_b: Array) -> Array:
        """Tangent vector at the first point whose geodesic reaches the second at time 1."""
        return _array(self.sphere.logmap(_tensor(point_a), _tensor(point_b)))

    def transport(self, point_a: Array, point_b: Array, tangent_vector_a: Array) -> Array:
        """Vector transport by projection on the tangent space at the second point."""
        return _array(self.sphere.transp(_tensor(point_a), _tensor(point_b), _tensor(tangent_vector_a)))

    def pair_mean(self, point_a: Array, point_b: Array) -> Array:
        """Return the point half way along the geodesic between two points."""
        return self.exp(point_a, self.log(point_a, point_b) / 2)

    # ---- sampling --------------------------------------------------------------------------------------------------

    def random_point(self) -> Array:
        """Draw a point uniformly, in float64."""
        entries = np.random.normal(size=self.sphere.partition.shape)  # noqa: NPY002  see the class
        return _array(self.sphere.projx(_tensor(entries)))

    def random_tangent_vector(self, point: Array) -> Array:
        """Draw a tangent vector of unit length; zero where the spheres have no directions."""
        entries = np.random.normal(size=point.shape).astype(point.dtype)  # noqa: NPY002  see the class
        vector = self.projection(point, entries)
        length = self.norm(point, vector)
        return vector if length == 0 else vector / length


def _tensor(array: Array) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))


def _array(tensor: Tensor) -> Array:
    array: Array = tensor.detach().numpy()
    return array


# ---- parameters and points -------------------------------------------------------------------------------------------


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
            remedy = "Call model.double(); second-order methods need float64."
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
    """Return the manifold of a model's parameters, as a `pymanopt.manifolds.Product`.

    Args:
        model: any module with real parameters; its weights on a `manifold_nets.SphereProduct` are found.

    Raises:
        PointError: no parameter requires a gradient, one is neither float32 nor float64, or one shares its sphere with
            others.
        ParameterGroupError: a parameter lies on a manifold other than a `manifold_nets.SphereProduct`.

    Example:
        >>> import manifold_nets as mn
        >>> int(product_manifold(mn.layers.UnitNormLinear(4, 3)).dim)  # 3 spheres of 3 dimensions, 3 biases
        12
    """
    spheres, parameters = _spheres(model), trained_parameters(model)
    factors = [
        SphereProductManifold(spheres[name]) if name in spheres else Euclidean(*(parameter.shape or (1,)))
        for name, parameter in parameters.items()
    ]
    return Product(factors)


def point_of(model: nn.Module) -> Point:
    """Return the parameters of a model as a point: float64 copies, one array per parameter, in its shape.

    Weights on spheres are projected once more in float64, which removes their rounding error; a parameter without axes
    becomes an array of shape (1,). The network still runs in its own dtype.

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
            spheres[name].refuse_degenerate(value, name)
            remedy = functools.partial(way_back, model, name)
            spheres[name].require_point(value, name, rtol=_DECIMALS_LEFT, remedy=remedy)
            value = spheres[name].projx(value)
        point.append(value.numpy().reshape(value.shape or (1,)))
    return point


def write_back(model: nn.Module, point: Sequence[NDArray[Any]]) -> None:
    """Write a point into the parameters of a model, in place; parameter objects, manifolds and dtypes stay the same.

    Buffers, including the running statistics of batch normalization, are not changed; `NetworkProblem.write_back` also
    updates those.

    Args:
        model: the model, or another one of the same structure.
        point: one array per parameter, as in `point_of`.

    Raises:
        PointError: number or shape of the arrays is not that of the parameters, or an entry is not finite; the model
            is unchanged.

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
        raise PointError("point", f"{len(point)} arrays", f"{len(parameters)}, one per parameter", remedy)
    for (name, parameter), array in zip(parameters.items(), point, strict=True):
        if math.prod(array.shape) != parameter.numel() or array.shape != (parameter.shape or (1,)):
            raise PointError(f"point, {name}", f"shape {array.shape}", f"shape {tuple(parameter.shape)}", remedy)
        if not np.isfinite(array).all():
            raise PointError(f"point, {name}", "entries that are not finite", "finite numbers", remedy)


def _spheres(model: nn.Module) -> dict[str, SphereProduct]:
    for name, parameter in model.named_parameters():
        manifold = getattr(parameter, "manifold", None)
        if not (manifold is None or isinstance(manifold, SphereProduct) or manifold.name == "Euclidean"):
            remedy = "Optimize it with pymanopt's or geoopt's own manifolds."
            raise ParameterGroupError(name, f"the manifold {manifold}", "a SphereProduct, or none", remedy)
    spheres = {weight.name: weight.manifold for weight in constrained_weights(model)}
    for name, manifold in spheres.items():
        if isinstance(manifold, JointSphereMember):
            found = f"a sphere that it shares with {', '.join(manifold.others)}"
            remedy = "Convert without the remedy 'joint-spheres', or train with manifold_nets.optim."
            raise PointError(name, found, "spheres of its own", remedy)
    return spheres
