"""The errors of the package, each building its own message from the facts it is given.

Every message names the parameter or file, the value found, the value expected, and the remedy.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

__all__ = [
    "ConstraintLostError",
    "DegenerateGroupError",
    "ManifoldNetsError",
    "OffManifoldError",
    "PartitionError",
    "UnsupportedManifoldError",
]


class ManifoldNetsError(Exception):
    """Base of every error that this package raises on purpose."""


def listed(items: Iterable[object], limit: int = 8) -> str:
    """Join items with commas, cutting a long list and saying how many were left out."""
    texts = [str(item) for item in items]
    if len(texts) <= limit:
        return ", ".join(texts)
    return f"{', '.join(texts[:limit])} and {len(texts) - limit} more"


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
        super().__init__(
            f"{name}: group {group} has norm {norm:.8g}, but its sphere has radius {radius:.8g}. "
            f"{remedy}"
        )


class UnsupportedManifoldError(ManifoldNetsError, TypeError):
    """A parameter lies on a manifold that an optimizer of this package cannot step on."""

    def __init__(self, name: str, manifold: object) -> None:
        super().__init__(
            f"{name} lies on {manifold}; the optimizers of manifold_nets step on SphereProduct and "
            "on plain parameters. Use geoopt.optim for other manifolds, in an optimizer of its own."
        )


class ConstraintLostError(ManifoldNetsError, RuntimeError):
    """A constrained weight reached an optimizer as a plain parameter object."""

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__(
            f"{listed(names)}: constrained to a product of spheres, but the parameter object was "
            "replaced by a plain one (load_state_dict(assign=True), to_empty and sharding do "
            "that), and it would be trained as a Euclidean one. Build the optimizer from "
            "manifold_nets.param_groups(model), which finds the manifold through the model."
        )
        self.names = tuple(names)
