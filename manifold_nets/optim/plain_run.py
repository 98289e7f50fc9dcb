r"""Steps that follow the run of a plain optimizer: the weight in polar coordinates, its direction and its norm.

With ``w = n u`` and ``f(n u) = f(u)``, ``∇f(w) = ∇f(u)/n``: the direction on the sphere and the norm ``n`` say all of
the plain weight. So a step takes the plain optimizer's own step from ``w`` to ``w'``, keeps the direction of ``w'`` on
the sphere, and its norm in the state, where the plain run goes on; or it holds the norm that it had.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from manifold_nets.groups import wide
from manifold_nets.manifold import SphereProduct
from manifold_nets.optim.backends.rule import Rule, StepInput
from manifold_nets.optim.param_groups import Group

__all__ = ["NORM", "SCALED_WITH", "TRANSFERS", "biases_of_the_plain_run", "norms_of", "step_as_plain_"]

# In the state of a constrained weight: the norms that its groups have in the plain run. In float64, as a step often
# changes a norm by less than the last digit of float32.
NORM = "norm"
# In a group: for the place of a bias the group and the place of the weight that it is scaled with, and the sphere of
# each entry.
SCALED_WITH = "scaled_with"
TRANSFERS = ("follow", "step", "equilibrium")


def norms_of(state: dict[str, Any], weight: Tensor, manifold: SphereProduct) -> Tensor:
    """Return the norms of the plain run; those of the weight itself where none are known yet."""
    if NORM not in state:
        radii = manifold.partition.spread(manifold.radii)
        state[NORM] = radii.to(device=weight.device, dtype=torch.float64, copy=True)
    norms: Tensor = state[NORM]
    return norms


@contextmanager
def biases_of_the_plain_run(groups: Sequence[Group], states: Mapping[Tensor, dict[str, Any]]) -> Iterator[None]:
    """For the time of a step give biases that are scaled with a weight their size in the plain run.

    Behind a weight ``r u`` in the place of ``n u`` stands the bias ``β = b r/n``. With the gradient of b torch's step
    is that of the plain run, and the new norm makes a new β of the new b.
    """
    found = [
        (group["params"][int(place)], groups[other]["params"][index], groups[other]["manifolds"][index], of_entries)
        for group in groups
        for place, (other, index, of_entries) in group.get(SCALED_WITH, {}).items()
    ]

    def up(bias: Tensor, weight: Tensor, manifold: SphereProduct, of_entries: Sequence[int]) -> Tensor:
        """n/r of the group of each entry of a bias."""
        norms = norms_of(states[weight], weight, manifold)
        index = torch.tensor(of_entries, device=norms.device)
        ratio = (norms / manifold.radius_for(norms)).flatten()[index.clamp_min(0)]
        return torch.where(index < 0, 1.0, ratio).to(bias.dtype).reshape(bias.shape)

    gradients = [each[0].grad for each in found]
    with torch.no_grad():
        for each, gradient in zip(found, gradients, strict=True):
            ratio = up(*each)
            each[0].mul_(ratio)
            each[0].grad = None if gradient is None else gradient / ratio
    try:
        yield
    finally:
        with torch.no_grad():
            for each, gradient in zip(found, gradients, strict=True):
                each[0].div_(up(*each))
                each[0].grad = gradient


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
