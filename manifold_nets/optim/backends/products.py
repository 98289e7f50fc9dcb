"""A weight in the view of its groups, and their inner products: all that a rule has to know before anything is written.

The radial part of a gradient moves nothing. Where it is most of the gradient, the length of the tangential part cannot
be read off the inner products, and the tangential part itself takes the gradient's place (`without_radial_part`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from manifold_nets.groups import accumulation_dtype, has_values

__all__ = [
    "CHUNK",
    "GroupView",
    "Scalar",
    "TangentProducts",
    "is_short",
    "radial_share",
    "rounding_of",
    "some",
    "tangential",
    "tangential_of",
    "without_radial_part",
]

Scalar = float | Tensor

# Entries of a chunk: a few of them, in float32, fit in the third level of a processor's cache.
CHUNK = 2**19
# Where the tangential part of a gradient is shorter than half of it, the difference of squares loses digits.
_SHORT = 0.25


def rounding_of(dtype: torch.dtype) -> float:
    """Return how long, relative to a gradient of a dtype, a tangential part may be that is nothing but rounding.

    Half a machine epsilon each is lost where the weight is stored at which the gradient is taken, where the gradient is
    stored, and where its radial part is subtracted in float32 or better. Each of them is relative to the entry, so
    that the sum holds for the norm of a group of any size.

    Example:
        >>> rounding_of(torch.float64) / torch.finfo(torch.float64).eps
        1.5
    """
    if not dtype.is_floating_point:  # integers, which are cast to the dtype of the arithmetic
        dtype = torch.float32
    return torch.finfo(dtype).eps + torch.finfo(accumulation_dtype(dtype)).eps / 2


class GroupView(NamedTuple):
    """A weight, or a part of it, in the view of its groups; second moments and radii broadcast over it.

    Attributes:
        weight: the point.
        gradient: the Euclidean gradient.
        moment: the tangent vector that is kept from step to step, or None.
        second: second moments, or None.
        largest: the largest second moments so far, or None.
        radius: one radius, or one per group.
        axes: axes of the view inside a group; by default groups are the rows of a matrix.
        combine: adds up inner products over the processes that hold parts of the same groups; takes and returns a
            tensor of shape ``(number of products, *groups, with size 1 along axes)``.
        elsewhere: adds up sums over groups where other processes hold other groups of the weight.
        rounding: `rounding_of` the dtype in which the gradient was stored, where that is not its dtype here.
        norms: of the groups in the run of a plain optimizer, or None.
    """

    weight: Tensor
    gradient: Tensor
    moment: Tensor | None
    second: Tensor | None
    largest: Tensor | None
    radius: Scalar
    axes: tuple[int, ...] = (1,)
    combine: Callable[[Tensor], Tensor] | None = None
    elsewhere: Callable[[Tensor], Tensor] | None = None
    rounding: float | None = None
    norms: Tensor | None = None

    @property
    def second_moments(self) -> tuple[Tensor, Tensor | None] | None:
        """The second moments and the largest so far; None where there are none."""
        return None if self.second is None else (self.second, self.largest)

    def wide(self) -> GroupView:
        """Return weight, gradient and moment in the dtype to compute in: float32 or better."""
        dtype = accumulation_dtype(self.weight.dtype)
        moment = None if self.moment is None else self.moment.to(dtype)
        weight, gradient = self.weight.to(dtype), self.gradient.to(dtype)
        rounding = rounding_of(self.gradient.dtype)
        return self._replace(weight=weight, gradient=gradient, moment=moment, rounding=rounding)

    def write(self, found: GroupView) -> None:
        """Take weight and moment of another view of the same groups, rounded once."""
        for own, new in ((self.weight, found.weight), (self.moment, found.moment)):
            if own is not None and new is not None and own is not new:
                own.copy_(new)

    def of_groups(self, which: slice | Tensor) -> GroupView:
        """Return a part along the first axis: views for a slice, copies for indices."""
        part: Any = (x[which] if isinstance(x, Tensor) else x for x in self)
        return GroupView(*part)

    def chunks(self, entries: int = CHUNK) -> Iterator[GroupView]:
        """Yield parts of about this many entries, which stay in a processor's cache; all at once on other devices.

        The first axis has to number groups.

        Example:
            >>> view = GroupView(torch.zeros(600, 2048), torch.zeros(600, 2048), None, None, None, 1.0)
            >>> [len(chunk.weight) for chunk in view.chunks()]
            [256, 256, 88]
        """
        count, total = len(self.weight), self.weight.numel()
        at_once = max(1, entries * count // total) if self.weight.is_cpu and total else count
        if at_once >= count:
            yield self
            return
        for start in range(0, count, at_once):
            yield self.of_groups(slice(start, start + at_once))

    def dots(self, *pairs: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        """Return ⟨x, y⟩ of each group of each pair, with size 1 along the axes inside a group.

        The products are added by torch's cascade summation: those of `torch.linalg.vector_norm` and of a batched
        matrix product are added in sequence, and are off by hundreds of machine epsilons on a million entries.
        """
        sums = tuple((x * y).sum(self.axes, keepdim=True) for x, y in pairs)
        return sums if self.combine is None else self.combine(torch.stack(sums)).unbind()

    def products(self) -> tuple[Tensor, ...]:
        """Return ⟨w, w⟩, ⟨w, g⟩ and ⟨g, g⟩, and with a moment also ⟨w, b⟩, ⟨g, b⟩ and ⟨b, b⟩."""
        w, g, b = self[:3]
        return self.dots((w, w), (w, g), (g, g), *(() if b is None else ((w, b), (g, b), (b, b))))


class TangentProducts(NamedTuple):
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
        g_taken: what `radial_share` has taken off the gradient beforehand, as a multiple of w; 0 mostly.
        eps: machine epsilon of the arithmetic in which the products were taken.
    """

    ww: Tensor
    g_slope: Tensor
    b_slope: Tensor
    gg: Tensor
    gb: Tensor
    bb: Tensor
    g_total: Tensor
    b_total: Tensor
    g_taken: Scalar
    eps: float


