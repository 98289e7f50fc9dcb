"""The guard: an optimizer without support for spheres raises an error before it steps a constrained weight.

When the first product of spheres in a process is made, torch gets a hook that checks every optimizer before its first
step, and again when its parameters or the constraints have changed. Otherwise a step costs one look-up.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from geoopt.optim.mixin import OptimMixin
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from manifold_nets.constraints import last_change, lost_constraints, released_names, was_replaced
from manifold_nets.errors import EuclideanStepError, listed
from manifold_nets.manifold import SphereProduct, on_first_instance
from manifold_nets.optim.base import SphereOptimizer
from manifold_nets.optim.param_groups import name_at_step

__all__ = ["allow_euclidean"]

_allowed: WeakSet[torch.optim.Optimizer] = WeakSet()
# The result of checking an optimizer, and the parameters and constraints at that time.
_inspected: WeakKeyDictionary[torch.optim.Optimizer, tuple[tuple[int, ...], list[Tensor]]] = WeakKeyDictionary()


def allow_euclidean(optimizer: torch.optim.Optimizer) -> None:
    """Allow an optimizer without support for spheres to step constrained weights.

    Use it for methods that put the weights back on their spheres themselves, such as a Euclidean step and a projection.
    It applies to this optimizer object only, not to its deep copies.

    Args:
        optimizer: any torch optimizer.

    Example:
        >>> import geoopt, manifold_nets as mn
        >>> sphere = mn.SphereProduct((4, 3))
        >>> weight = geoopt.ManifoldParameter(sphere.random(), manifold=sphere)
        >>> optimizer = torch.optim.SGD([weight], lr=0.1)
        >>> mn.optim.allow_euclidean(optimizer)
        >>> weight.sum().backward()
        >>> optimizer.step()
        >>> with torch.no_grad():
        ...     _ = weight.copy_(sphere.projx(weight))
    """
    _allowed.add(optimizer)


def _install() -> None:
    register_optimizer_step_pre_hook(_refuse_euclidean_step)


# Importing this package without constraining anything does not change torch.
on_first_instance(_install)


def _refuse_euclidean_step(optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise an error before a Euclidean step on a constrained weight that has, or may get, a gradient."""
    # Asked in the graph where a step is compiled: only a look at other optimizers breaks it.
    if not (isinstance(optimizer, SphereOptimizer) and torch.compiler.is_compiling()):
        _inspect(optimizer, args, kwargs)


@torch._disable_dynamo  # type: ignore[attr-defined]
def _inspect(optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if optimizer in _allowed:
        return
    state = (last_change(), *(id(parameter) for group in optimizer.param_groups for parameter in group["params"]))
    known = _inspected.get(optimizer)
    if known is None or known[0] != state:
        known = _inspected[optimizer] = (state, list(_stepped_off_spheres(optimizer)))
        _warn_of_replaced(optimizer, known[1])
    if known[1]:
        # A closure may yet compute the gradients.
        closure = len(args) > 1 or bool(kwargs)
        due = [p for p in known[1] if p.grad is not None or (closure and p.requires_grad)]
        if due:
            _raise_for(optimizer, due)


def _warn_of_replaced(optimizer: torch.optim.Optimizer, weights: list[Tensor]) -> None:
    """Warn that an optimizer holds parameters of no model; as they have no gradients, it does not change them."""
    names = lost_constraints(weight for weight in weights if weight.grad is None and was_replaced(weight))
    if names:
        warnings.warn(
            f"{listed(names)}: constrained to a product of spheres after {type(optimizer).__name__} was built. The "
            "optimizer still holds the old parameter and does not train the weight. Build a new one from "
            "manifold_nets.param_groups(model).",
            stacklevel=7,
        )
    held = (p for group in optimizer.param_groups for p in group["params"])
    released = released_names(p for p in held if isinstance(p, Tensor) and p.grad is None)
    if released:
        warnings.warn(
            f"{listed(released)}: taken off its spheres after {type(optimizer).__name__} was built. The optimizer "
            "still holds the old parameter and does not train the weight. Build a new one.",
            stacklevel=7,
        )


def _stepped_off_spheres(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    """Yield the constrained weights that an optimizer would step as Euclidean ones."""
    # The optimizers of this package know which of their weights lie on spheres.
    manifolds = [m for group in optimizer.param_groups for m in group.get("manifolds", [None] * len(group["params"]))]
    params = [p for group in optimizer.param_groups for p in group["params"]]
    if isinstance(optimizer, SphereOptimizer):
        params = [p for p, manifold in zip(params, manifolds, strict=True) if manifold is None]
    some_lost = bool(lost_constraints(params))
    steps_on_manifolds = isinstance(optimizer, OptimMixin)  # geoopt's
    for parameter in params:
        constrained = isinstance(getattr(parameter, "manifold", None), SphereProduct)
        if (constrained and not steps_on_manifolds) or (some_lost and lost_constraints([parameter])):
            yield parameter


def _raise_for(optimizer: torch.optim.Optimizer, weights: list[Tensor]) -> None:
    due = {id(weight) for weight in weights}
    names = [
        (lost_constraints([parameter]) or [name_at_step(group, number, index)])[0]
        for number, group in enumerate(optimizer.param_groups)
        for index, parameter in enumerate(group["params"])
        if id(parameter) in due
    ]
    if isinstance(optimizer, OptimMixin):
        raise EuclideanStepError(names)
    raise EuclideanStepError(names, type(optimizer).__name__)
