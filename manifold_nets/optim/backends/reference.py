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
from manifold_nets.optim.backends.products import GroupView, Scalar, some, tangential, without_radial_part
from manifold_nets.optim.backends.rule import Coefficients, Rule, StepInput, bias_corrections
from manifold_nets.optim.backends.sharded import Part, part_of

__all__ = ["combine_", "run_single", "step_", "turn_", "write_"]

# Entries of a chunk: a few of them, in float32, fit in the second or third level of a processor's cache.
_ENTRIES = 2**18


def run_single(rule: Rule, members: Sequence[StepInput]) -> None:
    """Step one weight after the other, chunk by chunk."""
    rule = replace(rule, lr=float(rule.lr))
    for member in members:
        part = part_of(member.manifold, member.weight) if is_sharded(member.weight) else Part(member.manifold)
        whole, copies = _view_of(member, part, by_entries=rule.by_entries)
        is_cut = rule.by_groups and not is_sharded(member.weight) and 0 in part.manifold.partition.kept
        for view in whole.chunks(_ENTRIES) if is_cut else (whole,):
            _step_view(rule, view, member, to_unit=not part.manifold.moderate)
        for tensor, held, viewed in copies:
            if viewed.data_ptr() != held.data_ptr():
                held.copy_(viewed.reshape(held.shape))
            part.write(tensor, held)


def _view_of(
    member: StepInput, part: Part, *, by_entries: bool
) -> tuple[GroupView, list[tuple[Tensor, Tensor, Tensor]]]:
    """Return a weight in the view of its groups, and what of it is to be written back: tensor, its part, its view."""
    copies, partition = [], part.manifold.partition

    def viewed(tensor: Tensor, *, written: bool = True) -> Tensor:
        # An alias of the base class shares memory and version counter: autograd notices what is changed through it.
        held = part.read(tensor)
        # In other memory formats there may be no such view, and `reshape` makes a contiguous copy.
        view = held if partition.view == partition.shape else held.reshape(partition.view)
        if written:
            copies.append((tensor, held, view))
        return view

    second, largest = (
        None if x is None else viewed(x) if by_entries else local_part(x) for x in (member.second, member.largest)
    )
    moment = None if member.moment is None else viewed(member.moment)
    weight, gradient = viewed(member.weight), viewed(member.gradient, written=False)
    radius = part.manifold.radius_for(local_part(member.weight.detach()))
    norms = None if member.norms is None else local_part(member.norms)
    view = GroupView(weight, gradient, moment, second, largest, radius, partition.reduced, norms=norms)
    return view._replace(combine=part.combine, elsewhere=part.elsewhere), copies


def _step_view(rule: Rule, view: GroupView, member: StepInput, *, to_unit: bool) -> None:
    """Step groups in their view, in the dtype to compute in; at radius 1 where the radii are extreme."""
    wide, radius = view.wide(), view.radius
    if to_unit:
        moment = None if wide.moment is None else wide.moment / radius
        wide = wide._replace(weight=wide.weight / radius, gradient=wide.gradient * radius, moment=moment, radius=1.0)
    if rule.kind == "plain-adam":
        plain_adam_(rule, wide, step=member.step)
    elif rule.by_entries:
        turn_(rule, wide, step=member.step)
    else:
        step_(rule, wide, dampening=member.dampening, step=member.step)
    if to_unit:
        moment = None if wide.moment is None else wide.moment * radius
        wide = wide._replace(weight=wide.weight * radius, moment=moment)
    view.write(wide)


def step_(rule: Rule, view: GroupView, *, dampening: float = 0.0, step: float = 1.0) -> None:
    """Take one step, in place.

    Args:
        rule: the rule.
        view: the weight, in the dtype to compute in.
        dampening: share of the gradient that is left out of the momentum; 0 in the first step.
        step: number of this step, counted from 1.

    Example:
        >>> w = torch.tensor([[1.0, 0.0]])
        >>> step_(Rule("sgd", 1.0, 0.0), GroupView(w, torch.tensor([[5.0, -1.0]]), None, None, None, 1.0))
        >>> w
        tensor([[0.7071, 0.7071]])
    """
    found, exact = tangential(view, maximize=rule.maximize, sharp=rule.needs_lengths)
    state = {"elsewhere": view.elsewhere, "norms": view.norms}
    move = rule.coefficients(found, view.second_moments, dampening=dampening, step=step, **state)  # type: ignore[arg-type]
    write_(exact, move, maximize=rule.maximize)


def write_(view: GroupView, move: Coefficients, *, maximize: bool) -> None:
    """Write the new weight and the new momentum, in place."""
    square = (-view.radius if maximize else view.radius) * view.radius
    far = move.far if some(move.far) else None
    combine_(view, move._replace(wg=move.wg * square, bg=move.bg * square), far)


