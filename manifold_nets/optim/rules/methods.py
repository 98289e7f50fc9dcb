"""The rules of other methods: the same inner products, the same writing, other coefficients in between."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

from manifold_nets.gathered import local_part
from manifold_nets.optim.rules.coefficients import Coefficients, Moments, bias_corrections
from manifold_nets.optim.rules.members import Rule
from manifold_nets.optim.rules.products import Spheres, Tangential, tangential
from manifold_nets.optim.rules.updates import write_
from manifold_nets.optim.rules.variants import (
    angular_rate,
    clip_factor,
    geodesic_coefficients,
    projected_coefficients,
    scaled_coefficients,
)

__all__ = ["MethodRule"]


@dataclass(frozen=True)
class MethodRule(Rule):
    """A rule of `manifold_nets.optim.relatives`, or that of the scaled metric.

    Attributes:
        kind: ``"sgd-g"``, ``"angular"``, ``"projected"``, ``"scaled-metric"`` or ``"adam-g"``.
        clip: the largest length of a gradient, for SGD-G and Adam-G.
        per_weight: whether the groups of a weight turn by one angle in the mean, for angular steps.
        elsewhere: adds up sums over groups of which other processes hold others.
    """

    clip: float = math.inf
    per_weight: bool = False
    elsewhere: Callable[[Tensor], Tensor] | None = None

    @property
    def has_kernel(self) -> bool:
        """No: the kernel in C lends its passes, and torch computes the coefficients between them."""
        return False

    @property
    def needs_lengths(self) -> bool:
        """Where gradients are clipped, divided by their lengths, or cancel the radius."""
        return self.kind != "scaled-metric"

    @property
    def by_groups(self) -> bool:
        """Whether the step of a group depends on no other group, so that weights may be cut and joined."""
        return not self.per_weight

    def update_(
        self,
        weight: Tensor,
        gradient: Tensor,
        moment: Tensor | None,
        second: tuple[Tensor, Tensor | None] | None,
        spheres: Spheres,
        *,
        dampening: float | Tensor,
        step: float | Tensor,
        rounding: float,
    ) -> None:
        """Take one step, in place, on tensors in the view of their groups: the single-tensor execution."""
        found, gradient = tangential(
            weight,
            gradient,
            moment,
            spheres,
            maximize=self.maximize,
            sharp=self.needs_lengths,
            rounding=rounding,
        )
        rule = replace(self, lr=float(self.lr), elsewhere=spheres.elsewhere)
        move = rule.coefficients(found, second, dampening=dampening, step=step)
        write_(weight, gradient, moment, spheres, move, maximize=self.maximize)

    def coefficients(
        self,
        found: Tangential,
        second: tuple[Tensor, Tensor | None] | None,
        *,
        dampening: float | Tensor,
        step: float | Tensor,
    ) -> Coefficients:
        """Return what to write, and update the second moments."""
        if second is not None:
            factor = clip_factor(found, self.clip)
            v = local_part(second[0]).lerp_(factor * factor * found.gg, 1 - self.beta2)
            first, second_moment = bias_corrections(self.keep, self.beta2, step)
            scale = first / (v * second_moment + self.eps).sqrt()
            moments = Moments(self.keep, (1 - self.keep) * factor, scale, 0.0)
            return geodesic_coefficients(found, moments, self.lr)
        follow, ahead = (self.keep, 1.0) if self.nesterov else (1.0, 0.0)
        moments = Moments(self.keep, 1.0 - dampening, follow, ahead)
        if self.keep == 0:
            moments = Moments(0.0, 0.0, 0.0, 1.0)
        if self.kind == "projected":
            return projected_coefficients(found, moments, self.lr)
        if self.kind == "scaled-metric":
            return scaled_coefficients(found, moments, self.lr)
        if self.kind == "angular":
            rate = angular_rate(found, moments, self.lr, per_weight=self.per_weight, elsewhere=self.elsewhere)
            return geodesic_coefficients(found, moments, rate)
        factor = clip_factor(found, self.clip)
        clipped = moments._replace(take=moments.take * factor, ahead=moments.ahead * factor)
        return geodesic_coefficients(found, clipped, self.lr)
