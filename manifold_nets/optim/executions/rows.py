"""Weights as matrices whose rows are groups; blocks that stay in cache, and the numbers of all rows together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from manifold_nets.groups import accumulation_dtype
from manifold_nets.optim.executions.layouts import layout_of
from manifold_nets.optim.rules.members import Member, Rule
from manifold_nets.optim.rules.products import Spheres, Tangential, is_short, measured, some, tangential_of

__all__ = [
    "BLOCK",
    "Rows",
    "blocks_of",
    "keep_second_moments",
    "portions",
    "radii",
    "rows_of",
    "second_moments",
    "sharpened",
    "suits_rows",
    "what_to_write",
]

# Entries of a block: a few of them, in float32, fit in the third level of a processor's cache.
BLOCK = 2**19


class Rows(NamedTuple):
    """A weight, or a part of one, as a matrix whose rows are groups; second moments and radii as columns."""

    weight: Tensor
    gradient: Tensor
    moment: Tensor | None
    second: Tensor | None
    largest: Tensor | None
    radius: float | Tensor

    def between(self, start: int, end: int) -> Rows:
        """Return some of the rows, as views."""
        return Rows(*(x[start:end] if isinstance(x, Tensor) else x for x in self))  # type: ignore[arg-type]


def suits_rows(member: Member) -> bool:
    """Whether the groups of a weight are the rows of a matrix that is a view of it."""
    layout, stride = layout_of(member.manifold), member.weight.stride()
    if hasattr(member.weight, "__tensor_flatten__") or layout.to_unit or not layout.has_rows(stride):
        return False
    # torch writes to several tensors at once only where none of them is lazily negated.
    if member.weight.is_neg() or (member.moment is not None and member.moment.is_neg()):
        return False
    return member.moment is None or member.moment.stride() == stride


def rows_of(member: Member) -> Rows:
    """Return the matrix of a weight that `suits_rows`, with views of its memory; while no gradients are recorded."""
    layout, weight, gradient, moment = layout_of(member.manifold), member.weight, member.gradient, member.moment
    if gradient.stride() != weight.stride():
        gradient = torch.empty_like(weight, dtype=gradient.dtype, requires_grad=False).copy_(gradient)
    second, largest = member.second or (None, None)
    radius = member.manifold.radius_for(weight)
    if isinstance(radius, Tensor):
        radius = radius.reshape(-1, 1)
    return Rows(
        weight.as_strided(*layout.matrix),
        gradient.as_strided(*layout.matrix),
        None if moment is None else moment.as_strided(*layout.matrix),
        None if second is None else second.as_strided(*layout.column),
        None if largest is None else largest.as_strided(*layout.column),
        radius,
    )


def blocks_of(rows: Rows, entries: int = BLOCK) -> Iterator[Rows]:
    """Yield runs of rows of about so many entries, which stay in a processor's cache; all at once on other devices.

    Example:
        >>> rows = Rows(torch.zeros(600, 2048), torch.zeros(600, 2048), None, None, None, 1.0)
        >>> [len(block.weight) for block in blocks_of(rows)]
        [256, 256, 88]
    """
    count, size = rows.weight.shape
    at_once = max(1, entries // size) if rows.weight.is_cpu else count
    if at_once >= count:
        yield rows
        return
    for start in range(0, count, at_once):
        yield rows.between(start, start + at_once)


def portions(matrices: Iterable[Rows]) -> Iterator[list[Rows]]:
    """Yield runs of matrices of together at most one block's entries; larger matrices by themselves."""
    portion: list[Rows] = []
    entries = 0
    for rows in matrices:
        if portion and entries + rows.weight.numel() > BLOCK:
            yield portion
            portion, entries = [], 0
        portion.append(rows)
        entries += rows.weight.numel()
    if portion:
        yield portion


