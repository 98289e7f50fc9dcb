"""Steps by torch's operations on matrices whose rows are groups: blocks that stay in cache, and many weights at once.

Where the direction of a step is its moment, `manifold_nets.optim.executions.along_moment` takes it operation by
operation. Elsewhere the inner products of all weights come first, then the coefficients of all their groups at once,
then the writing. Large weights are passed in blocks of rows, so that what the operations leave between them stays in
cache and takes little memory; small weights are stepped together. Compiled, one kernel takes the inner products of a
weight of any size, and one writes: with the coefficients between them in one kernel, torch's compiler computes square
roots and quotients anew for every few entries. `manifold_nets.optim.executions.passes` says what the two do.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from manifold_nets.groups import accumulation_dtype
from manifold_nets.optim.executions import passes
from manifold_nets.optim.executions.along_moment import follows_moment, step_along_moment
from manifold_nets.optim.executions.rows import (
    Rows,
    blocks_of,
    keep_second_moments,
    portions,
    radii,
    rows_of,
    second_moments,
    sharpened,
)
from manifold_nets.optim.rules.coefficients import Coefficients
from manifold_nets.optim.rules.members import Member, Rule
from manifold_nets.optim.rules.products import some, tangential_of

__all__ = ["run_batched", "run_compiled"]

# Weights of at most so many entries are stepped together, up to a block at once.
_SMALL = 2**15
# A smaller share of the old moment would make the gradient's share of it too large a number.
_LEAST_KEPT = 2**-6


def run_batched(rule: Rule, members: Sequence[Member]) -> None:
    """Step weights that `suits_rows` by torch's operations, large ones in blocks and small ones together."""
    for (dampening, step, *_), batch in _alike(members).items():
        if follows_moment(rule, batch[0]):
            step_along_moment(rule, batch, dampening, step)
            continue
        with _small_together(batch) as matrices:
            found = torch.cat([passes.dots(block) for rows in matrices for block in blocks_of(rows)], 1)
            move = _coefficients(rule, matrices, found, dampening, step)
            _write(matrices, move, _combine_in_blocks)


def run_compiled(rule: Rule, members: Sequence[Member]) -> None:
    """Step weights that `suits_rows` by two kernels that torch compiles for matrices of any size."""
    for (dampening, step, *_), batch in _alike(members).items():
        if follows_moment(rule, batch[0]) and rule.keep >= _LEAST_KEPT:
            adam = batch[0].second is not None
            taken = (1 - rule.keep if adam else 1 - dampening) / rule.keep
            advance = functools.partial(
                _compiled(passes.advance), share=-taken if rule.maximize else taken, with_gradient=adam
            )
            found = torch.cat([advance(rows) for rows in batch], 1)
            # All of the gradient is in the moment now.
            _write(batch, _coefficients(rule, batch, found, 1.0, step), _compiled(passes.combine_two))
        else:
            found = torch.cat([_compiled(passes.dots)(rows) for rows in batch], 1)
            _write(batch, _coefficients(rule, batch, found, dampening, step), _compiled(passes.combine))


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, fullgraph=True, dynamic=True)


def _alike(members: Sequence[Member]) -> dict[Any, list[Rows]]:
    """Weights whose coefficients are computed together: after equally many steps, on one device."""
    found: dict[Any, list[Rows]] = defaultdict(list)
    for m in members:
        rows = rows_of(m)
        kinds = (m.moment is None, m.second is None, accumulation_dtype(m.weight.dtype), m.weight.device)
        found[m.dampening, float(m.step), *kinds, rows.is_precise].append(rows)
    return found


def _coefficients(
    rule: Rule, matrices: Sequence[Rows], products: Tensor, dampening: float, step: float
) -> Coefficients:
    """Return what to write to all rows, in their own units, and update the second moments."""
    radius, second = radii(matrices), second_moments(matrices)
    found = tangential_of(products.unsqueeze(-1).unbind(), radius * radius, maximize=rule.maximize)
    if second is not None:
        found = sharpened(found, matrices, maximize=rule.maximize)
    move = replace(rule, lr=float(rule.lr)).coefficients(found, second, dampening=dampening, step=step)
    if second is not None:
        keep_second_moments(matrices, second)
    square = (-radius if rule.maximize else radius) * radius
    return move._replace(wg=move.wg * square, bg=move.bg * square)


def _write(
    matrices: Sequence[Rows], move: Coefficients, combine: Callable[[Rows, Tensor, Tensor | None], None]
) -> None:
    sizes = [len(rows.weight) for rows in matrices]
    *columns, far = move
    dtype = accumulation_dtype(matrices[0].weight.dtype)
    factors = torch.cat([torch.as_tensor(x, dtype=dtype).expand_as(far) for x in columns], 1)
    parts = torch.split(far, sizes) if some(far) else [None] * len(sizes)
    for rows, part, beyond in zip(matrices, torch.split(factors, sizes), parts, strict=True):
        combine(rows, part, None if beyond is None or not some(beyond) else beyond)


def _combine_in_blocks(rows: Rows, factors: Tensor, far: Tensor | None) -> None:
    start = 0
    for block in blocks_of(rows):
        end = start + len(block.weight)
        passes.combine(block, factors[start:end], None if far is None else far[start:end])
        start = end


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
    together = [portion for found in alike.values() for portion in portions(found)]
    joined = [_joined(portion) for portion in together]
    yield [*matrices, *joined]
    for whole, portion in zip(joined, together, strict=True):
        if len(portion) > 1:
            for name in ("weight", "moment", "second", "largest"):
                if getattr(whole, name) is not None:
                    parts = [getattr(rows, name) for rows in portion]
                    torch._foreach_copy_(parts, list(getattr(whole, name).split([len(part) for part in parts])))


def _joined(portion: Sequence[Rows]) -> Rows:
    if len(portion) == 1:
        return portion[0]
    return Rows(*(torch.cat(x) if isinstance(x[0], Tensor) else x[0] for x in zip(*portion, strict=True)))
