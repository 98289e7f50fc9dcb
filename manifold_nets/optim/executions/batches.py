"""Steps by torch's operations on matrices whose rows are groups: blocks that stay in cache, and many weights at once.

The inner products of all weights come first, then the coefficients of all their groups at once, then the writing. A
large weight is passed in blocks of rows, so that what the operations leave between them stays in cache and takes little
memory; small weights with groups of one size are one matrix. Compiled, one kernel takes the inner products of a weight
of any size, and one writes: with the coefficients between them in one kernel, torch's compiler computes square roots
and quotients anew for every few entries.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from manifold_nets.groups import accumulation_dtype
from manifold_nets.optim.executions.layouts import layout_of
from manifold_nets.optim.rules.coefficients import Coefficients
from manifold_nets.optim.rules.members import Member, Rule
from manifold_nets.optim.rules.products import Spheres, Tangential, is_short, measured, pairs, some, tangential_of
from manifold_nets.optim.rules.updates import combine_

__all__ = ["run_batched", "run_compiled", "suits_rows"]

# Entries of a block: a few of them, in float32, fit in the second or third level of a processor's cache.
_BLOCK = 2**18
# Weights of at most so many entries are stepped together, up to a block at once.
_SMALL = 2**15


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
    return member.moment is None or member.moment.stride() == stride


def run_batched(rule: Rule, members: Sequence[Member]) -> None:
    """Step weights that `suits_rows` by torch's operations, large ones in blocks and small ones together."""
    for (dampening, step, *_), batch in _alike(members).items():
        with _small_together(batch) as matrices:
            _step_all(rule, matrices, dampening, step, _dots_in_blocks, _combine_in_blocks)


def run_compiled(rule: Rule, members: Sequence[Member]) -> None:
    """Step weights that `suits_rows` by two kernels that torch compiles for matrices of any size."""
    for (dampening, step, *_), batch in _alike(members).items():
        _step_all(rule, batch, dampening, step, _compiled(_dots), _compiled(_combine))


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, fullgraph=True, dynamic=True)


def _alike(members: Sequence[Member]) -> dict[Any, list[Rows]]:
    """Weights whose coefficients are computed together: after equally many steps, on one device."""
    found: dict[Any, list[Rows]] = defaultdict(list)
    for m in members:
        kinds = (m.moment is None, m.second is None, accumulation_dtype(m.weight.dtype), m.weight.device)
        found[m.dampening, float(m.step), *kinds].append(_rows(m))
    return found


def _step_all(
    rule: Rule,
    matrices: Sequence[Rows],
    dampening: float,
    step: float,
    dots: Callable[[Rows], Tensor],
    combine: Callable[[Rows, Tensor, Tensor | None], None],
) -> None:
    """Take the inner products of all matrices, find the coefficients of all their rows at once, and write."""
    sizes = [len(rows.weight) for rows in matrices]
    radius = _radii(matrices)
    products = torch.cat([dots(rows) for rows in matrices], 1).unsqueeze(-1).unbind()
    found = tangential_of(products, radius * radius, maximize=rule.maximize)
    second = _second(matrices)
    if second is not None and some(short := is_short(found)):
        found = found._replace(gg=torch.where(short, _measured(matrices, sizes, found, rule.maximize), found.gg))
    rule = replace(rule, lr=float(rule.lr))
    move = rule.coefficients(found, second, dampening=dampening, step=step)
    if second is not None:
        for whole, parts in zip(second, zip(*((r.second, r.largest) for r in matrices), strict=True), strict=True):
            if whole is not None:
                torch._foreach_copy_(list(parts), list(torch.split(whole, sizes)))
    square = (-radius if rule.maximize else radius) * radius
    columns = (move.ww, move.wb, move.wg * square, move.bw, move.bb, move.bg * square)
    factors = torch.cat([torch.as_tensor(x, dtype=found.ww.dtype).expand_as(found.ww) for x in columns], 1)
    far = torch.split(move.far, sizes) if some(move.far) else [None] * len(sizes)
    for rows, part, beyond in zip(matrices, torch.split(factors, sizes), far, strict=True):
        combine(rows, part, None if beyond is None or not some(beyond) else beyond)


def _dots(rows: Rows) -> Tensor:
    """Return the inner products of each row, in float32 or better, as rows of a matrix."""
    dtype = accumulation_dtype(rows.weight.dtype)
    w, g, b = (None if x is None else x.to(dtype) for x in (rows.weight, rows.gradient, rows.moment))
    return torch.stack([(x * y).sum(1) for x, y in pairs(w, g, b)])  # type: ignore[arg-type]


def _combine(rows: Rows, factors: Tensor, far: Tensor | None) -> None:
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


def _dots_in_blocks(rows: Rows) -> Tensor:
    return torch.cat([_dots(rows.between(*ends)) for ends in _blocks(rows)], 1)


