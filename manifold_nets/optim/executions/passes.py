"""The two passes of a step over a matrix whose rows are groups: one takes inner products, one writes.

Between them stand the coefficients, a few numbers a row. Where the direction is the moment itself, the first pass
also adds the gradient to the moment, ``b ← b + c g`` with ``c`` chosen so that the new moment is μ times that: three
inner products then say all where six would be needed, and the second pass reads two matrices where it would read three.
That is the same step, as the tangential part of a sum is the sum of the tangential parts.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from manifold_nets.groups import accumulation_dtype
from manifold_nets.optim.executions.rows import Rows
from manifold_nets.optim.rules.coefficients import Coefficients
from manifold_nets.optim.rules.products import Spheres, pairs
from manifold_nets.optim.rules.updates import combine_

__all__ = ["advance", "combine", "combine_two", "dots"]


def dots(rows: Rows) -> Tensor:
    """Return the inner products of each row, in float32 or better, as rows of a matrix; in the order of `pairs`."""
    dtype = accumulation_dtype(rows.weight.dtype)
    w, g, b = (None if x is None else x.to(dtype) for x in (rows.weight, rows.gradient, rows.moment))
    return torch.stack([(x * y).sum(1) for x, y in pairs(w, g, b)])  # type: ignore[arg-type]


def advance(rows: Rows, share: float, with_gradient: bool) -> Tensor:
    """Add a share of the Riemannian gradient's Euclidean part, ``r² g``, to the moment, in place, and return products.

    Returns:
        As `dots`; products with the gradient are 0 where ``with_gradient`` is False, and ⟨g, b⟩ always.
    """
    w, g, b = rows.weight, rows.gradient, cast("Tensor", rows.moment)
    if isinstance(rows.radius, Tensor):
        b.addcmul_(g, share * rows.radius * rows.radius)
    else:
        b.add_(g, alpha=share * rows.radius * rows.radius)
    ww, wb, bb = ((x * y).sum(1) for x, y in ((w, w), (w, b), (b, b)))
    zero = torch.zeros_like(ww)
    wg, gg = ((w * g).sum(1), (g * g).sum(1)) if with_gradient else (zero, zero)
    return torch.stack([ww, wg, gg, wb, zero, bb])


def combine(rows: Rows, factors: Tensor, far: Tensor | None) -> None:
    """Write the linear combinations of each row, computed in float32 or better and rounded once."""
    dtype = accumulation_dtype(rows.weight.dtype)
    w, g, b = (None if x is None else x.to(dtype) for x in (rows.weight, rows.gradient, rows.moment))
    ww, wb, wg, bw, bb, bg = torch.split(factors, 1, 1)
    move = Coefficients(ww, wb, wg, bw, bb, bg, torch.zeros_like(ww, dtype=torch.bool) if far is None else far)
    combine_(w, g, b, Spheres((1,), rows.radius), move, far)  # type: ignore[arg-type]
    if w is not rows.weight:
        rows.weight.copy_(w)  # type: ignore[arg-type]
    if b is not rows.moment and rows.moment is not None:
        rows.moment.copy_(b)  # type: ignore[arg-type]


def combine_two(rows: Rows, factors: Tensor, far: Tensor | None) -> None:
    """Write the linear combinations of weight and moment, which has taken the gradient up."""
    if far is not None:
        combine(rows._replace(gradient=rows.weight), factors, far)  # its factors are 0
        return
    w, b = rows.weight, cast("Tensor", rows.moment)
    ww, wb, _, bw, bb, _ = torch.split(factors, 1, 1)
    turned = w * bw
    w.mul_(ww).addcmul_(b, wb)
    torch.addcmul(turned, b, bb, out=b)
