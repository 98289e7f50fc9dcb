"""Tensor algebra of a rescaling in front of a batch normalization.

A filter multiplied by ``f`` gives the batch normalization an input with mean ``f m`` and variance ``f² v``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["cancellation", "rescaled_variance", "train_mode_deviation"]


def rescaled_variance(variance: Tensor, eps: float, factor: Tensor) -> Tensor:
    """Running variance that keeps evaluation mode exact: ``v' = (v + eps) f² − eps``.

    Then ``f (z − m)/√(v' + eps) = (z − m)/√(v + eps)``. The result can be negative; ``v' + eps`` never is.

    Args:
        variance: running variance ``v``, shape (C,).
        eps: eps of the normalization.
        factor: factor ``f`` of each channel, shape (C,).
    """
    return (variance + eps) * factor.square() - eps


def cancellation(variance: Tensor, eps: float, factor: Tensor) -> float:
    """By how much rounding ``v'`` is magnified in ``v' + eps``: the largest ``|v'|/(v' + eps)`` of all channels."""
    rescaled = rescaled_variance(variance, eps, factor)
    return float((rescaled.abs() / (rescaled + eps)).max()) if len(rescaled) else 0.0


def train_mode_deviation(variance: Tensor, eps: float, scale: Tensor, shift: Tensor, factor: Tensor) -> float:
    """Relative change of a batch normalization's training output when its input channels are multiplied by ``f``.

    The normalized channel is multiplied by ``ρ = √((v + eps)/(v + eps/f²))``, so with ``a = γ² v/(v + eps)`` the mean
    square of its scaled part the change is ``√(Σ a (ρ − 1)² / Σ (a + β²))``.

    Args:
        variance: batch variance ``v`` on the example inputs, shape (C,).
        eps: eps of the normalization.
        scale: γ, shape (C,).
        shift: β, shape (C,).
        factor: ``f``, shape (C,).
    """
    energy = scale.square() * variance / (variance + eps)
    ratio = ((variance + eps) / (variance + eps / factor.square())).sqrt()
    total = float((energy + shift.square()).sum())
    return math.sqrt(float((energy * (ratio - 1).square()).sum()) / total) if total > 0 else 0.0


def gather(values: Tensor, groups: tuple[int, ...]) -> Tensor:
    """Spread one factor a group over entries by their group numbers; 1 where no group reaches."""
    index = torch.tensor(groups, dtype=torch.int64, device=values.device)
    return torch.where(index < 0, torch.ones((), dtype=values.dtype, device=values.device), values[index.clamp_min(0)])
