"""Errors about training on products of spheres."""

from __future__ import annotations

from collections.abc import Sequence

from manifold_nets.errors.base import ManifoldNetsError, listed

__all__ = [
    "ConstraintLostError",
    "EuclideanStepError",
    "LearningRateWarning",
    "NativeKernelError",
    "OptimizerStateError",
    "ParameterGroupError",
    "SparseGradientError",
    "SphereOptionError",
    "StepInputError",
    "UnsupportedManifoldError",
]


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
            f"{listed(dict.fromkeys(names))}: constrained to a product of spheres, but the parameter object was "
            "replaced by a plain one (load_state_dict(assign=True), to_empty and sharding do "
            "that), or is held in others, and it would be trained as a Euclidean one. Build the optimizer from "
            "manifold_nets.param_groups(model), which finds the manifold through the model; with "
            "FullyShardedDataParallel pass use_orig_params=True, and take off weight_norm and the like first, or "
            "the constraint (manifold_nets.revert)."
        )
        self.names = tuple(names)


class EuclideanStepError(ManifoldNetsError, RuntimeError):
    """An optimizer that knows nothing of spheres is about to step a constrained weight."""

    def __init__(self, optimizer: str, names: Sequence[str]) -> None:
        super().__init__(
            f"{listed(names)}: constrained to a product of spheres, but {optimizer} is about to step it as a Euclidean "
            "weight; nothing was changed. Use manifold_nets.optim.RiemannianSGD or RiemannianAdam with "
            "manifold_nets.param_groups(model); or, if your code puts the weight back on its spheres itself, say so "
            "with manifold_nets.optim.allow_euclidean(optimizer)."
        )
        self.names = tuple(names)


class SphereOptionError(ManifoldNetsError, TypeError):
    """A weight on spheres has a property, or an option, that its optimizer cannot work with."""

    def __init__(self, name: str, found: str, expected: str) -> None:
        super().__init__(
            f"{name} lies on a product of spheres: found {found}; expected {expected}. Change it, or train this weight "
            "without the constraint (manifold_nets.revert)."
        )


class StepInputError(ManifoldNetsError, RuntimeError):
    """A weight, its gradient or its optimizer state cannot be read or written by a step."""

    def __init__(self, name: str, found: str, expected: str, remedy: str) -> None:
        super().__init__(f"{name}: found {found}; expected {expected}; nothing was changed. {remedy}")


class SparseGradientError(SphereOptionError):
    """A weight has a sparse gradient where only dense ones can be stepped."""

    def __init__(self, name: str, layout: object) -> None:
        super(SphereOptionError, self).__init__(
            f"{name}: found a gradient of layout {layout}; this weight is stepped with dense gradients only; "
            "nothing was changed. Build its layer with sparse=False, or make the gradient dense before the step "
            "(weight.grad = weight.grad.to_dense())."
        )


class ParameterGroupError(ManifoldNetsError, ValueError):
    """The manifolds of a parameter group do not fit its parameters."""

    def __init__(self, name: str, found: str, expected: str) -> None:
        super().__init__(
            f"{name}: found {found}; expected {expected}. Let manifold_nets.param_groups(model) make the groups, or "
            'give "manifolds" one SphereProduct, or None, for each of "params".'
        )


class OptimizerStateError(ManifoldNetsError, ValueError):
    """The saved state of an optimizer does not fit the spheres of a live weight."""

    def __init__(self, name: str, found: str, expected: str, remedy: str = "") -> None:
        remedy = remedy or (
            "Load the state of the same kind of optimizer for a model converted in the same way, or start without it."
        )
        super().__init__(f"state of {name}: found {found}; expected {expected}; nothing was loaded. {remedy}")


class NativeKernelError(ManifoldNetsError, RuntimeError):
    """An optimizer was asked for ``fused=True``, and the kernel for weights on spheres cannot be had."""

    def __init__(self, reason: str) -> None:
        super().__init__(
            f"fused=True: found {reason}; expected the compiled kernel for weights on spheres; nothing was changed. "
            "Install a C compiler, or leave fused out: without the kernel, steps are taken by torch's operations."
        )


class LearningRateWarning(UserWarning):
    """Converted weights would be trained at the learning rate of the plain network, which means something else there.

    Args:
        names: the weights.
        rate: their rate.
        matched: the rate on spheres that matches it, the median over the weights.
        formula: where that comes from.
    """

    def __init__(self, names: Sequence[str], rate: float, matched: float, formula: str) -> None:
        super().__init__(
            f"{listed(names, 3)}: converted weights get the learning rate {rate:g} of the plain parameters, but a rate "
            f"on spheres means something else. In the median {matched:.3g} matches the plain network's next step "
            f"({formula}). Pass manifold_nets.param_groups(model, sphere_lr={matched:.3g}), or the rates of all "
            "weights, from manifold_nets.matched_learning_rates(…).by_weight(); "
            f"sphere_lr={rate:g} keeps the rate as it is."
        )
        self.names, self.rate, self.matched = tuple(names), rate, matched
