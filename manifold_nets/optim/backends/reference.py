"""The reference backend: one weight after the other, chunk by chunk, by the formulas as they stand.

A rule works in place on a weight in the view of its groups, in float32 or better. Where the weight's own memory can
serve as that, it does, and nothing is copied. Otherwise (half precision, memory formats that have no such view, radii
whose squares leave the range of float32) the rule gets a copy, and each result is rounded once when it is written back.
With ``r`` the radius and ``g`` the Euclidean gradient, the metric ⟨ξ, η⟩/r² of `manifold_nets.SphereProduct` makes the
Riemannian gradient ``ξ = r² g − ⟨w, g⟩ w``, and every rule moves ``w`` as it moves ``u = w/r`` on unit spheres.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from manifold_nets.gathered import is_sharded, local_part
from manifold_nets.groups import Partition
from manifold_nets.optim.backends.products import (
    Scalar,
    Spheres,
    products_of,
    rounding_of,
    some,
    tangential,
)
from manifold_nets.optim.backends.rule import Coefficients, Rule, StepInput, bias_corrections
from manifold_nets.optim.backends.sharded import Part, part_of
from manifold_nets.optim.backends.views import GroupView

__all__ = ["combine_", "run_single", "step_", "turn_", "write_"]

# Entries of a chunk: a few of them, in float32, fit in the second or third level of a processor's cache.
_ENTRIES = 2**18


def run_single(rule: Rule, members: Sequence[StepInput]) -> None:
    """Step one weight after the other, chunk by chunk."""
    rule = replace(rule, lr=float(rule.lr))
    for member in members:
        part = part_of(member.manifold, member.weight) if is_sharded(member.weight) else None
        manifold = member.manifold if part is None else part.manifold
        whole, copies = _view_of(member, manifold.partition, part, by_entries=rule.by_entries)
        spheres = Spheres(manifold.partition.reduced, 1.0)
        if part is not None:
            spheres = spheres._replace(combine=part.combine, elsewhere=part.elsewhere)
        is_cut = rule.by_groups and part is None and 0 in manifold.partition.kept
        for view in whole.chunks(_ENTRIES) if is_cut else (whole,):
            _step_view(rule, view, spheres, member, to_unit=not manifold.moderate)
        for tensor, held, viewed in copies:
            if viewed.data_ptr() != held.data_ptr():
                held.copy_(viewed.reshape(held.shape))
            if part is not None:
                part.write(tensor, held)


def _view_of(
    member: StepInput, partition: Partition, part: Part | None, *, by_entries: bool
) -> tuple[GroupView, list[tuple[Tensor, Tensor, Tensor]]]:
    """Return a weight in the view of its groups, and what of it is to be written back: tensor, its part, its view."""
    copies = []

    def viewed(tensor: Tensor | None, *, written: bool = True) -> Tensor | None:
        if tensor is None:
            return None
        # An alias of the base class shares memory and version counter: autograd notices what is changed through it.
        held = tensor.detach() if part is None else part.read(tensor)
        # In other memory formats there may be no such view, and `reshape` makes a contiguous copy.
        view = held if partition.view == partition.shape else held.reshape(partition.view)
        if written:
            copies.append((tensor, held, view))
        return view

    second = viewed(member.second) if by_entries else member.second
    second, largest = (None if x is None else local_part(x) for x in (second, member.largest))
    local = local_part(member.weight.detach())
    radius = (member.manifold if part is None else part.manifold).radius_for(local)
    weight, moment = viewed(member.weight), viewed(member.moment)
    gradient = viewed(member.gradient, written=False)
    return GroupView(weight, gradient, moment, second, largest, radius), copies  # type: ignore[arg-type]


def _step_view(rule: Rule, view: GroupView, spheres: Spheres, member: StepInput, *, to_unit: bool) -> None:
    """Step groups in their view, in the dtype to compute in; at radius 1 where the radii are extreme."""
    wide, radius = view.wide(), view.radius
    if to_unit:
        moment = None if wide.moment is None else wide.moment / radius
        wide = wide._replace(weight=wide.weight / radius, gradient=wide.gradient * radius, moment=moment)
    spheres = spheres._replace(radius=1.0 if to_unit else radius)
    rounding = rounding_of(view.gradient.dtype)
    if rule.by_entries:
        turn_(rule, *wide[:4], spheres, step=member.step, rounding=rounding)  # type: ignore[arg-type]
    else:
        step_(rule, wide, spheres, dampening=member.dampening, step=member.step, rounding=rounding)
    if to_unit:
        moment = None if wide.moment is None else wide.moment * radius
        wide = wide._replace(weight=wide.weight * radius, moment=moment)
    view.write(wide)


def step_(
    rule: Rule,
    view: GroupView,
    spheres: Spheres,
    *,
    dampening: float = 0.0,
    step: float = 1.0,
    rounding: float | None = None,
) -> None:
    """Take one step, in place: measure all inner products, find the coefficients of each group, write.

    Args:
        rule: the rule, with a learning rate that is a number.
        view: the point, its gradient, which is only read, its momentum, zero before the first step, of which the part
            along the weight counts for nothing, and its second moments, in the dtype to compute in.
        spheres: the groups and their radii.
        dampening: share of the gradient that is left out of the momentum; 0 in the first step.
        step: number of this step, counted from 1.
        rounding: how long a tangential part, relative to the gradient, counts as zero; by default `rounding_of` the
            gradient's dtype.

    Example:
        >>> w = torch.tensor([[1.0, 0.0]])
        >>> view = GroupView(w, torch.tensor([[5.0, -1.0]]), None, None, None, 1.0)
        >>> step_(Rule("sgd", 1.0, 0.0), view, Spheres((1,), 1.0))
        >>> w
        tensor([[0.7071, 0.7071]])
    """
    found, gradient = tangential(
        *view[:3], spheres, maximize=rule.maximize, sharp=rule.needs_lengths, rounding=rounding
    )
    move = rule.coefficients(found, view.second_moments, dampening=dampening, step=step, elsewhere=spheres.elsewhere)
    write_(view._replace(gradient=gradient), spheres, move, maximize=rule.maximize)


def write_(view: GroupView, spheres: Spheres, move: Coefficients, *, maximize: bool) -> None:
    """Write the new weight and the new momentum, in place."""
    square = -spheres.square if maximize else spheres.square
    far = move.far if some(move.far) else None
    combine_(view, spheres, move._replace(wg=move.wg * square, bg=move.bg * square), far)


def combine_(view: GroupView, spheres: Spheres, move: Coefficients, far: Tensor | None) -> None:
    """Write the linear combinations, with coefficients of the Euclidean gradient, and put far ones on their spheres."""
    weight, gradient, moment = view[:3]
    new = (weight * move.ww).addcmul_(gradient, _tensor(move.wg, weight))
    transported = None
    if moment is not None:
        new.addcmul_(moment, _tensor(move.wb, weight))
        transported = (moment * move.bb).addcmul_(gradient, _tensor(move.bg, weight))
        transported.addcmul_(weight, _tensor(move.bw, weight))
    if far is not None:
        carried = transported if move.carried else None
        norm, *overlap = spheres.dots((new, new), *(() if carried is None else ((new, carried),)))
        if carried is not None:
            transported = torch.addcmul(carried, new, torch.where(far, overlap[0] / norm, 0.0), value=-1)
        norm = norm / spheres.square
        new = new * torch.where(far, (1.0 + 0.0 * norm) / norm.sqrt(), 1.0)
    weight.copy_(new)
    if moment is not None and transported is not None:
        moment.copy_(transported)


def _tensor(value: Scalar, like: Tensor) -> Tensor:
    return value if isinstance(value, Tensor) else torch.full((), value, dtype=like.dtype, device=like.device)


# Machine epsilons of a direction, relative to d, of which entries are rounded a few times: below it there is none.
_UNKNOWN = 8.0


def turn_(
    rule: Rule, w: Tensor, g: Tensor, m: Tensor, v: Tensor, spheres: Spheres, *, step: float, rounding: float
) -> None:
    """Take a step in Adam's direction, entry by entry, in place: for AngularAdam of a given angle, else of its length.

    The moment is as long as the weight is at its radius, and so is the direction.
    """
    (ww, wg, _), g, _ = products_of(w, g, None, spheres, sharp=True, rounding=rounding)
    # One temporary as large as the chunk serves in turn as ξ, as d and as the new point: memory is what limits chunks.
    xi = torch.addcmul(g, w, wg / ww, value=-1)
    del g
    radius, alpha = spheres.radius, 1 - rule.beta1
    if rule.maximize or isinstance(radius, Tensor) or radius != 1:
        xi.mul_(-radius if rule.maximize else radius)
    if isinstance(radius, Tensor):
        m.mul_(rule.beta1).addcmul_(xi, radius, value=alpha)
    else:
        m.mul_(rule.beta1).add_(xi, alpha=alpha * radius)
    v.mul_(rule.beta2).addcmul_(xi, xi, value=1 - rule.beta2)
    direction = torch.div(v, 1 - rule.beta2**step, out=xi).sqrt_().add_(rule.eps)
    torch.div(m, direction, out=direction)
    (wd,) = spheres.dots((w, direction))
    tilt = wd / ww
    direction.addcmul_(w, tilt, value=-1)
    (length,) = spheres.dots((direction, direction))
    lr, least = float(rule.lr), _UNKNOWN * torch.finfo(w.dtype).eps
    if rule.kind == "angular-adam":
        turn, along = length.rsqrt() * (radius * math.sin(lr)), math.cos(lr)
    else:
        turn, along = torch.full_like(length, lr * bias_corrections(rule.beta1, rule.beta2, step)[0]), 1.0
    # What was taken off is of squared length tilt wd.
    is_noise = length <= tilt * wd * least**2
    new = direction.mul_(turn.neg_().masked_fill_(is_noise, 0.0)).add_(w, alpha=along)
    norm, overlap = spheres.dots((new, new), (new, m))
    m.addcmul_(new, overlap / norm, value=-1)
    if lr != 0:
        w.copy_(new.mul_(norm.rsqrt() * radius))
