"""Weights as matrices whose rows are groups, in place: one by one, and many together."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from manifold_nets.groups import accumulation_dtype
from manifold_nets.optim.backends.products import (
    CHUNK,
    GroupView,
    Scalar,
    radial_share,
    some,
    tangential_of,
    without_radial_part,
)
from manifold_nets.optim.backends.rule import Rule, StepInput

__all__ = [
    "columns_of",
    "rows_of",
    "small_together",
    "suits_rows",
    "what_to_write",
    "without_radial_parts",
    "write_second_moments",
]

# Weights of at most this many entries are stepped together, up to a chunk at once.
_SMALL = 2**15


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
    view = GroupView(w, gradient.as_strided(*matrix), *others)  # type: ignore[arg-type]
    return view if member.norms is None else view._replace(norms=member.norms.view(-1, 1))


@contextmanager
def small_together(batch: Sequence[GroupView]) -> Iterator[list[GroupView]]:
    """Join small weights with groups of one size to matrices, and write back what became of them."""
    alike: dict[Any, list[GroupView]] = defaultdict(list)
    matrices: list[GroupView] = []
    joined: list[tuple[GroupView, list[GroupView]]] = []
    room: dict[Any, int] = defaultdict(int)
    for rows in batch:
        entries = rows.weight.numel()
        if entries > _SMALL:
            matrices.append(rows)
            continue
        radius = rows.radius if isinstance(rows.radius, float) else None
        kind = rows.weight.shape[1], rows.weight.dtype, rows.gradient.dtype, radius
        room[kind] += entries
        alike[(*kind, room[kind] // CHUNK)].append(rows)
    for portion in alike.values():
        whole = portion[0]
        if len(portion) > 1:
            columns = zip(*portion, strict=True)
            joint: Any = (torch.cat(x) if isinstance(x[0], Tensor) else x[0] for x in columns)
            whole = GroupView(*joint)
            joined.append((whole, portion))
        matrices.append(whole)
    yield matrices
    for whole, portion in joined:
        for k in (0, 2, 3, 4, -1):  # all but the gradients
            _split_into([rows[k] for rows in portion], whole[k])


def _split_into(parts: Sequence[Any], whole: Any) -> None:
    """Write the rows of a whole to the parts that it was made of; nothing where there is none."""
    if whole is not None:
        torch._foreach_copy_(list(parts), list(whole.split([len(part) for part in parts])))


def what_to_write(
    rule: Rule, matrices: Sequence[GroupView], products: Tensor, dampening: float, step: float
) -> tuple[list[GroupView], Tensor, Tensor, bool]:
    """Return the coefficients of all rows of all matrices, and update their second moments.

    Args:
        rule: the rule.
        matrices: weights, not yet changed.
        products: their inner products, one in each line, with a column for each row of the matrices.
        dampening: of all of them.
        step: of all of them.

    Returns:
        The matrices, with the gradients to take; a matrix with the six numbers of `Coefficients` for each row, of w, b
        and the Euclidean gradient; a column that says which rows step farther than a radian; and whether their momenta
        are carried along.
    """
    dots: Sequence[Tensor] = products.unsqueeze(-1).unbind()
    taken = None
    if rule.needs_lengths:
        matrices, dots, taken = without_radial_parts(matrices, dots)
    dtype, eps = products.dtype, torch.finfo(accumulation_dtype(matrices[0].weight.dtype)).eps
    radius, second = columns_of(matrices, dtype)
    found = tangential_of(dots, radius, maximize=rule.maximize, taken=taken, eps=eps)
    norms = None if matrices[0].norms is None else torch.cat([rows.norms for rows in matrices])  # type: ignore[misc]
    move = replace(rule, lr=float(rule.lr)).coefficients(found, second, dampening=dampening, step=step, norms=norms)
    write_second_moments(matrices, second)
    _split_into([rows.norms for rows in matrices], norms)
    square = (-radius if rule.maximize else radius) * radius
    *numbers, far, carried = move._replace(wg=move.wg * square, bg=move.bg * square)
    factors = [torch.as_tensor(x, dtype=dtype, device=far.device).expand_as(far) for x in numbers]
    return list(matrices), torch.cat(factors, 1), far, carried


def columns_of(matrices: Sequence[GroupView], dtype: torch.dtype) -> tuple[Scalar, tuple[Tensor, Tensor | None] | None]:
    """Return radii and second moments of all rows, as copies in columns; one number where all share the radius."""
    radius: Scalar = matrices[0].radius
    if len(matrices) > 1 and any(isinstance(rows.radius, Tensor) or rows.radius != radius for rows in matrices):
        columns = [(len(r.weight), torch.as_tensor(r.radius, dtype=dtype, device=r.weight.device)) for r in matrices]
        radius = torch.cat([column.expand(size, 1) for size, column in columns])
    if isinstance(radius, Tensor):
        radius = radius.to(dtype)
    if matrices[0].second is None:
        return radius, None
    both = zip(*(rows[3:5] for rows in matrices), strict=True)
    second, largest = (None if x[0] is None else torch.cat(x).to(dtype) for x in both)
    return radius, None if second is None else (second, largest)


def write_second_moments(matrices: Sequence[GroupView], second: tuple[Tensor, Tensor | None] | None) -> None:
    """Write second moments of all rows back to where `columns_of` took them from."""
    for k, whole in zip((3, 4), second or (), strict=False):
        _split_into([rows[k] for rows in matrices], whole)


def without_radial_parts(
    matrices: Sequence[GroupView], dots: Sequence[Tensor]
) -> tuple[Sequence[GroupView], Sequence[Tensor], Tensor | None]:
    """Let tangential parts take the place of gradients that are mostly radial; see `without_radial_part`."""
    taken = radial_share(dots)
    if not some(taken):
        return matrices, dots, None
    exact, products, start = [], torch.stack(list(dots)), 0
    for rows in matrices:
        gradient = torch.empty_like(rows.weight)
        exact.append(rows._replace(gradient=gradient))
        for chunk, new in zip(rows.chunks(), exact[-1].chunks(), strict=True):
            columns = products[:, start : (start := start + len(chunk.weight))]
            wide = chunk.wide() if len(dots) > 3 else chunk.wide()._replace(moment=None)
            view, found, _ = without_radial_part(wide, columns.unbind())
            new.gradient.copy_(view.gradient)
            if gradient.dtype != view.gradient.dtype:  # what is written is of the rounded one
                found = new.wide().products()
            columns.copy_(torch.stack(list(found)))
    return exact, products.unbind(), taken
