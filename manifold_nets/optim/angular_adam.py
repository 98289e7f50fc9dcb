"""Adam's direction, entry by entry, and steps that are angles."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from manifold_nets.errors import OptionError, SphereOptionError
from manifold_nets.gathered import is_sharded
from manifold_nets.groups import accumulation_dtype
from manifold_nets.joint_sphere import JointSphereMember
from manifold_nets.manifold import SphereProduct
from manifold_nets.optim.executions.choice import run_by_entries
from manifold_nets.optim.executions.pieces import pieces
from manifold_nets.optim.executions.sharding import part_of
from manifold_nets.optim.executions.workspace import Workspace
from manifold_nets.optim.membership import Group, constrained_of, name_of
from manifold_nets.optim.radam import RiemannianAdam
from manifold_nets.optim.rules.members import Member, Rule
from manifold_nets.optim.rules.products import (
    mostly_radial,
    pairs,
    radial_share,
    rounding_of,
    some,
    without_radial_part,
)

__all__ = ["AngularAdam"]


class AngularAdam(RiemannianAdam):
    r"""Adam's direction, entry by entry, and in every step a turn of each sphere by the learning rate, in radians.

    With ``u = w/r``, the Riemannian gradient ξ of the direction u, and squares, quotients and roots of entries,

    .. math:: m ← β_1 m + (1-β_1) ξ, \quad v ← β_2 v + (1-β_2) ξ^2, \quad
              d = \frac{m}{\sqrt{v/(1-β_2^t)} + ε}, \\
              e = \frac{d - ⟨u, d⟩ u}{‖d - ⟨u, d⟩ u‖}, \quad u ← \cos η\, u - \sin η\, e,
              \quad m ← m - ⟨u, m⟩ u .

    As in the rotational form of AdamW and in methods that train matrices of fixed norm, the angle is set and only the
    direction is learned; the radius and the size of the loss decide nothing. Unlike `RiemannianAdam` it keeps one
    second moment an entry, ``"entry_sq"``, as large as the weight and in float32 or better, and depends on the
    coordinates, as Adam does. A sphere whose direction is zero, or nothing but rounding, stays where it is. Under a
    constant rate such steps never become small: use a schedule. Plain parameters take the steps of
    `torch.optim.Adam`.

    Args:
        params: best the groups of `manifold_nets.param_groups`.
        lr: η, the angle in radians.
        options: the other options of `RiemannianAdam`; AMSGrad is not defined. On spheres the kernel in C takes what it
            can, by default and with ``fused=True``; else the step is taken piece by piece.

    Raises:
        SphereOptionError: a weight shares its sphere with other weights.

    References:
        The rotational form of AdamW: Kosson, Messmer, Jaggi, *Rotational equilibrium*, ICML 2024, arXiv:2305.17212;
        Adam's direction at fixed norm: arXiv:2606.16899.

    Example:
        >>> import geoopt, manifold_nets as mn
        >>> sphere = mn.SphereProduct((1, 2))
        >>> weight = geoopt.ManifoldParameter(torch.tensor([[1.0, 0.0]]), manifold=sphere)
        >>> optimizer = mn.optim.AngularAdam([weight], lr=torch.pi / 2)
        >>> (5 * weight[0, 1]).backward()
        >>> optimizer.step()
        >>> weight.data.round(decimals=4) + 0.0
        tensor([[ 0., -1.]])
    """

    _moments = ("step", "exp_avg", "entry_sq")

    def __init__(self, params: Any, lr: float = 1e-2, **options: Any) -> None:
        if options.get("amsgrad"):
            raise OptionError("amsgrad", True, "False, as steps of a given angle have no such variant")
        super().__init__(params, lr=lr, **options)

    def add_param_group(self, param_group: Group) -> None:
        """Add a group of parameters, none of which shares its sphere with others."""
        super().add_param_group(param_group)
        number, group = len(self.param_groups) - 1, self.param_groups[-1]
        for index, _, manifold in constrained_of(group):
            if isinstance(manifold, JointSphereMember):
                self.param_groups.pop()
                expected = "a sphere of its own; take RiemannianAdam or AngularSGD"
                raise SphereOptionError(name_of(group, number, index), "a joint sphere", expected)

    def _member(
        self, group: Group, state: dict[str, Any], weight: Tensor, gradient: Tensor, manifold: SphereProduct
    ) -> Member:
        if "exp_avg" not in state:
            state["step"] = torch.tensor(0.0, dtype=torch.float32, device="cpu")
            state["exp_avg"] = torch.zeros_like(weight, requires_grad=False)
            dtype = accumulation_dtype(weight.dtype)
            state["entry_sq"] = torch.zeros_like(weight, dtype=dtype, requires_grad=False)
        state["step"] += 1
        return Member(
            weight, gradient, manifold, state["exp_avg"], (state["entry_sq"], None), step=float(state["step"])
        )

    def _step_members(self, group: Group, members: Sequence[Member]) -> None:
        rule = replace(self._rule(group), kind="angular-adam")
        for member in run_by_entries(rule, members, foreach=group["foreach"], fused=group["fused"]):
            if member.second is None:
                continue
            squares = member.second[0]
            for rows, piece in pieces(replace(member, second=None)):
                _turn(rule, piece, squares if rows is None else squares[rows])


# Machine epsilons of a direction, relative to d, of which entries are rounded a few times: below it there is none.
_UNKNOWN = 8.0


def _turn(rule: Rule, member: Member, squares: Tensor) -> None:
    """Take one step of whole groups, in place."""
    space = Workspace(member.manifold, member.weight)
    spheres, moment = space.spheres, member.moment
    if moment is None:
        return
    w, g, m = space.open(member.weight), space.read(member.gradient), space.open(moment)
    part = part_of(member.manifold, member.weight) if is_sharded(member.weight) else None
    held = squares.detach() if part is None else part.read(squares)
    v = held.reshape(w.shape)
    ww, wg, gg = spheres.dots(*pairs(w, g, None))
    slope = wg / ww
    if some(mostly_radial(slope, wg, gg)):
        rounding = rounding_of(member.gradient.dtype)
        taken = radial_share((ww, wg, gg))
        g, (_, wg, _) = without_radial_part(w, g, taken, gg, rounding, lambda part: spheres.dots(*pairs(w, part, None)))
        slope = wg / ww
    # One temporary as large as the piece serves in turn as ξ, as d and as the new point: memory is what limits pieces.
    xi = torch.addcmul(g, w, slope, value=-1)
    del g
    radius, alpha = spheres.radius, 1 - rule.keep
    if rule.maximize or isinstance(radius, Tensor) or radius != 1:
        xi.mul_(-radius if rule.maximize else radius)
    if isinstance(radius, Tensor):
        m.mul_(rule.keep).addcmul_(xi, radius, value=alpha)
    else:
        m.mul_(rule.keep).add_(xi, alpha=alpha * radius)
    v.mul_(rule.beta2).addcmul_(xi, xi, value=1 - rule.beta2)
    direction = torch.div(v, 1 - rule.beta2**member.step, out=xi).sqrt_().add_(rule.eps)
    torch.div(m, direction, out=direction)
    (wd,) = spheres.dots((w, direction))
    tilt = wd / ww
    direction.addcmul_(w, tilt, value=-1)
    (length,) = spheres.dots((direction, direction))
    angle, least = float(rule.lr), _UNKNOWN * torch.finfo(w.dtype).eps
    # What was taken off is of squared length tilt wd.
    is_noise = length <= tilt * wd * least**2
    turn = (length.rsqrt() * radius).masked_fill_(is_noise, 0.0)
    new = direction.mul_(turn.mul_(-math.sin(angle))).add_(w, alpha=math.cos(angle))
    norm, overlap = spheres.dots((new, new), (new, m))
    m.addcmul_(new, overlap / norm, value=-1)
    if angle != 0:
        w.copy_(new.mul_(norm.rsqrt() * radius))
    if v.data_ptr() != held.data_ptr():
        held.copy_(v.reshape(held.shape))
    if part is not None:
        part.write(squares, held)
    space.close()
