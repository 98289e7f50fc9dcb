"""SphereProduct as a manifold of pymanopt: the same spheres, the same metric, NumPy arrays in natural shape."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pymanopt.manifolds.manifold import Manifold
from torch import Tensor

from manifold_nets.manifold import SphereProduct

__all__ = ["SphereProductManifold"]

Array = NDArray[Any]


class SphereProductManifold(Manifold):  # type: ignore[misc]
    """The pymanopt twin of a `manifold_nets.SphereProduct`, with all methods that pymanopt's optimizers ask for.

    Points and tangent vectors are NumPy arrays in the natural shape of the weight; results have the dtype of the
    point. The metric is ``⟨ξ, η⟩ = Σ_G ⟨ξ_G, η_G⟩/r_G²``, so that gradient and Hessian of a cost with Euclidean
    gradient ``g`` and Euclidean Hessian ``H`` are, group by group,

        grad = r² (g − ⟨w, g⟩ w/r²),    Hess[u] = r² (H u − ⟨w, H u⟩ w/r²) − ⟨w, g⟩ u.

    `random_point` and `random_tangent_vector` draw from NumPy's global generator, as pymanopt's own manifolds do, so
    that one ``numpy.random.seed`` holds for a whole product.

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
