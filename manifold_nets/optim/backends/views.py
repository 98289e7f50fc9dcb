"""Weights viewed as their groups: whole or in chunks, in place wherever their memory allows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from manifold_nets.groups import accumulation_dtype
from manifold_nets.optim.backends.products import (
    Scalar,
    pairs,
    radial_share,
    rounding_of,
    some,
    tangential_of,
    without_radial_part,
)
from manifold_nets.optim.backends.rule import Rule, StepInput

__all__ = [
    "CHUNK",
    "GroupView",
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

# Entries of a chunk: a few of them, in float32, fit in the third level of a processor's cache.
CHUNK = 2**19


class GroupView(NamedTuple):
    """A weight, or a part of it, in the view of its groups; second moments and radii broadcast over it."""

    weight: Tensor
    gradient: Tensor
    moment: Tensor | None
    second: Tensor | None
    largest: Tensor | None
    radius: float | Tensor

    @property
    def second_moments(self) -> tuple[Tensor, Tensor | None] | None:
        """The second moments and the largest so far; None where there are none."""
        return None if self.second is None else (self.second, self.largest)

    def wide(self) -> GroupView:
        """Return weight, gradient and moment in the dtype to compute in: float32 or better."""
        dtype = accumulation_dtype(self.weight.dtype)
        moment = None if self.moment is None else self.moment.to(dtype)
        return self._replace(weight=self.weight.to(dtype), gradient=self.gradient.to(dtype), moment=moment)

    def write(self, found: GroupView) -> None:
        """Take weight and moment of another view of the same groups, rounded once."""
        for own, new in ((self.weight, found.weight), (self.moment, found.moment)):
            if own is not None and new is not None and own is not new:
                own.copy_(new)

    def between(self, start: int, end: int) -> GroupView:
        """Return a part along the first axis, as views."""
        return GroupView(*(x[start:end] if isinstance(x, Tensor) else x for x in self))  # type: ignore[arg-type]

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
            yield self.between(start, start + at_once)


def suits_rows(member: StepInput) -> bool:
    """Whether the groups of a weight are the rows of a matrix that is a view of it."""
    weight, moment = member.weight, member.moment
    manifold, stride = member.manifold, weight.stride()
    if hasattr(weight, "__tensor_flatten__") or not manifold.moderate or not manifold.partition.has_rows(stride):
        return False
    # torch writes to several tensors at once only where none of them is lazily negated.
    if weight.is_neg() or (moment is not None and moment.is_neg()):
        return False
    return moment is None or moment.stride() == stride


def rows_of(member: StepInput) -> GroupView:
    """Return the matrix of a weight that `suits_rows`, with views of its memory; while no gradients are recorded."""
    partition, gradient = member.manifold.partition, member.gradient
    rows, size = partition.n_groups, partition.group_size
    matrix, column = ((rows, size), (size, 1)), ((rows, 1), (1, 1))
    if member.rows is None:
        radius = member.manifold.radius_for(member.weight)
        views = (member.weight, matrix), (member.moment, matrix), (member.second, column), (member.largest, column)
        w, b, v, v_max = (None if x is None else x.detach().as_strided(*shape) for x, shape in views)
        member.rows = w, b, v, v_max, radius.reshape(-1, 1) if isinstance(radius, Tensor) else radius
        member.stride = member.weight.stride()
    if gradient.stride() != member.stride:
        gradient = torch.empty_like(member.weight, dtype=gradient.dtype, requires_grad=False).copy_(gradient)
    w, *others = member.rows
    return GroupView(w, gradient.as_strided(*matrix), *others)  # type: ignore[arg-type]


def portions(matrices: Iterable[GroupView]) -> Iterator[list[GroupView]]:
    """Yield runs of matrices of together at most one chunk's entries; larger matrices by themselves."""
    portion: list[GroupView] = []
    entries = 0
    for rows in matrices:
        if portion and entries + rows.weight.numel() > CHUNK:
            yield portion
            portion, entries = [], 0
        portion.append(rows)
        entries += rows.weight.numel()
    if portion:
        yield portion


def radii(matrices: Sequence[GroupView]) -> float | Tensor:
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


def second_moments(matrices: Sequence[GroupView]) -> tuple[Tensor, Tensor | None] | None:
    """Return the second moments of all rows and the largest so far, as copies in columns; None where there are none."""
    both = [
        None if any(x is None for x in column) else torch.cat(column)
        for column in zip(*((rows.second, rows.largest) for rows in matrices), strict=True)
    ]
    return None if both[0] is None else (both[0], both[1])


def keep_second_moments(matrices: Sequence[GroupView], second: tuple[Tensor, Tensor | None]) -> None:
    """Write second moments of all rows back to where `second_moments` took them from."""
    sizes = [len(rows.weight) for rows in matrices]
    for whole, parts in zip(second, zip(*((r.second, r.largest) for r in matrices), strict=True), strict=True):
        if whole is not None:
            torch._foreach_copy_(list(parts), list(torch.split(whole, sizes)))


def dots_of(rows: GroupView) -> Tensor:
    """Return the inner products of each row, in float32 or better, as rows of a matrix; in the order of `pairs`."""
    wide = rows.wide()
    return torch.stack([(x * y).sum(1) for x, y in pairs(wide.weight, wide.gradient, wide.moment)])


def without_radial_parts(matrices: Sequence[GroupView], products: Tensor) -> tuple[list[GroupView], Tensor, Scalar]:
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
        for chunk in rows.chunks():
            end = start + len(chunk.weight)
            gradient[start:end], found = _without_radial_part(chunk, slope[start:end], known[2, start:end])
            columns.append(found.to(products.dtype))
            start = end
        result.append(rows._replace(gradient=gradient))
    return result, torch.cat(columns, 1), taken


def _without_radial_part(rows: GroupView, slope: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
    def measure(part: Tensor) -> list[Tensor]:
        return list(dots_of(rows._replace(gradient=part)).unsqueeze(-1).unbind())

    wide, slope, total = rows.wide(), slope.unsqueeze(-1), total.unsqueeze(-1)
    rounding = rounding_of(rows.gradient.dtype)
    part, found = without_radial_part(wide.weight, wide.gradient, slope, total, rounding, measure)
    if part.dtype != rows.weight.dtype:  # what is written is of the rounded one
        part = part.to(rows.weight.dtype)
        found = measure(part)
    return part, torch.stack(list(found)).squeeze(-1)


def what_to_write(
    rule: Rule, matrices: Sequence[GroupView], products: Tensor, taken: Scalar, dampening: float, step: float
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
        says which rows step farther than a radian; and whether their momenta are carried along.
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
