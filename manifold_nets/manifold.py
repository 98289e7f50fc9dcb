"""SphereProduct: the product of spheres on which a weight lives whose groups have no scale of their own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import geoopt
import torch
from torch import Tensor

from manifold_nets.errors import DegenerateGroupError, OffManifoldError, PartitionError
from manifold_nets.groups import Partition, accumulation_dtype

__all__ = ["SphereProduct"]


class SphereProduct(geoopt.Manifold):  # type: ignore[misc]
    r"""The product of spheres of a weight tensor: each group ``G`` keeps ‖w_G‖ = r_G.

    A point is a whole weight tensor in its natural shape. The metric is the unit sphere's at every radius,

    .. math:: ⟨ξ, η⟩_w = \sum_G ⟨ξ_G, η_G⟩ / r_G^2 ,

    so lengths are radians, ``egrad2rgrad`` is r² times the projected gradient, and steps of the same learning rate
    follow the same path of unit directions whatever the radius is. `inner`, `norm` and `dist` are those of the whole
    product, scalars, as in `geoopt.ProductManifold`; `component_inner` and `component_dist` give them group by group.

    Half-precision tensors are computed in float32 and rounded once at the end.

    Args:
        shape: natural shape of the weight, or a `Partition`.
        view: shape that the weight is viewed in (default: ``shape``).
        kept: axes of the view that number the groups (default: axis 0, the filters).
        radius: one number for all groups, or one a group, in the order of the groups.

    Raises:
        PartitionError: the view or the kept axes do not fit, or a radius is not positive and finite.

    References:
        Badrinarayanan, Mishra, Cipolla, arXiv:1511.01029; Absil, Mahony, Sepulchre, *Optimization Algorithms on
        Matrix Manifolds* (2008), for the projection, the retraction and the exponential map of the sphere.

    Example:
        >>> sphere = SphereProduct((8, 3, 5, 5))
        >>> w = sphere.random_uniform(8, 3, 5, 5)
        >>> bool(sphere.check_point_on_manifold(w)), float(sphere.dist(w, w))
        (True, 0.0)
    """

    name = "SphereProduct"
    reversible = False

    def __init__(
        self,
        shape: Sequence[int] | Partition,
        *,
        view: Sequence[int] | None = None,
        kept: Sequence[int] = (0,),
        radius: float | Sequence[float] | Tensor = 1.0,
    ) -> None:
        super().__init__()
        if isinstance(shape, Partition):
            self.partition = shape
        else:
            self.partition = Partition(tuple(shape), tuple(view if view is not None else shape), tuple(kept))
        self.ndim = len(self.partition.shape)
        # Kept out of the module's buffers: casting a model to half precision must not round its radii.
        self._radii = self._checked_radii(radius)
        self._spread_radii: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def _checked_radii(self, radius: float | Sequence[float] | Tensor) -> tuple[float, ...]:
        given = torch.as_tensor(radius, dtype=torch.float64).detach().cpu().flatten().tolist()
        if len(given) not in (1, self.partition.n_groups):
            raise PartitionError(
                f"{len(given)} radii", f"one, or one for each of {self.partition.n_groups} groups", "Pass as many."
            )
        for group, value in enumerate(given):
            if not (value > 0 and math.isfinite(value)):
                raise PartitionError(
                    f"radius {value} for group {group}", "a positive finite number", "Use the norm of the group."
                )
        return (given[0],) if all(value == given[0] for value in given) else tuple(given)

    # ---- the radii -------------------------------------------------------------------------------------------------

    @property
    def uniform_radius(self) -> float | None:
        """The radius where all groups have the same one, else None."""
        return self._radii[0] if len(self._radii) == 1 else None

    @property
    def radii(self) -> Tensor:
        """Radius of each group: float64, shape ``(n_groups,)``."""
        return torch.tensor(self._radii, dtype=torch.float64).expand(self.partition.n_groups).clone()

    def radius_for(self, x: Tensor) -> Tensor | float:
        """Return the radii as a factor for the groups of ``x``: a number, or a tensor of ``spread_shape``."""
        if len(self._radii) == 1:
            return self._radii[0]
        key = (x.device, accumulation_dtype(x.dtype))
        if key not in self._spread_radii:
            values = torch.tensor(self._radii, dtype=torch.float64).to(*key)
            self._spread_radii[key] = self.partition.spread(values)
        return self._spread_radii[key]

    def to_dict(self) -> dict[str, Any]:
        """Return partition and radii as plain lists for JSON; one radius where all groups share it."""
        return {**self.partition.to_dict(), "radius": list(self._radii)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> SphereProduct:
        """Rebuild a manifold from `to_dict`."""
        return cls(Partition.from_dict(data), radius=data["radius"])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_spread_radii": {}}

    # ---- points and tangent vectors --------------------------------------------------------------------------------

    def projx(self, x: Tensor) -> Tensor:
        """Nearest point: each group is scaled to its radius, ``r w/‖w‖``.

        Raises:
            DegenerateGroupError: a group is zero or not finite.
        """
        wide = _wide(x)
        norms = self.partition.norms(wide)
        self._refuse_degenerate(norms, "x")
        # Dividing first keeps the squares in range; the second pass removes what the first one rounded.
        unit = self.partition.multiply(wide, 1 / norms)
        return self._rescale(unit, self.partition.norms(unit)).to(x.dtype)

    def proju(self, x: Tensor, u: Tensor) -> Tensor:
        """Orthogonal projection on the tangent space: ``u − ⟨w, u⟩ w/r²`` in each group."""
        x32, u32 = _wide(x), _wide(u)
        radius = self.radius_for(x32)
        coefficient = self.partition.inner(x32, u32) / radius / radius
        return (u32 - self.partition.multiply(x32, coefficient)).to(u.dtype)

    def egrad2rgrad(self, x: Tensor, u: Tensor) -> Tensor:
        """Riemannian gradient: ``r² (g − ⟨w, g⟩ w/r²)`` in each group, from the Euclidean gradient ``g``."""
        radius = self.radius_for(x)
        tangent = self.proju(x, u)
        if isinstance(radius, float):
            return tangent if radius == 1.0 else tangent * (radius * radius)
        return self.partition.multiply(_wide(tangent), radius * radius).to(u.dtype)

    def component_inner(self, x: Tensor, u: Tensor, v: Tensor | None = None) -> Tensor:
        """Inner product ``⟨u, v⟩/r²`` of each group, repeated over its entries so that it broadcasts with ``x``."""
        inner = self.group_inner(x, u, v)
        if self.partition.view == self.partition.shape:
            return inner
        return inner.expand(self.partition.view).reshape(self.partition.shape)

    def group_inner(self, x: Tensor, u: Tensor, v: Tensor | None = None) -> Tensor:
        """Inner product ``⟨u, v⟩/r²`` of each group, in ``partition.spread_shape`` and float32 or better."""
        radius = self.radius_for(x)
        return self.partition.inner(u, u if v is None else v) / radius / radius

    def inner(self, x: Tensor, u: Tensor, v: Tensor | None = None, *, keepdim: bool = False) -> Tensor:
        """Inner product of two tangent vectors over the whole product: a scalar, in the dtype of ``u``."""
        return self._total(self.group_inner(x, u, v), keepdim).to(u.dtype)

    def norm(self, x: Tensor, u: Tensor, *, keepdim: bool = False) -> Tensor:
        """Length of a tangent vector in radians: ``(Σ_G ‖u_G‖²/r_G²)^½``."""
        return self._norm_total(self.partition.norms(u) / self.radius_for(u), keepdim).to(u.dtype)

    # ---- moving ----------------------------------------------------------------------------------------------------

    def retr(self, x: Tensor, u: Tensor) -> Tensor:
        """Metric projection of ``x + u``: ``r (w + u)/‖w + u‖``, a retraction of second order."""
        moved = _wide(x) + _wide(u)
        return self._rescale(moved, self.partition.norms(moved)).to(x.dtype)

    def expmap(self, x: Tensor, u: Tensor) -> Tensor:
        """Geodesic from ``x``: ``cos(θ) w + (sin θ/θ) u`` with ``θ = ‖u‖/r`` in each group."""
        x32, u32 = _wide(x), _wide(u)
        angle = self.partition.norms(u32) / self.radius_for(x32)
        moved = self.partition.multiply(x32, angle.cos()) + self.partition.multiply(u32, torch.sinc(angle / math.pi))
        return self._rescale(moved, self.partition.norms(moved)).to(x.dtype)

    def logmap(self, x: Tensor, y: Tensor) -> Tensor:
        """Tangent vector at ``x`` whose geodesic reaches ``y`` at time 1, of length `dist`.

        The direction is taken from ``y − w`` where the angle is acute and from ``y + w`` where it is obtuse, so that
        neither near nor nearly antipodal points lose digits. Exact antipodes have many shortest geodesics: a fixed one
        is returned. A group of one entry has no tangent vectors: zero is returned.
        """
        x32, y32 = _wide(x), _wide(y)
        angle = self._angles(x32, y32)
        near = torch.where(self.partition.inner(x32, y32) < 0, -1.0, 1.0).to(x32.dtype)
        direction = self.proju(x32, y32 - self.partition.multiply(x32, near))
        # The projection of a short vector is itself short of digits; once more removes what it left behind.
        direction = self.proju(x32, direction)
        length = self.partition.norms(direction)
        antipodal = (length == 0) & (near < 0)
        if bool(antipodal.any()):
            direction = torch.where(
                antipodal.expand(self.partition.view).reshape(x.shape), self._any_tangent(x32), direction
            )
            length = self.partition.norms(direction)
        factor = angle * self.radius_for(x32) / torch.where(length > 0, length, torch.ones_like(length))
        return self.partition.multiply(direction, factor).to(x.dtype)

    def component_dist(self, x: Tensor, y: Tensor) -> Tensor:
        """Angle between the groups of two points, in radians: shape ``(n_groups,)``, float32 or better."""
        return self._angles(_wide(x), _wide(y)).flatten()

    def dist(self, x: Tensor, y: Tensor, *, keepdim: bool = False) -> Tensor:
        """Geodesic distance in radians: the root of the sum of the squared angles of all groups.

        Each angle is ``2 atan2(‖x̂ − ŷ‖, ‖x̂ + ŷ‖)`` (W. Kahan), accurate at every angle; an arc cosine is not.
        """
        return self._norm_total(self._angles(_wide(x), _wide(y)), keepdim).to(x.dtype)

    def dist2(self, x: Tensor, y: Tensor, *, keepdim: bool = False) -> Tensor:
        """Squared geodesic distance in square radians."""
        return self._total(self._angles(_wide(x), _wide(y)).square(), keepdim).to(x.dtype)

    def transp(self, x: Tensor, y: Tensor, v: Tensor) -> Tensor:
        """Vector transport by projection on the tangent space at ``y``."""
        return self.proju(y, v)

    # ---- sampling --------------------------------------------------------------------------------------------------

    def random_uniform(
        self, *size: int, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> Tensor:
        """Draw a point uniformly on the product of spheres, as a `geoopt.ManifoldTensor` of the natural shape."""
        wanted = geoopt.utils.size2shape(*size) if size else self.partition.shape
        self._assert_check_shape(wanted, "x")
        kind = dtype or torch.get_default_dtype()
        normal = torch.randn(wanted, dtype=accumulation_dtype(kind), device=device)
        if normal.device.type == "meta":
            return geoopt.ManifoldTensor(normal.to(kind), manifold=self)
        return geoopt.ManifoldTensor(self.projx(normal).to(kind), manifold=self)

    def random(
        self, *size: int, dtype: torch.dtype | None = None, device: torch.device | str | None = None, **_: Any
    ) -> Tensor:
        """Draw a point uniformly; the same as `random_uniform`."""
        return self.random_uniform(*size, dtype=dtype, device=device)

    def origin(
        self,
        *size: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        seed: int | None = 42,
    ) -> Tensor:
        """Return a fixed point, the same at every call: all entries of a group equal, positive, of norm ``r``."""
        wanted = geoopt.utils.size2shape(*size) if size else self.partition.shape
        self._assert_check_shape(wanted, "x")
        kind = dtype or torch.get_default_dtype()
        ones = torch.ones(wanted, dtype=accumulation_dtype(kind), device=device)
        return geoopt.ManifoldTensor(self.projx(ones).to(kind), manifold=self)

    # ---- checks ----------------------------------------------------------------------------------------------------

    def refuse_degenerate(self, x: Tensor, name: str) -> None:
        """Raise `DegenerateGroupError` with the weight's name where a group is zero or not finite."""
        self._refuse_degenerate(self.partition.norms(x), name)

    def deviations(self, x: Tensor) -> Tensor:
        """Relative deviation ``|‖w_G‖/r_G − 1|`` of each group: float64, shape ``(n_groups,)``."""
        norms = self.partition.norms(x.detach().to(torch.float64)).flatten()
        return (norms / self.radii.to(norms.device) - 1).abs()

    def require_point(self, x: Tensor, name: str, *, rtol: float, remedy: str) -> None:
        """Raise `OffManifoldError` with the weight's name where a norm is off its radius by more than ``rtol``."""
        deviations = self.deviations(x)
        worst = int(torch.nan_to_num(deviations, nan=math.inf).argmax())
        if not float(deviations[worst]) <= rtol:
            norm = float(self.partition.norms(x.detach().double()).flatten()[worst])
            raise OffManifoldError(name, worst, norm, float(self.radii[worst]), remedy)

    def _refuse_degenerate(self, norms: Tensor, name: str) -> None:
        if torch.compiler.is_compiling() or norms.device.type == "meta":
            return
        flat = norms.detach().flatten()
        bad = ~(flat.isfinite() & (flat > 0))
        if bool(bad.any()):
            indices = bad.nonzero().flatten().tolist()
            raise DegenerateGroupError(name, indices, [float(flat[i]) for i in indices])

    def _check_shape(self, shape: Sequence[int], name: str) -> tuple[bool, str | None]:
        if tuple(shape) == self.partition.shape:
            return True, None
        return False, f"`{name}` has shape {tuple(shape)}, but the manifold holds weights of shape {self.partition.shape}"

    def _check_point_on_manifold(
        self, x: Tensor, *, atol: float = 1e-5, rtol: float = 1e-5
    ) -> tuple[bool, str | None]:
        norms = self.partition.norms(x.detach().to(torch.float64)).flatten().cpu()
        off = (norms - self.radii).abs() / self.radii
        bad = ~(off <= atol + rtol)
        if not bool(bad.any()):
            return True, None
        group = int(bad.nonzero()[0])
        return False, (
            f"group {group} of `x` has norm {float(norms[group]):.9g} instead of {float(self.radii[group]):.9g} "
            f"({int(bad.sum())} of {len(norms)} groups are off) with atol={atol}, rtol={rtol}"
        )

    def _check_vector_on_tangent(
        self, x: Tensor, u: Tensor, *, atol: float = 1e-5, rtol: float = 1e-5
    ) -> tuple[bool, str | None]:
        x64, u64 = x.detach().to(torch.float64), u.detach().to(torch.float64)
        radius = self.radius_for(x64)
        radial = (self.partition.inner(x64, u64) / radius / radius).abs()
        allowed = atol + rtol * self.partition.norms(u64) / radius
        bad = ~(radial <= allowed).flatten()
        if not bool(bad.any()):
            return True, None
        group = int(bad.nonzero()[0])
        return False, (
            f"group {group} of `u` has a radial part of {float(radial.flatten()[group]):.6g} radians instead of 0 "
            f"({int(bad.sum())} of {bad.numel()} groups are off) with atol={atol}, rtol={rtol}"
        )

    def extra_repr(self) -> str:
        radius = f"radius {self._radii[0]:g}" if len(self._radii) == 1 else f"radii {min(self._radii):g}…{max(self._radii):g}"
        points = "; groups of one entry: two points, nothing to optimize" if self.partition.group_size == 1 else ""
        return f"{self.partition}, {radius}{points}"

    # ---- arithmetic ------------------------------------------------------------------------------------------------

    def _rescale(self, x: Tensor, norms: Tensor) -> Tensor:
        return self.partition.multiply(x, self.radius_for(x) / norms)

    def _angles(self, x: Tensor, y: Tensor) -> Tensor:
        x_unit = self._rescale(x, self.partition.norms(x))
        y_unit = self._rescale(y, self.partition.norms(y))
        return 2 * torch.atan2(self.partition.norms(x_unit - y_unit), self.partition.norms(x_unit + y_unit))

    def _any_tangent(self, x: Tensor) -> Tensor:
        """Return a fixed unit-free tangent vector: the coordinate of each group that `x` uses least, projected."""
        partition = self.partition
        if partition.group_size == 1:
            return torch.zeros_like(x)
        order = (*partition.kept, *partition.reduced)
        grouped = x.reshape(partition.view).permute(order)
        flat = grouped.reshape(partition.n_groups, partition.group_size)
        axis = torch.zeros_like(flat).scatter_(1, flat.abs().argmin(1, keepdim=True), 1.0)
        inverse = [order.index(i) for i in range(len(order))]
        return self.proju(x, axis.reshape(grouped.shape).permute(inverse).reshape(x.shape))

    def _total(self, per_group: Tensor, keepdim: bool) -> Tensor:
        total = per_group.sum()
        return total.reshape((1,) * self.ndim) if keepdim else total

    def _norm_total(self, per_group: Tensor, keepdim: bool) -> Tensor:
        largest = per_group.detach().abs().amax()
        scale = torch.where((largest > 0) & largest.isfinite(), largest, torch.ones_like(largest))
        total = scale * (per_group / scale).square().sum().sqrt()
        return total.reshape((1,) * self.ndim) if keepdim else total


def _wide(x: Tensor) -> Tensor:
    """Half precision to float32, everything else as it is."""
    return x.to(accumulation_dtype(x.dtype))
