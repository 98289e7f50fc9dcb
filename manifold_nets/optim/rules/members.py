"""What a step is about, as data: the rule with its options, and each weight with its gradient and its state."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from manifold_nets.manifold import SphereProduct
from manifold_nets.optim.rules.coefficients import Coefficients, adam_coefficients, bias_corrections, sgd_coefficients
from manifold_nets.optim.rules.products import Spheres, Tangential
from manifold_nets.optim.rules.updates import riemannian_adam_, riemannian_sgd_

__all__ = ["Member", "Rule", "Seen"]


@dataclass(frozen=True)
class Rule:
    """An update rule and the options that all weights of a parameter group share.

    Attributes:
        kind: ``"sgd"`` or ``"adam"``.
        lr: learning rate.
        keep: share of the old moment in the new one: momentum, or β1.
        nesterov: whether to look ahead.
        maximize: whether to ascend.
        beta2: decay of the second moment.
        eps: what is added to the root of the second moment.
    """

    kind: str
    lr: float | Tensor
    keep: float
    nesterov: bool = False
    maximize: bool = False
    beta2: float = 0.0
    eps: float = 0.0

    @property
    def has_kernel(self) -> bool:
        """Whether kernels, in C and compiled by torch, know the rule."""
        return True

    @property
    def needs_lengths(self) -> bool:
        """Whether the length of the tangential gradient matters by itself, and has to be exact where it is short."""
        return self.kind == "adam"

    @property
    def by_groups(self) -> bool:
        """Whether the step of a group depends on no other group, so that weights may be cut and joined."""
        return True

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
        options = {"lr": self.lr, "maximize": self.maximize}
        if second is None or moment is None:
            options |= {"momentum": self.keep, "dampening": dampening, "nesterov": self.nesterov}
            riemannian_sgd_(weight, gradient, moment, spheres, **options)  # type: ignore[arg-type]
        else:
            options |= {"beta1": self.keep, "beta2": self.beta2, "eps": self.eps, "step": step, "rounding": rounding}
            riemannian_adam_(weight, gradient, moment, *second, spheres, **options)  # type: ignore[arg-type]

    def coefficients(
        self,
        found: Tangential,
        second: tuple[Tensor, Tensor | None] | None,
        *,
        dampening: float | Tensor,
        step: float | Tensor,
    ) -> Coefficients:
        """Return what to write, and update the second moments: the middle of `update_`, for groups of any weights."""
        if second is None:
            options = {"momentum": self.keep, "dampening": dampening, "nesterov": self.nesterov}
            return sgd_coefficients(found, lr=self.lr, **options)  # type: ignore[arg-type]
        options = {"beta1": self.keep, "beta2": self.beta2, "eps": self.eps, "dampening": dampening}
        corrections = bias_corrections(self.keep, self.beta2, step)
        return adam_coefficients(found, *second, lr=self.lr, corrections=corrections, **options)  # type: ignore[arg-type]


@dataclass(slots=True)
class Seen:
    """What was found out about the tensors of a weight; it holds as long as they lie where they did.

    Attributes:
        mark: where and how weight, gradient and state lie in memory; None where that cannot be told.
        fits: whether the kernel in C can step the weight, and read the gradient where it lies; None until it is asked.
    """

    mark: tuple[object, ...] | None = None
    fits: tuple[bool, bool] | None = None


@dataclass(slots=True)
class Member:
    """A weight in a step.

    Attributes:
        weight: the point; changed in place.
        gradient: the Euclidean gradient; only read.
        manifold: the spheres of the weight.
        moment: the tangent vector that is kept from step to step, changed in place; None without momentum.
        second: second moment of each sphere, and the largest so far or None, changed in place; None for SGD.
        dampening: share of the new gradient that is left out; 0 in the first step.
        step: number of this step, counted from 1.
        seen: what is known of the tensors.
    """

    weight: Tensor
    gradient: Tensor
    manifold: SphereProduct
    moment: Tensor | None = None
    second: tuple[Tensor, Tensor | None] | None = None
    dampening: float = 0.0
    step: float | Tensor = 1.0
    seen: Seen = field(default_factory=Seen)
