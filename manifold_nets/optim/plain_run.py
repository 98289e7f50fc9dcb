r"""Steps that follow the run of a plain optimizer, with the weight in polar coordinates: direction and norm.

With ``w = n u`` and ``f(n u) = f(u)``, ``∇f(w) = ∇f(u)/n``: the direction on the sphere and the norm ``n`` determine
the plain weight. So a step takes the plain optimizer's own step from ``w`` to ``w'`` and keeps the direction of ``w'``
on the sphere. The norm in the state becomes ``‖w'‖`` if it follows the plain run, or stays fixed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from manifold_nets.gathered import held_as, whole, write_whole_
from manifold_nets.manifold import SphereProduct
from manifold_nets.optim.backends.inputs import NORM
from manifold_nets.optim.backends.rule import Rule
from manifold_nets.optim.backends.sharded import zero_scalars
from manifold_nets.optim.param_groups import Group

__all__ = ["NORM", "SCALED_WITH", "TRANSFERS", "biases_of_the_plain_run", "norms_of", "of_plain_run", "scaled_biases"]

# In a group: for the place of a bias the group and the place of the weight that it is scaled with, and the sphere of
# each entry.
SCALED_WITH = "scaled_with"
TRANSFERS = ("follow", "step", "equilibrium")


def norms_of(state: dict[str, Any], weight: Tensor, manifold: SphereProduct) -> Tensor:
    """Return the norms of the plain run; those of the weight itself where none are known yet."""
    if NORM not in state:
        state[NORM] = zero_scalars(weight, manifold, torch.float64)
        write_whole_(state[NORM], manifold.partition.spread(manifold.radii).to(weight.device))
    norms: Tensor = state[NORM]
    return norms


def scaled_biases(
    groups: Sequence[Group], states: Mapping[Tensor, dict[str, Any]]
) -> list[tuple[Tensor, Callable[[], Tensor]]]:
    """Return the biases that are scaled with a weight, and what computes n/r of the group of each of their entries."""

    def ratio(bias: Tensor, weight: Tensor, manifold: SphereProduct, of_entries: Sequence[int]) -> Tensor:
        norms = whole(norms_of(states[weight], weight, manifold))
        index = torch.tensor(of_entries, device=norms.device)
        found = (norms / manifold.radius_for(norms)).flatten()[index.clamp_min(0)]
        return held_as(torch.where(index < 0, 1.0, found).to(bias.dtype).reshape(bias.shape), bias)

    found: list[tuple[Tensor, Callable[[], Tensor]]] = []
    for group in groups:
        for place, (other, index, of_entries) in group.get(SCALED_WITH, {}).items():
            bias, of_weight = group["params"][int(place)], groups[other]
            manifold = of_weight["manifolds"][index]
            found.append((bias, partial(ratio, bias, of_weight["params"][index], manifold, of_entries)))
    return found


@contextmanager
def biases_of_the_plain_run(groups: Sequence[Group], states: Mapping[Tensor, dict[str, Any]]) -> Iterator[None]:
    """For the time of a step give biases that are scaled with a weight their size in the plain run.

    Behind a weight ``r u`` in the place of ``n u`` stands the bias ``β = b r/n``. With the gradient of b torch's step
    is that of the plain run, and the new norm makes a new β of the new b.
    """
    found = scaled_biases(groups, states)
    gradients = [bias.grad for bias, _ in found]
    # Norms that are held: biases need the norm of the plain step, with which the whole point is scaled back.
    held = {
        weight: norms_of(states[weight], weight, manifold).clone()
        for group in groups
        if group.get("transfer") not in (None, "follow")
        for weight, manifold in zip(group["params"], group["manifolds"], strict=True)
        if manifold is not None
    }
    with torch.no_grad():
        for (bias, ratio_of), gradient in zip(found, gradients, strict=True):
            ratio = ratio_of()
            bias.mul_(ratio)
            bias.grad = None if gradient is None else gradient / ratio
    try:
        yield
    finally:
        with torch.no_grad():
            for (bias, ratio_of), gradient in zip(found, gradients, strict=True):
                bias.div_(ratio_of())
                bias.grad = gradient
            for weight, norms in held.items():
                states[weight][NORM].copy_(norms)


def of_plain_run(rule: Rule, group: Group) -> Rule:
    """Return the rule of a group; that of a plain optimizer where the group follows its run."""
    if not group.get("transfer") or rule.kind not in ("sgd", "adam", "adam-entries"):
        return rule
    decay, lr = float(group["weight_decay"]), float(group["lr"])
    apart = bool(group.get("decoupled_weight_decay"))
    return replace(
        rule,
        kind="plain-adam" if "betas" in group else "plain-sgd",
        lr=lr,
        decay=0.0 if apart else decay,
        shrink=1 - lr * decay if apart else 1.0,
        follows=True,
    )
