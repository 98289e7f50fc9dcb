"""Errors about weights on products of spheres: their partitions, norms and manifolds."""

from __future__ import annotations

import math
from collections.abc import Sequence

from manifold_nets.errors.base import ManifoldNetsError, listed

__all__ = [
    "ConstraintError",
    "DegenerateGroupError",
    "JointSphereError",
    "OffManifoldError",
    "PartitionError",
    "PlainStateError",
    "ProjectionError",
]


class PartitionError(ManifoldNetsError, ValueError):
    """A partition does not fit the tensor that it is meant for."""

    def __init__(self, found: object, expected: str, remedy: str) -> None:
        super().__init__(f"partition of a weight: found {found}; expected {expected}. {remedy}")


class DegenerateGroupError(ManifoldNetsError, ValueError):
    """A group of weights is zero or not finite, so it has no direction on a sphere."""

    def __init__(self, name: str, groups: Sequence[int], norms: Sequence[float]) -> None:
        found = listed(f"group {g} with norm {n:.6g}" for g, n in zip(groups, norms, strict=True))
        super().__init__(
            f"{name}: {found}; every group needs a finite, non-zero norm to have a direction on "
            "its sphere. Re-initialize or prune these groups, or exclude this weight."
        )
        self.name, self.groups, self.norms = name, tuple(groups), tuple(norms)


class OffManifoldError(ManifoldNetsError, ValueError):
    """A weight that belongs on a product of spheres has left it."""

    def __init__(self, name: str, group: int, norm: float, radius: float, remedy: str) -> None:
        deviation = abs(norm / radius - 1)
        some = math.isfinite(deviation) and deviation > 0
        # Two digits of the difference, and no fewer than eight in all; seventeen tell any two numbers apart.
        digits = min(max(8, 2 - math.floor(math.log10(deviation))), 17) if some else 8
        off = f", off by {deviation:.2g} of the radius" if some else ""
        super().__init__(
            f"{name}: group {group} has norm {norm:.{digits}g}{off}, but its sphere has radius {radius:.{digits}g}. "
            f"{remedy}"
        )


class JointSphereError(ManifoldNetsError, TypeError):
    """Something was asked of one weight that all weights of its joint sphere have to answer together."""

    def __init__(self, name: str, others: Sequence[str], found: str = "one of them alone") -> None:
        super().__init__(
            f"{name}: its groups share one norm with those of {listed(others)}: found {found}; expected all of them "
            "together. Use manifold_nets.joint_spheres(model), manifold_nets.project(model), and one parameter group "
            "of manifold_nets.optim for all of them; or take the constraint away with manifold_nets.revert(model)."
        )
        self.name, self.others = name, tuple(others)


class ConstraintError(ManifoldNetsError, ValueError):
    """A weight cannot be put on its manifold as asked."""

    def __init__(self, name: str, found: str, expected: str) -> None:
        super().__init__(f"{name}: found {found}; expected {expected}. Name a weight of the module that fits.")


class PlainStateError(ManifoldNetsError, ValueError):
    """A state of a plain network cannot be converted while it is loaded into a converted model."""

    def __init__(self, name: str, found: str, remedy: str) -> None:
        super().__init__(f"{name}: {found}. {remedy}")
        self.name = name


class ProjectionError(ManifoldNetsError, ValueError):
    """Putting a weight on its spheres would change what its model computes."""

    def __init__(self, name: str, why: str, remedy: str) -> None:
        super().__init__(
            f"{name}: putting it on its spheres would change what the model computes: {why}; nothing was changed. "
            f"{remedy}"
        )
        self.name = name
