"""The inner products of a step: all that an update rule has to know of a group, taken before anything is written."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from manifold_nets.groups import has_values

__all__ = ["Scalar", "Spheres", "Tangential", "some", "tangential"]

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
    """

    axes: tuple[int, ...]
    radius: float | Tensor
    combine: Callable[[Tensor], Tensor] | None = None

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
    square, sign = spheres.square, -1.0 if maximize else 1.0
    if moment is None:
        ww, wg, g_total = spheres.dots((weight, weight), (weight, gradient), (gradient, gradient))
        wb = gb = b_total = torch.zeros_like(ww)
    else:
        pairs = ((weight, weight), (weight, gradient), (gradient, gradient))
        ww, wg, g_total, wb, gb, b_total = spheres.dots(*pairs, (weight, moment), (gradient, moment), (moment, moment))
        wb, gb, b_total = wb / square, sign * gb, b_total / square
    ww, wg, g_total = ww / square, sign * wg, g_total * square
    g_slope, b_slope = wg / ww, wb / ww
    gg = (g_total - g_slope * wg).clamp_min(0)
    bb = b_total - b_slope * wb
    short = gg < _SHORT * g_total
    if sharp and some(short):
        part = gradient * (sign * square) - weight * g_slope
        gg = torch.where(short, spheres.dots((part, part))[0] / square, gg)
    return Tangential(ww, g_slope, b_slope, gg, gb - b_slope * wg, bb, g_total, b_total)


def some(condition: Tensor) -> bool:
    """Whether a condition may hold anywhere; asked only where the answer costs no wait and no break in a graph."""
    return bool(condition.any()) if condition.is_cpu and has_values(condition) else True
