"""Errors about points that do not fit a model, and about losses that are no cost to optimize."""

from __future__ import annotations

from manifold_nets.errors import ManifoldNetsError

__all__ = ["CostError", "PointError"]


class PointError(ManifoldNetsError, ValueError):
    """The parameters of a model make no point, or a point does not fit the model."""

    def __init__(self, name: str, found: str, expected: str, remedy: str) -> None:
        super().__init__(f"{name}: found {found}; expected {expected}. {remedy}")


class CostError(ManifoldNetsError, ValueError):
    """A loss is no deterministic, differentiable number."""

    def __init__(self, found: str, expected: str, remedy: str) -> None:
        super().__init__(f"loss: found {found}; expected {expected}. {remedy}")
