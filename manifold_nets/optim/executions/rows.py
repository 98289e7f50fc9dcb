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
from manifold_nets.optim.rules.products import (
    Scalar,
    pairs,
    radial_share,
    rounding_of,
    some,
    tangential_of,
    without_radial_part,
)

__all__ = [
    "BLOCK",
    "Rows",
    "blocks_of",
    "dots_of",
    "keep_second_moments",
    "portions",
    "radii",
    "rows_of",
    "second_moments",
    "suits_rows",
    "what_to_write",
    "without_radial_parts",
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


def dots_of(rows: Rows) -> Tensor:
    """Return the inner products of each row, in float32 or better, as rows of a matrix; in the order of `pairs`."""
    dtype = accumulation_dtype(rows.weight.dtype)
    w, g, b = (None if x is None else x.to(dtype) for x in (rows.weight, rows.gradient, rows.moment))
    return torch.stack([(x * y).sum(1) for x, y in pairs(w, g, b)])  # type: ignore[arg-type]


def without_radial_parts(matrices: Sequence[Rows], products: Tensor) -> tuple[list[Rows], Tensor, Scalar]:
    """Let tangential parts take the place of gradients that are mostly radial; see `without_radial_part`.

    Args:
        matrices: weights, not yet changed.
        products: the inner products of `pairs`, one in each line, with a column for each row of the matrices.

    Returns:
        The matrices with gradients of which nothing is written to, their products, and what was taken off.
    """
    taken = radial_share(products.unbind())
    if not some(taken):
        return list(matrices), products, 0.0
    sizes, result, columns = [len(rows.weight) for rows in matrices], [], []
    for rows, slope, known in zip(matrices, torch.split(taken, sizes), torch.split(products, sizes, 1), strict=True):
        if not some(slope):
            result.append(rows)
            columns.append(known)
            continue
        gradient, start = torch.empty_like(rows.weight), 0
        for block in blocks_of(rows):
            end = start + len(block.weight)
            gradient[start:end], found = _without_radial_part(block, slope[start:end], known[2, start:end])
            columns.append(found.to(products.dtype))
            start = end
        result.append(rows._replace(gradient=gradient))
    return result, torch.cat(columns, 1), taken


def _without_radial_part(rows: Rows, slope: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
    def measure(part: Tensor) -> list[Tensor]:
        return list(dots_of(rows._replace(gradient=part)).unsqueeze(-1).unbind())

    dtype, slope, total = accumulation_dtype(rows.weight.dtype), slope.unsqueeze(-1), total.unsqueeze(-1)
    rounding, weight, gradient = rounding_of(rows.gradient.dtype), rows.weight.to(dtype), rows.gradient.to(dtype)
    part, found = without_radial_part(weight, gradient, slope, total, rounding, measure)
    if dtype != rows.weight.dtype:  # what is written is of the rounded one
        part = part.to(rows.weight.dtype)
        found = measure(part)
    return part, torch.stack(list(found)).squeeze(-1)


def what_to_write(
    rule: Rule, matrices: Sequence[Rows], products: Tensor, taken: Scalar, dampening: float, step: float
) -> tuple[Tensor, Tensor, bool]:
    """Return the coefficients of all rows of all matrices, and update their second moments.

    Args:
        rule: the rule.
        matrices: weights, not yet changed.
        products: the inner products of `pairs`, one in each line, with a column for each row of the matrices.
        taken: what `without_radial_parts` has taken off their gradients.
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
    taken = taken.unsqueeze(-1) if isinstance(taken, Tensor) else taken
    eps = torch.finfo(accumulation_dtype(matrices[0].weight.dtype)).eps
    found = tangential_of(
        products.unsqueeze(-1).unbind(), radius * radius, maximize=rule.maximize, taken=taken, eps=eps
    )
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
