"""The inner products of a step: all that an update rule has to know of a group, taken before anything is written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from manifold_nets.groups import accumulation_dtype, has_values

__all__ = [
    "Scalar",
    "Spheres",
    "TangentProducts",
    "is_short",
    "noise_in",
    "pairs",
    "products_of",
    "radial_share",
    "rounding_of",
    "some",
    "tangential",
    "tangential_of",
    "without_radial_part",
]

Scalar = float | Tensor

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


def pairs(weight: Tensor, gradient: Tensor, moment: Tensor | None) -> tuple[tuple[Tensor, Tensor], ...]:
    """Return the pairs whose inner products a step needs, in the order in which `tangential_of` takes them."""
    first = ((weight, weight), (weight, gradient), (gradient, gradient))
    return first if moment is None else (*first, (weight, moment), (gradient, moment), (moment, moment))


def tangential_of(
    dots: Sequence[Tensor], square: Scalar, *, maximize: bool, taken: Scalar | None = None, eps: float | None = None
) -> TangentProducts:
    """Return what the inner products of `pairs` say, three without a moment and six with one.

    Args:
        dots: the inner products.
        square: squared radii.
        maximize: whether to ascend.
        taken: what was taken off the gradient before, as `radial_share` gives it.
        eps: machine epsilon of the arithmetic of the products, where it is not that of their dtype.
    """
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
    eps = torch.finfo(ww.dtype).eps if eps is None else eps
    # A number as the default would be an input of compiled graphs, which torch cannot compile ahead of time then.
    g_taken = 0.0 if taken is None else sign * square * taken
    return TangentProducts(ww, g_slope, b_slope, gg, gb - b_slope * wg, bb, g_total, b_total, g_taken, eps)


def tangential(
    weight: Tensor,
    gradient: Tensor,
    moment: Tensor | None,
    spheres: Spheres,
    *,
    maximize: bool,
    sharp: bool,
    rounding: float | None = None,
) -> tuple[TangentProducts, Tensor]:
    """Take all inner products of a step, before anything is written.

    Args:
        weight: the point.
        gradient: the Euclidean gradient.
        moment: the tangent vector that is kept from step to step, or None.
        spheres: the groups and their radii.
        maximize: whether to ascend.
        sharp: whether the length of the tangential gradient matters by itself. Where it is less than half of the whole,
            the difference of squares has lost digits, and the tangential part takes the place of the gradient.
        rounding: what `rounding_of` gives for the dtype in which the gradient was stored; by default for its own.

    Returns:
        The products, and the gradient that they and the step are of.
    """
    dots, gradient, taken = products_of(weight, gradient, moment, spheres, sharp=sharp, rounding=rounding)
    return tangential_of(dots, spheres.square, maximize=maximize, taken=taken), gradient


def products_of(
    weight: Tensor,
    gradient: Tensor,
    moment: Tensor | None,
    spheres: Spheres,
    *,
    sharp: bool,
    rounding: float | None = None,
) -> tuple[Sequence[Tensor], Tensor, Tensor | None]:
    """Return the inner products of `pairs`, the gradient that they are of, and what was taken off it, if anything.

    Arguments as for `tangential`.
    """

    def measure(gradient: Tensor) -> Sequence[Tensor]:
        return spheres.dots(*pairs(weight, gradient, moment))

    dots = measure(gradient)
    taken = radial_share(dots) if sharp else None
    if taken is None or not some(taken):
        return dots, gradient, None
    rounding = rounding_of(gradient.dtype) if rounding is None else rounding
    gradient, dots = without_radial_part(weight, gradient, taken, dots[2], rounding, measure)
    return dots, gradient, taken


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
    weight: Tensor,
    gradient: Tensor,
    taken: Tensor,
    total: Tensor,
    rounding: float,
    measure: Callable[[Tensor], Sequence[Tensor]],
) -> tuple[Tensor, Sequence[Tensor]]:
    """Subtract radial parts entry by entry, and leave nothing of gradients of which only rounding remains.

    The entries of what remains are rounded at its own size, and so are its products; the rules project it once more.

    Args:
        weight: the point.
        gradient: the gradient; only read.
        taken: multiples of the weight.
        total: ⟨g, g⟩ of the whole gradient.
        rounding: see `rounding_of`.
        measure: takes the inner products of `pairs` for another gradient.

    Returns:
        The new gradient and its products.
    """
    part = torch.addcmul(gradient, weight, taken.to(weight.dtype), value=-1)
    found = list(measure(part))
    is_noise = noise_in(found, taken, total, rounding)
    part.masked_fill_(is_noise, 0)
    for place in (1, 2, 4):  # of the gradient
        if place < len(found):
            found[place] = found[place].masked_fill(is_noise, 0)
    return part, found


def noise_in(dots: Sequence[Tensor], taken: Tensor, total: Tensor, rounding: float) -> Tensor:
    """Where nothing but rounding remains of a gradient; arguments as for `without_radial_part`."""
    ww, wg, gg = dots[:3]
    return (taken != 0) & (gg - wg / ww * wg <= rounding * rounding * total)


def some(condition: Tensor) -> bool:
    """Whether a condition may hold anywhere; asked only where the answer costs no wait and no break in a graph."""
    return bool(condition.any()) if condition.is_cpu and has_values(condition) else True