def combine_(view: GroupView, move: Coefficients, far: Tensor | None) -> None:
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
        norm, *overlap = view.dots((new, new), *(() if carried is None else ((new, carried),)))
        if carried is not None:
            transported = torch.addcmul(carried, new, torch.where(far, overlap[0] / norm, 0.0), value=-1)
        norm = norm / (view.radius * view.radius)
        new = new * torch.where(far, (1.0 + 0.0 * norm) / norm.sqrt(), 1.0)
    weight.copy_(new)
    if moment is not None and transported is not None:
        moment.copy_(transported)


def _tensor(value: Scalar, like: Tensor) -> Tensor:
    return value if isinstance(value, Tensor) else torch.full((), value, dtype=like.dtype, device=like.device)


def plain_adam_(rule: Rule, view: GroupView, *, step: float) -> None:
    """Take plain Adam's step from a weight of another norm, in place; see `rule.plain_step`.

    The first moment is as long as the weight is at its radius, second moments are those of the plain weight's entries.
    """
    w, g, m, v, largest, radius = view[:6]
    if m is None or v is None or view.norms is None:
        raise TypeError("plain Adam needs both moments and norms")
    (ww,) = view.dots((w, w))
    down = ww.double().sqrt() / view.norms
    of_g, up = down.to(w.dtype), (1 / down).to(w.dtype)
    plain = g * (-of_g if rule.maximize else of_g)
    if rule.decay:
        plain.addcmul_(w, up, value=rule.decay)
    m.lerp_(plain * radius, 1 - rule.beta1)
    v.mul_(rule.beta2).addcmul_(plain, plain, value=1 - rule.beta2)
    if largest is not None:
        v = largest.copy_(torch.maximum(largest, v))
    first, second = bias_corrections(rule.beta1, rule.beta2, step)
    direction = torch.div(m, (v * second).sqrt_().add_(rule.eps), out=plain).mul_(first)
    wd, dd = (x.double() for x in view.dots((w, direction), (direction, direction)))
    turn = float(rule.lr) / radius
    squared = (rule.shrink * view.norms).square() - 2 * turn * rule.shrink / down * wd + turn * turn * dd
    if rule.follows:
        view.norms.copy_(squared.sqrt())
    if rule.lr != 0:
        new = (w * (rule.shrink * up)).sub_(direction * turn)
        (norm,) = view.dots((new, new))
        w.copy_(new.mul_((1.0 + 0.0 * norm) / norm.sqrt() * radius))


# Machine epsilons of a direction, relative to d, of which entries are rounded a few times: below it there is none.
_UNKNOWN = 8.0


def turn_(rule: Rule, view: GroupView, *, step: float) -> None:
    """Take a step in Adam's direction, entry by entry, in place: for AngularAdam of a given angle, else of its length.

    The moment is as long as the weight is at its radius, and so is the direction.
    """
    w, _, m, v, _, radius = view[:6]
    if m is None or v is None:
        raise TypeError("steps by entries need both moments")
    alone = view._replace(moment=None)
    alone, (ww, wg, _), _ = without_radial_part(alone, alone.products())
    # One temporary as large as the chunk serves in turn as ξ, as d and as the new point: memory is what limits chunks.
    xi = torch.addcmul(alone.gradient, w, wg / ww, value=-1)
    del alone
    alpha = 1 - rule.beta1
    if rule.maximize or isinstance(radius, Tensor) or radius != 1:
        xi.mul_(-radius if rule.maximize else radius)
    if isinstance(radius, Tensor):
        m.mul_(rule.beta1).addcmul_(xi, radius, value=alpha)
    else:
        m.mul_(rule.beta1).add_(xi, alpha=alpha * radius)
    v.mul_(rule.beta2).addcmul_(xi, xi, value=1 - rule.beta2)
    direction = torch.div(v, 1 - rule.beta2**step, out=xi).sqrt_().add_(rule.eps)
    torch.div(m, direction, out=direction)
    (wd,) = view.dots((w, direction))
    tilt = wd / ww
    direction.addcmul_(w, tilt, value=-1)
    (length,) = view.dots((direction, direction))
    lr, least = float(rule.lr), _UNKNOWN * torch.finfo(w.dtype).eps
    if rule.kind == "angular-adam":
        turn, along = length.rsqrt() * (radius * math.sin(lr)), math.cos(lr)
    else:
        turn, along = torch.full_like(length, lr / (1 - rule.beta1**step)), 1.0
    # What was taken off is of squared length tilt wd.
    is_noise = length <= tilt * wd * least**2
    new = direction.mul_(turn.neg_().masked_fill_(is_noise, 0.0)).add_(w, alpha=along)
    norm, overlap = view.dots((new, new), (new, m))
    m.addcmul_(new, overlap / norm, value=-1)
    if lr != 0:
        w.copy_(new.mul_(norm.rsqrt() * radius))
