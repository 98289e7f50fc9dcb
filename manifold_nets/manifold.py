"""SphereProduct: the product of spheres on which a weight with scale-invariant groups lives."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from manifold_nets._geoopt import geoopt
from manifold_nets.errors import OffManifoldError, PartitionError
from manifold_nets.groups import Partition, accumulation_dtype, refuse_degenerate, root_sum_squares, wide
from manifold_nets.radii import Radii

__all__ = ["SphereProduct", "on_first_instance"]


def _load_optimizers() -> None:
    """Import the code that watches constrained weights; it is above this module and may not have been imported yet."""
    importlib.import_module("manifold_nets.optim")


_on_first_instance: list[Callable[[], None]] = [_load_optimizers]


def on_first_instance(action: Callable[[], None]) -> None:
    """Register a function to be called once, before the first `SphereProduct` is made, copied or unpickled."""
    _on_first_instance.append(action)


class SphereProduct(geoopt.Manifold):  # type: ignore[misc]
    r"""The product of spheres of a weight tensor: each group ``G`` keeps its norm, ‖w_G‖ = r_G.

    A point is a whole weight tensor in its natural shape. The metric is the unit sphere's at every radius,

    .. math:: ⟨ξ, η⟩_w = \sum_G ⟨ξ_G, η_G⟩ / r_G^2 ,

    so lengths are in radians, ``egrad2rgrad`` is r² times the projected gradient, and steps with the same learning rate
    follow the same path of unit directions at every radius. `inner`, `norm` and `dist` are scalars over the whole
    product, as in `geoopt.ProductManifold`; `group_inner` and `component_dist` have one value per group. Half-precision
    tensors are computed in float32 and rounded once at the end. Every method has a gradient, also at coinciding points
    and zero vectors. A group of one entry is a sphere of two points, with nothing to optimize.

    Args:
        shape: natural shape of the weight, or a `Partition`.
        view: shape that the weight is viewed in (default: ``shape``).
        kept: axes of the view that number the groups (default: axis 0, the filters).
        radius: one number for all groups, or one per group in the order of the groups.

    Raises:
        PartitionError: the view or the kept axes do not fit, or a radius is not positive and finite.

    References:
        Badrinarayanan, Mishra, Cipolla, arXiv:1511.01029; Absil, Mahony, Sepulchre, *Optimization Algorithms on
        Matrix Manifolds* (2008), for the projection, the retraction and the exponential map of the sphere.

    Example:
        >>> sphere = SphereProduct((8, 3, 5, 5))
        >>> w = sphere.random_uniform(8, 3, 5, 5)
        >>> sphere.check_point_on_manifold(w), float(sphere.dist(w, w))
        (True, 0.0)
    """

    name = "SphereProduct"
    reversible = False
    # Subclasses that `from_dict` chooses, by their additional key in `to_dict`.
    _kinds: ClassVar[dict[str, type[SphereProduct]]] = {}

    def __new__(cls, *args: Any, **kwargs: Any) -> SphereProduct:
        """Make room for an instance, after what was waiting for the first one."""
        while _on_first_instance:
            _on_first_instance.pop()()
        return super().__new__(cls)  # type: ignore[no-any-return]

    def __init__(
        self,
        shape: Sequence[int] | Partition,
        *,
        view: Sequence[int] | None = None,
        kept: Sequence[int] | None = None,
        radius: float | Sequence[float] | Tensor = 1.0,
    ) -> None:
        super().__init__()
        if not isinstance(shape, Partition):
            axes = (0,) if kept is None else tuple(kept)
            shape = Partition(tuple(shape), tuple(shape if view is None else view), axes)
        elif view is not None or kept is not None:
            found = "a partition together with a view or kept axes"
            raise PartitionError(found, "only one of them", "Leave the other out.")
        self.partition = shape
        self.ndim = len(self.partition.shape)
        self._radii = Radii(self.partition, radius)

    @property
    def uniform_radius(self) -> float | None:
        """The radius if all groups have the same one, else None."""
        return self._radii.uniform

    @property
    def radii(self) -> Tensor:
        """Radius of each group: float64, shape ``(n_groups,)``, on the CPU."""
        return self._radii.tensor()

    def radius_for(self, x: Tensor) -> Tensor | float:
        """Return the radii as a factor for the groups of ``x``: a number, or a tensor of ``spread_shape``."""
        return self._radii.factor(x)

    @property
    def moderate(self) -> bool:
        """Whether sums of products of the size of the radii stay in the range of float32."""
        return self._radii.moderate

    @property
    def squared_radii(self) -> np.ndarray:
        """Squared radii, float64: one if all groups share it, else one per group; always at the same memory address."""
        return self._radii.squares

    def to_dict(self) -> dict[str, Any]:
        """Return partition and radii as plain lists for JSON; a single radius if all groups share it."""
        return {**self.partition.to_dict(), "radius": list(self._radii.values)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SphereProduct:
        """Rebuild a manifold from `to_dict`."""
        kind = next((kind for key, kind in cls._kinds.items() if key in data), None)
        if kind is not None:
            return kind.from_dict(data)
        return cls(Partition.from_dict(data), radius=data["radius"])

    # ---- points and tangent vectors --------------------------------------------------------------------------------

    def projx(self, x: Tensor) -> Tensor:
        """Nearest point: each group is scaled to its radius, ``r w/‖w‖``.

        Raises:
            DegenerateGroupError: a group is zero or not finite.
        """
        self.require_shape(x)
        norms = self.partition.norms(x)
        refuse_degenerate(norms, "x")
        # A subnormal norm is imprecise; a second pass removes the error that it leaves.
        unit = self.partition.divide(wide(x), norms)
        return self._onto_spheres(unit, self.partition.norms(unit)).to(x.dtype)

    def proju(self, x: Tensor, u: Tensor) -> Tensor:
        """Orthogonal projection on the tangent space: ``u − ⟨w, u⟩ w/r²`` in each group."""
        self.require_shape(x, u)
        partition, x_wide, u_wide = self.partition, wide(x), wide(u)
        if self._radii.moderate and partition.group_size > 1:
            coefficient = self._radii.divide_twice(partition.inner(x_wide, u_wide))
            return partition.subtract(u_wide, coefficient, x_wide).to(u.dtype)
        return self._tangential(self._radii.divide(x_wide), u_wide).to(u.dtype)

    def egrad2rgrad(self, x: Tensor, u: Tensor) -> Tensor:
        """Riemannian gradient: ``r² (g − ⟨w, g⟩ w/r²)`` in each group, from the Euclidean gradient ``g``."""
        return self._radii.multiply_twice(self.proju(wide(x), wide(u))).to(u.dtype)

    def group_inner(self, x: Tensor, u: Tensor, v: Tensor | None = None) -> Tensor:
        """Inner product ``⟨u, v⟩/r²`` of each group, in ``partition.spread_shape`` and float32 or better."""
        self.require_shape(u, u if v is None else v)
        if self._radii.moderate:
            return self._radii.divide_twice(self.partition.inner(u, u if v is None else v))
        first = self._radii.divide(wide(u))
        return self.partition.inner(first, first if v is None else self._radii.divide(wide(v)))

    def component_inner(self, x: Tensor, u: Tensor, v: Tensor | None = None) -> Tensor:
        """Inner product ``⟨u, v⟩/r²`` of each group, repeated over its entries so that it broadcasts with ``x``."""
        inner = self.group_inner(x, u, v)
        if self.partition.view == self.partition.shape:
            return inner
        return inner.expand(self.partition.view).reshape(self.partition.shape)

    def inner(self, x: Tensor, u: Tensor, v: Tensor | None = None, *, keepdim: bool = False) -> Tensor:
        """Inner product of two tangent vectors over the whole product: a scalar, in the dtype of ``u``."""
        return self._total(self.group_inner(x, u, v), keepdim).to(u.dtype)

    def norm(self, x: Tensor, u: Tensor, *, keepdim: bool = False) -> Tensor:
        """Length of a tangent vector in radians: ``(Σ_G ‖u_G‖²/r_G²)^½``."""
        self.require_shape(u)
        return self._norm(self._radii.divide(wide(u)), keepdim).to(u.dtype)

    # ---- moving ----------------------------------------------------------------------------------------------------

    def retr(self, x: Tensor, u: Tensor) -> Tensor:
        """Metric projection of ``x + u``: ``r (w + u)/‖w + u‖``, a retraction of second order."""
        self.require_shape(x, u)
        moved = wide(x) + wide(u)
        return self._onto_spheres(moved, self.partition.norms(moved)).to(x.dtype)

    def expmap(self, x: Tensor, u: Tensor) -> Tensor:
        """Geodesic from ``x``: ``cos(θ) w + (sin θ/θ) u`` with ``θ = ‖u‖/r`` in each group."""
        self.require_shape(x, u)
        x, u, dtype = wide(x), wide(u), x.dtype
        angle = self.partition.norms(self._radii.divide(u))
        moved = self.partition.multiply(x, angle.cos()) + self.partition.multiply(u, torch.sinc(angle / math.pi))
        return self._onto_spheres(moved, self.partition.norms(moved)).to(dtype)

    def logmap(self, x: Tensor, y: Tensor) -> Tensor:
        """Tangent vector at ``x`` whose geodesic reaches ``y`` at time 1, of length `dist`.

        Antipodes have many shortest geodesics; the same one is always returned. A group of one entry has no tangent
        vectors; zero is returned.
        """
        self.require_shape(x, y)
        partition, x_unit = self.partition, self._radii.divide(wide(x))
        angle, direction = self._geodesic(wide(x), wide(y))
        tiny = torch.finfo(angle.dtype).tiny
        antipodal = (angle > 1) & (partition.norms(direction) <= tiny)
        direction = partition.where(antipodal, self._any_tangent(x_unit), direction)
        length = partition.norms(direction)
        # If no direction is left, the points coincide, and the ratio of angle and length tends to 1.
        ratio = torch.where(length <= tiny, 1.0, angle / torch.where(length <= tiny, 1.0, length))
        return self._radii.multiply(partition.multiply(direction, ratio)).to(x.dtype)

    def component_dist(self, x: Tensor, y: Tensor) -> Tensor:
        """Angle between the groups of two points, in radians: shape ``(n_groups,)``, float32 or better."""
        self.require_shape(x, y)
        return self._geodesic(wide(x), wide(y))[0].flatten()

    def dist(self, x: Tensor, y: Tensor, *, keepdim: bool = False) -> Tensor:
        """Geodesic distance in radians: the root of the sum of the squared angles of all groups."""
        return self._norm(self.component_dist(x, y), keepdim).to(x.dtype)

    def dist2(self, x: Tensor, y: Tensor, *, keepdim: bool = False) -> Tensor:
        """Squared geodesic distance in square radians."""
        return self._total(self.component_dist(x, y).square(), keepdim).to(x.dtype)

    def transp(self, x: Tensor, y: Tensor, v: Tensor) -> Tensor:
        """Vector transport by projection on the tangent space at ``y``."""
        return self.proju(y, v)

    # ---- sampling --------------------------------------------------------------------------------------------------

    def random_uniform(
        self, *size: int, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> Tensor:
        """Draw a point uniformly on the product of spheres, as a `geoopt.ManifoldTensor` of the natural shape."""
        return self._sample(torch.randn, size, dtype, device)

    random = random_uniform

    def origin(
        self,
        *size: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        seed: int | None = 42,
    ) -> Tensor:
        """Return a fixed point: all entries of a group are equal and positive, with norm ``r``."""
        return self._sample(torch.ones, size, dtype, device)

    def extra_repr(self) -> str:
        """Partition and radii, for `repr`."""
        points = "; groups of one entry are two points: nothing to optimize" if self.partition.group_size == 1 else ""
        return f"{self.partition}, {self._radii}{points}"

    # ---- arithmetic ------------------------------------------------------------------------------------------------

    def _onto_spheres(self, x: Tensor, norms: Tensor) -> Tensor:
        # Divide, then multiply: the ratio of radius and norm may be out of range where the result is not.
        return self._radii.multiply(self.partition.divide(x, norms))

    def _tangential(self, x_unit: Tensor, u: Tensor) -> Tensor:
        if self.partition.group_size == 1:
            return u * 0.0  # there is no tangent vector but zero; rounding would leave a multiple of u
        return self.partition.subtract(u, self.partition.inner(x_unit, u), x_unit)

    def _geodesic(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return the angle of each group, and a tangent vector towards ``y`` whose length is the sine of the angle.

        The direction is computed from ``y − w`` for acute angles and from ``y + w`` for obtuse ones. These differences
        are exact, so near and nearly antipodal points lose no digits, as they would with an arc cosine.
        """
        x_unit, partition = self._radii.divide(x), self.partition
        cosine = partition.inner(x_unit, self._radii.divide(y))
        gap = self._radii.divide(partition.subtract(y, torch.where(cosine < 0, -torch.ones_like(cosine), 1.0), x))
        # The projection of a short vector is imprecise; a second one removes the error that it leaves.
        direction = self._tangential(x_unit, self._tangential(x_unit, gap))
        return torch.atan2(partition.norms(direction) * partition.norms(x_unit), cosine), direction

    def _any_tangent(self, x_unit: Tensor) -> Tensor:
        """Return a fixed tangent vector: the coordinate of each group that the point uses least, projected."""
        rows = self.partition.rows(x_unit)
        axis = torch.arange(rows.shape[1], device=rows.device) == rows.abs().argmin(1, keepdim=True)
        return self._tangential(x_unit, self.partition.from_rows(axis.to(rows.dtype)))

    def _total(self, values: Tensor, keepdim: bool) -> Tensor:
        return values.sum().reshape((1,) * self.ndim if keepdim else ())

    def _norm(self, values: Tensor, keepdim: bool) -> Tensor:
        return self._total(root_sum_squares(values.flatten(), ((0,),)), keepdim)

    def _sample(
        self,
        draw: Callable[..., Tensor],
        size: tuple[int, ...],
        dtype: torch.dtype | None,
        device: torch.device | str | None,
    ) -> Tensor:
        shape = geoopt.utils.size2shape(*size) if size else self.partition.shape
        self._assert_check_shape(shape, "x")
        dtype = dtype or torch.get_default_dtype()
        entries = draw(shape, dtype=accumulation_dtype(dtype), device=device)
        point: Tensor = geoopt.ManifoldTensor(self.projx(entries).to(dtype), manifold=self)
        return point

    # ---- checks: those that geoopt asks for, and those that raise this package's errors -----------------------------
    # Norms are taken in float64. Rounding a tensor to its dtype is allowed for on top of atol and rtol, so that
    # half-precision points pass geoopt's assertions at their default tolerances.

    def require_shape(self, *tensors: Tensor) -> None:
        """Raise `PartitionError` if a point or vector is not real or has another shape than the weight.

        A tensor of another shape with as many entries would silently be divided into other groups.
        """
        for tensor in tensors:
            if tensor.shape != self.partition.shape:
                found = f"a tensor of shape {tuple(tensor.shape)} for {self.partition}"
                expected = f"the natural shape {self.partition.shape} of the weight"
                raise PartitionError(found, expected, "Pass one whole weight in that shape.")
            if not tensor.dtype.is_floating_point:
                remedy = "Cast it, or use real parameters."
                raise PartitionError(f"a tensor of {tensor.dtype}", "a real floating-point dtype", remedy)

    def refuse_degenerate(self, x: Tensor, name: str) -> None:
        """Raise `DegenerateGroupError` with the weight's name if a group is zero or not finite."""
        self.require_shape(x)
        refuse_degenerate(self.partition.norms(x), name)

    def deviations(self, x: Tensor) -> Tensor:
        """Relative deviation ``|‖w_G‖/r_G − 1|`` of each group: float64, shape ``(n_groups,)``, on the CPU."""
        self.require_shape(x)
        return (self.partition.norms(x.detach().double()).flatten().cpu() / self._radii.tensor() - 1).abs()

    def require_point(self, x: Tensor, name: str, *, rtol: float, remedy: str | Callable[[], str]) -> None:
        """Raise `OffManifoldError` with the weight's name if a norm is off its radius by more than ``rtol``."""
        deviations = self.deviations(x)
        worst = int(torch.nan_to_num(deviations, nan=math.inf).argmax())
        if not float(deviations[worst]) <= rtol:
            raise OffManifoldError(name, worst, *self._found_and_expected(x, worst), remedy)

    def _check_shape(self, shape: Sequence[int], name: str) -> tuple[bool, str | None]:
        if tuple(shape) == self.partition.shape:
            return True, None
        return False, f"`{name}` has shape {tuple(shape)}, but these spheres hold shape {self.partition.shape}"

    def _check_point_on_manifold(self, x: Tensor, *, atol: float = 1e-5, rtol: float = 1e-5) -> tuple[bool, str | None]:
        bad = ~(self.deviations(x) <= atol + rtol + torch.finfo(x.dtype).eps)
        found, expected = self._found_and_expected(x, int(bad.byte().argmax()))
        return _verdict(bad, f"`x` has norm {found:.9g} instead of {expected:.9g}", atol, rtol)

    def _check_vector_on_tangent(
        self, x: Tensor, u: Tensor, *, atol: float = 1e-5, rtol: float = 1e-5
    ) -> tuple[bool, str | None]:
        x_unit, u_unit = (self._radii.divide(t.detach().to(torch.float64)) for t in (x, u))
        radial = self.partition.inner(x_unit, u_unit).abs()
        eps = max(torch.finfo(x.dtype).eps, torch.finfo(u.dtype).eps)
        bad = ~(radial <= atol + (rtol + eps) * self.partition.norms(u_unit)).flatten()
        found = float(radial.flatten()[int(bad.byte().argmax())])
        return _verdict(bad, f"`u` has a radial part of {found:.6g} radians instead of 0", atol, rtol)

    def _norms(self, x: Tensor) -> Tensor:
        norms: Tensor = self.partition.norms(x.detach().to(torch.float64))
        return norms.flatten().cpu()

    def _found_and_expected(self, x: Tensor, group: int) -> tuple[float, float]:
        return float(self._norms(x)[group]), float(self._radii.tensor()[group])


def _verdict(bad: Tensor, first: str, atol: float, rtol: float) -> tuple[bool, str | None]:
    """Return what geoopt's checks expect: a verdict, and a message about the first bad group."""
    if not bool(bad.any()):
        return True, None
    count = f"({int(bad.sum())} of {len(bad)} groups are off) with {atol=}, {rtol=}"
    return False, f"group {int(bad.byte().argmax())} of {first} {count}"
