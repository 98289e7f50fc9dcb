"""The inner products of a step: all that an update rule has to know of a group, taken before anything is written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from manifold_nets.groups import has_values

__all__ = [
    "Scalar",
    "Spheres",
    "Tangential",
    "is_short",
    "measured",
    "pairs",
    "some",
    "tangential",
    "tangential_of",
]

Scalar = float | Tensor

# Where the tangential part of a gradient is shorter than half of it, the difference of squares loses digits.
_SHORT = 0.25


class Spheres(NamedTuple):
    """The groups of a viewed weight.

    Attributes:
        axes: axes of the view inside a group.
        radius: one radius, or one a group that broadcasts over the view.
        combine: adds up inner products over all parts of a sphere where the tensors of a step are only one of them;
            takes and returns a tensor of shape ``(number of products, *groups, with size 1 along axes)``.
        elsewhere: adds up sums over groups where these are only some of a weight's groups, each of them whole.
    """

    axes: tuple[int, ...]
    radius: float | Tensor
    combine: Callable[[Tensor], Tensor] | None = None
    elsewhere: Callable[[Tensor], Tensor] | None = None

    @property
    def square(self) -> float | Tensor:
        """The squared radius."""
        return self.radius * self.radius

    def dots(self, *pairs: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        """Return ⟨x, y⟩ of each group of each pair, with size 1 along the axes inside a group.

        The products are added by torch's cascade summation: those of `torch.linalg.vector_norm` and of a batched
        matrix product are added in sequence, and are off by hundreds of machine epsilons on a million entries.
        """
        sums = [(x * y).sum(self.axes, keepdim=True) for x, y in pairs]
        return tuple(sums) if self.combine is None else self.combine(torch.stack(sums)).unbind()


class Tangential(NamedTuple):
    """What the inner products of each group say in the coordinates of the unit sphere, ``w/r``, ``r g`` and ``b/r``.

    To maximize, the gradient counts as −g. Without a moment b its products are 0.

    Attributes:
        ww: ⟨w, w⟩/r², which is 1 to rounding.
        g_slope: ⟨w, g⟩/⟨w, w⟩, with which ``ξ = g − g_slope w`` is tangent.
        b_slope: ⟨w, b⟩/⟨w, w⟩ likewise.
        gg: squared norm of the tangential part of g.
        gb: inner product of the tangential parts of g and b.
        bb: squared norm of the tangential part of b.
        g_total: squared norm of g.
        b_total: squared norm of b.
    """

    ww: Tensor
    g_slope: Tensor
    b_slope: Tensor
    gg: Tensor
    gb: Tensor
    bb: Tensor
    g_total: Tensor
    b_total: Tensor


def pairs(weight: Tensor, gradient: Tensor, moment: Tensor | None) -> tuple[tuple[Tensor, Tensor], ...]:
    """Return the pairs whose inner products a step needs, in the order in which `tangential_of` takes them."""
    first = ((weight, weight), (weight, gradient), (gradient, gradient))
    return first if moment is None else (*first, (weight, moment), (gradient, moment), (moment, moment))


def tangential_of(dots: Sequence[Tensor], square: Scalar, *, maximize: bool) -> Tangential:
    """Return what the inner products of `pairs` say, three without a moment and six with one."""
    sign = -1.0 if maximize else 1.0
    ww, wg, g_total = dots[:3]
    if len(dots) == 3:
        wb = gb = b_total = torch.zeros_like(ww)
    else:
        wb, gb, b_total = dots[3] / square, sign * dots[4], dots[5] / square
    ww, wg, g_total = ww / square, sign * wg, g_total * square
    g_slope, b_slope = wg / ww, wb / ww
    gg = (g_total - g_slope * wg).clamp_min(0)
    bb = b_total - b_slope * wb
    return Tangential(ww, g_slope, b_slope, gg, gb - b_slope * wg, bb, g_total, b_total)


def tangential(
    weight: Tensor, gradient: Tensor, moment: Tensor | None, spheres: Spheres, *, maximize: bool, sharp: bool
) -> Tangential:
    """Take all inner products of a step, before anything is written.

    Args:
        weight: the point.
        gradient: the Euclidean gradient.
        moment: the tangent vector that is kept from step to step, or None.
        spheres: the groups and their radii.
        maximize: whether to ascend.
        sharp: whether the length of the tangential gradient matters by itself. Where it is less than half of the whole,
            the difference of squares has lost digits, and it is measured.
    """
    found = tangential_of(spheres.dots(*pairs(weight, gradient, moment)), spheres.square, maximize=maximize)
    short = is_short(found)
    if sharp and some(short):
        found = found._replace(gg=torch.where(short, measured(weight, gradient, found, spheres, maximize), found.gg))
    return found


def is_short(found: Tangential) -> Tensor:
    """Where the difference of squares has lost digits of the tangential gradient's length."""
    return found.gg < _SHORT * found.g_total


def measured(weight: Tensor, gradient: Tensor, found: Tangential, spheres: Spheres, maximize: bool) -> Tensor:
    """Return the squared norm of the tangential gradient from its entries."""
    square = -spheres.square if maximize else spheres.square
    part = gradient * square - weight * found.g_slope
    return spheres.dots((part, part))[0] / spheres.square


def some(condition: Tensor) -> bool:
    """Whether a condition may hold anywhere; asked only where the answer costs no wait and no break in a graph."""
    return bool(condition.any()) if condition.is_cpu and has_values(condition) else True