def radii(matrices: Sequence[Rows]) -> float | Tensor:
    """Return the radius of all rows, or one for each of them as a column."""
    found = [rows.radius for rows in matrices]
    if len(found) == 1 or not any(isinstance(radius, Tensor) or radius != found[0] for radius in found):
        return found[0]
    first = matrices[0].weight
    columns = [
        r if isinstance(r, Tensor) else first.new_full((len(rows.weight), 1), r)
        for rows, r in zip(matrices, found, strict=True)
    ]
    return torch.cat([column.to(accumulation_dtype(first.dtype)) for column in columns])


def second_moments(matrices: Sequence[Rows]) -> tuple[Tensor, Tensor | None] | None:
    """Return the second moments of all rows and the largest so far, as copies in columns; None where there are none."""
    both = [
        None if any(x is None for x in column) else torch.cat(column)
        for column in zip(*((rows.second, rows.largest) for rows in matrices), strict=True)
    ]
    return None if both[0] is None else (both[0], both[1])


def keep_second_moments(matrices: Sequence[Rows], second: tuple[Tensor, Tensor | None]) -> None:
    """Write second moments of all rows back to where `second_moments` took them from."""
    sizes = [len(rows.weight) for rows in matrices]
    for whole, parts in zip(second, zip(*((r.second, r.largest) for r in matrices), strict=True), strict=True):
        if whole is not None:
            torch._foreach_copy_(list(parts), list(torch.split(whole, sizes)))


def sharpened(found: Tangential, matrices: Sequence[Rows], *, maximize: bool) -> Tangential:
    """Return what was found with the squared norms of tangential gradients measured where digits were lost."""
    short = is_short(found)
    if not some(short):
        return found
    sizes = [len(rows.weight) for rows in matrices]
    result = []
    for rows, lost, slope, gg in zip(
        matrices, *(torch.split(x, sizes) for x in (short, found.g_slope, found.gg)), strict=True
    ):
        if not some(lost):
            result.append(gg)
            continue
        start = 0
        for part in blocks_of(rows):
            weight, gradient = (x.to(gg.dtype) for x in (part.weight, part.gradient))
            known = found._replace(g_slope=slope[start : start + len(weight)])
            result.append(measured(weight, gradient, known, Spheres((1,), part.radius), maximize))
            start += len(weight)
    return found._replace(gg=torch.where(short, torch.cat(result), found.gg))


def what_to_write(
    rule: Rule, matrices: Sequence[Rows], products: Tensor, dampening: float, step: float
) -> tuple[Tensor, Tensor, bool]:
    """Return the coefficients of all rows of all matrices, and update their second moments.

    Args:
        rule: the rule.
        matrices: weights, not yet changed.
        products: the inner products of `pairs`, one in each line, with a column for each row of the matrices.
        dampening: of all of them.
        step: of all of them.

    Returns:
        A matrix with the six numbers of `Coefficients` for each row, of w, b and the Euclidean gradient; a column that
        says which rows step farther than a radian; and whether their moments are carried along.
    """
    radius, second, dtype = radii(matrices), second_moments(matrices), products.dtype
    if isinstance(radius, Tensor):
        radius = radius.to(dtype)
    if second is not None:
        second = second[0].to(dtype), None if second[1] is None else second[1].to(dtype)
    found = tangential_of(products.unsqueeze(-1).unbind(), radius * radius, maximize=rule.maximize)
    if rule.needs_lengths:
        found = sharpened(found, matrices, maximize=rule.maximize)
    move = replace(rule, lr=float(rule.lr)).coefficients(found, second, dampening=dampening, step=step)
    if second is not None:
        keep_second_moments(matrices, second)
    square = (-radius if rule.maximize else radius) * radius
    *columns, far, carried = move._replace(wg=move.wg * square, bg=move.bg * square)
    return (
        torch.cat([torch.as_tensor(x, dtype=dtype, device=far.device).expand_as(far) for x in columns], 1),
        far,
        carried,
    )