def tangential_of(
    dots: Sequence[Tensor], radius: Scalar, *, maximize: bool, taken: Scalar | None = None, eps: float | None = None
) -> TangentProducts:
    """Return what the inner products of `GroupView.products` say, three without a moment and six with one.

    Args:
        dots: the inner products.
        radius: the radii.
        maximize: whether to ascend.
        taken: what was taken off the gradient before, as `radial_share` gives it.
        eps: machine epsilon of the arithmetic of the products, where it is not that of their dtype.
    """
    sign, square = -1.0 if maximize else 1.0, radius * radius
    ww, wg, g_total = dots[:3]
    if len(dots) == 3:
        wb = gb = b_total = torch.zeros_like(ww)
    else:
        wb, gb, b_total = dots[3] / square, sign * dots[4], dots[5] / square
    ww, wg, g_total = ww / square, sign * wg, g_total * square
    g_slope, b_slope = wg / ww, wb / ww
    gg = (g_total - g_slope * wg).clamp_min(0)
    bb = b_total - b_slope * wb
    eps = torch.finfo(ww.dtype).eps if eps is None else eps
    # A number as the default would be an input of compiled graphs, which torch cannot compile ahead of time then.
    g_taken = 0.0 if taken is None else sign * square * taken
    return TangentProducts(ww, g_slope, b_slope, gg, gb - b_slope * wg, bb, g_total, b_total, g_taken, eps)


def tangential(view: GroupView, *, maximize: bool, sharp: bool) -> tuple[TangentProducts, GroupView]:
    """Return the inner products of a step, and the view with the gradient that they and the step are of.

    Args:
        view: the weight, in the dtype to compute in; not yet changed.
        maximize: whether to ascend.
        sharp: whether the length of the tangential gradient matters by itself, and has to be exact where it is short.
    """
    taken, dots = None, view.products()
    if sharp:
        view, dots, taken = without_radial_part(view, dots)
    return tangential_of(dots, view.radius, maximize=maximize, taken=taken), view


def is_short(found: TangentProducts) -> Tensor:
    """Where the difference of squares has lost digits of the tangential gradient's length."""
    return found.gg < _SHORT * found.g_total


def radial_share(dots: Sequence[Tensor]) -> Tensor:
    """Return the multiple of the weight to take off each gradient: its radial part where that is most of it, else 0."""
    ww, wg, gg = dots[:3]
    slope = wg / ww
    # The radial part, of squared length ``slope wg``, leaves less than a quarter of ⟨g, g⟩.
    return torch.where(slope * wg > (1 - _SHORT) * gg, slope, 0.0)


def without_radial_part(
    view: GroupView, dots: tuple[Tensor, ...]
) -> tuple[GroupView, tuple[Tensor, ...], Tensor | None]:
    """Subtract radial parts that are most of a gradient, and leave nothing where only rounding remains.

    The entries of what remains are rounded at its own size, and so are its products; the rules project it once more.

    Args:
        view: the weight; nothing of it is written to.
        dots: its inner products.

    Returns:
        The view with the new gradient, its products, and what was taken off, None where there was nothing to take.
    """
    taken = radial_share(dots)
    if not some(taken):
        return view, dots, None
    part = torch.addcmul(view.gradient, view.weight, taken.to(view.weight.dtype), value=-1)
    rounding = rounding_of(view.gradient.dtype) if view.rounding is None else view.rounding
    view = view._replace(gradient=part)
    found = list(view.products())
    ww, wg, gg = found[:3]
    is_noise = (taken != 0) & (gg - wg / ww * wg <= rounding * rounding * dots[2])
    part.masked_fill_(is_noise, 0)
    for place in (1, 2, 4):  # of the gradient
        if place < len(found):
            found[place] = found[place].masked_fill(is_noise, 0)
    return view, tuple(found), taken


def some(condition: Tensor) -> bool:
    """Whether a condition may hold anywhere; asked only where the answer costs no wait and no break in a graph."""
    return bool(condition.any()) if condition.is_cpu and has_values(condition) else True