def _combine_in_blocks(rows: Rows, factors: Tensor, far: Tensor | None) -> None:
    for start, end in _blocks(rows):
        _combine(rows.between(start, end), factors[start:end], None if far is None else far[start:end])


def _blocks(rows: Rows) -> Iterator[tuple[int, int]]:
    count, size = rows.weight.shape
    at_once = max(1, _BLOCK // size) if rows.weight.is_cpu else count
    return ((start, min(start + at_once, count)) for start in range(0, count, at_once))


def _radii(matrices: Sequence[Rows]) -> float | Tensor:
    radii = [rows.radius for rows in matrices]
    if all(radius == radii[0] for radius in radii if not isinstance(radius, Tensor)) and not any(
        isinstance(radius, Tensor) for radius in radii
    ):
        return radii[0]
    first = matrices[0].weight
    columns = [
        r if isinstance(r, Tensor) else first.new_full((len(rows.weight), 1), r)
        for rows, r in zip(matrices, radii, strict=True)
    ]
    return torch.cat([column.to(accumulation_dtype(first.dtype)) for column in columns])


def _second(matrices: Sequence[Rows]) -> tuple[Tensor, Tensor | None] | None:
    """Second moments of all rows, as copies."""
    both = [
        None if any(x is None for x in column) else torch.cat(column)
        for column in zip(*((rows.second, rows.largest) for rows in matrices), strict=True)
    ]
    return None if both[0] is None else (both[0], both[1])


def _measured(matrices: Sequence[Rows], sizes: list[int], found: Tangential, maximize: bool) -> Tensor:
    """Squared norms of the tangential gradients where digits were lost, and what was found elsewhere."""
    result = []
    for rows, short, slope, gg in zip(
        matrices, *(torch.split(x, sizes) for x in (is_short(found), found.g_slope, found.gg)), strict=True
    ):
        if not some(short):
            result.append(gg)
            continue
        for start, end in _blocks(rows):
            part = rows.between(start, end)
            weight, gradient = (x.to(gg.dtype) for x in (part.weight, part.gradient))
            known = found._replace(g_slope=slope[start:end])
            result.append(measured(weight, gradient, known, Spheres((1,), part.radius), maximize))
    return torch.cat(result)


@contextmanager
def _small_together(batch: Sequence[Rows]) -> Iterator[list[Rows]]:
    """Join small weights with groups of one size to matrices, and write back what became of them."""
    alike: dict[Any, list[Rows]] = defaultdict(list)
    matrices: list[Rows] = []
    for rows in batch:
        if rows.weight.numel() <= _SMALL:
            radius = rows.radius if isinstance(rows.radius, float) else None
            alike[rows.weight.shape[1], rows.weight.dtype, rows.gradient.dtype, radius].append(rows)
        else:
            matrices.append(rows)
    portions = [portion for found in alike.values() for portion in _portions(found)]
    joined = [_joined(portion) for portion in portions]
    yield [*matrices, *joined]
    for whole, portion in zip(joined, portions, strict=True):
        if len(portion) > 1:
            for name in ("weight", "moment", "second", "largest"):
                if getattr(whole, name) is not None:
                    parts = [getattr(rows, name) for rows in portion]
                    torch._foreach_copy_(parts, list(getattr(whole, name).split([len(part) for part in parts])))


def _joined(portion: Sequence[Rows]) -> Rows:
    if len(portion) == 1:
        return portion[0]
    return Rows(*(torch.cat(x) if isinstance(x[0], Tensor) else x[0] for x in zip(*portion, strict=True)))


def _rows(member: Member) -> Rows:
    layout, weight = layout_of(member.manifold), member.weight.detach()
    shape = (layout.rows, layout.size)

    def view(x: Tensor | None, columns: int = layout.size) -> Tensor | None:
        return None if x is None else x.detach().as_strided((layout.rows, columns), (columns, 1))

    gradient = member.gradient.detach()
    if gradient.stride() != weight.stride():
        gradient = torch.empty_like(weight, dtype=gradient.dtype).copy_(gradient)
    second, largest = member.second or (None, None)
    radius = member.manifold.radius_for(weight)
    if isinstance(radius, Tensor):
        radius = radius.reshape(-1, 1)
    return Rows(
        weight.as_strided(shape, (layout.size, 1)),
        gradient.as_strided(shape, (layout.size, 1)),
        *(view(member.moment), view(second, 1), view(largest, 1), radius),
    )


def _portions(batch: Sequence[Rows]) -> Iterator[list[Rows]]:
    portion: list[Rows] = []
    entries = 0
    for rows in batch:
        if portion and entries + rows.weight.numel() > _BLOCK:
            yield portion
            portion, entries = [], 0
        portion.append(rows)
        entries += rows.weight.numel()
    yield portion
