"""Check that a tensor is a point on a product of spheres, or a tangent vector there; name the group that is not."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from manifold_nets._geoopt import geoopt
from manifold_nets.errors import OffManifoldError, PartitionError
from manifold_nets.groups import Partition, refuse_degenerate
from manifold_nets.radii import Radii

__all__ = ["SphereChecks"]


class SphereChecks(geoopt.Manifold):  # type: ignore[misc]
    """The checks of `SphereProduct`: those that `geoopt.Manifold` asks for, and those that raise this package's errors.

    Norms are taken in float64. Rounding a tensor to its dtype is allowed for on top of ``atol`` and ``rtol``, so that
    half-precision points pass geoopt's assertions at their default tolerances.
    """

    partition: Partition
    _radii: Radii

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
