r"""Steps that follow the run of a plain optimizer: the weight in polar coordinates, its direction and its norm.

With ``w = n u`` and ``f(n u) = f(u)``, ``∇f(w) = ∇f(u)/n``: the direction on the sphere and the norm ``n`` say all of
the plain weight. So a step takes the plain optimizer's own step from ``w`` to ``w'``, keeps the direction of ``w'`` on
the sphere, and its norm in the state, where the plain run goes on; or it holds the norm that it had.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from manifold_nets.groups import wide
from manifold_nets.manifold import SphereProduct
from manifold_nets.optim.backends.rule import Rule, StepInput
from manifold_nets.optim.param_groups import Group

__all__ = ["NORM", "TRANSFERS", "norms_of", "step_as_plain_"]

# In the state of a constrained weight: the norms that its groups have in the plain run. In float64, as a step often
# changes a norm by less than the last digit of float32.
NORM = "norm"
TRANSFERS = ("follow", "step", "equilibrium")


def norms_of(state: dict[str, Any], weight: Tensor, manifold: SphereProduct) -> Tensor:
    """Return the norms of the plain run; those of the weight itself where none are known yet."""
    if NORM not in state:
        radii = manifold.partition.spread(manifold.radii)
        state[NORM] = radii.to(device=weight.device, dtype=torch.float64, copy=True)
    norms: Tensor = state[NORM]
    return norms


def step_as_plain_(rule: Rule, group: Group, member: StepInput, norms: Tensor) -> None:
    """Take the step of the plain optimizer from the point of these norms, in place."""
    manifold, partition, lr = member.manifold, member.manifold.partition, float(rule.lr)
    follows, decay = group["transfer"] == "follow", float(group["weight_decay"])
    point = wide(member.weight.detach())
    radius = manifold.radius_for(point)
    shrinks = 1 - lr * decay if group.get("decoupled_weight_decay") else 1.0
    up = (norms / partition.norms(point)).to(point.dtype)
    plain = partition.multiply(point, up)
    gradient = partition.divide(wide(member.gradient.detach()), -up if rule.maximize else up)
    if decay and shrinks == 1:
        gradient = gradient.add(plain, alpha=decay)
    direction = _direction(rule, member, gradient, radius)
    inner = partition.inner(plain, direction).double()
    squared = shrinks**2 * norms.square() - 2 * lr * shrinks * inner
    squared += lr**2 * partition.inner(direction, direction).double()
    if lr != 0:
        end = plain.mul_(shrinks).sub_(direction, alpha=lr)
        member.weight.copy_(partition.multiply(end, radius / partition.norms(end)))
    if follows:
        norms.copy_(squared.sqrt())


def _direction(rule: Rule, member: StepInput, gradient: Tensor, radius: Tensor | float) -> Tensor:
    """Return what the plain optimizer subtracts, per unit of learning rate, and update the moments in place.

    The momentum is kept in the scale of the weight on its spheres: multiplied by the radius.
    """
    moment, partition = member.moment, member.manifold.partition
    if moment is None:
        return gradient
    scaled = partition.multiply(gradient, radius).to(moment.dtype)
    if member.second is None:
        moment.mul_(rule.beta1).add_(scaled, alpha=1 - member.dampening)
        plain = partition.divide(wide(moment), radius)
        return gradient.add(plain, alpha=rule.beta1) if rule.nesterov else plain
    moment.lerp_(scaled, 1 - rule.beta1)
    second = member.second.mul_(rule.beta2).addcmul_(gradient, gradient, value=1 - rule.beta2)
    if member.largest is not None:
        second = member.largest.copy_(torch.maximum(member.largest, second))
    first, squares = (1 / (1 - beta**member.step) for beta in (rule.beta1, rule.beta2))
    return partition.divide(wide(moment), radius).mul_(first).div_((second * squares).sqrt_().add_(rule.eps))
