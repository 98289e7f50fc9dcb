"""Steps by torch's operations on matrices whose rows are groups: chunks that stay in cache, and many weights at once.

Where the direction of a step is its moment, `manifold_nets.optim.backends.momentum_step` takes it operation by
operation. Elsewhere the inner products of all weights come first, then the coefficients of all their groups at once,
then the writing. Large weights are passed in chunks of rows, so that what the operations leave between them stays in
cache and takes little memory; small weights are stepped together.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from manifold_nets.groups import accumulation_dtype
from manifold_nets.optim.backends.compiled import step_compiled
from manifold_nets.optim.backends.inputs import Batch, mark_written
from manifold_nets.optim.backends.momentum_step import follows_moment, step_along_moment
from manifold_nets.optim.backends.products import Scalar, Spheres, some
from manifold_nets.optim.backends.reference import combine_
from manifold_nets.optim.backends.rule import Coefficients, Rule, StepInput
from manifold_nets.optim.backends.views import (
    GroupView,
    dots_of,
    portions,
    rows_of,
    what_to_write,
    without_radial_parts,
)

__all__ = ["run_batched", "run_compiled"]

# Weights of at most this many entries are stepped together, up to a chunk at once.
_SMALL = 2**15
# Entries of a chunk where all that a step reads may have to be copied to float32.
_COPIED = 2**18


def run_batched(rule: Rule, members: Batch) -> None:
    """Step weights that `suits_rows` by torch's operations, large ones in chunks and small ones together."""
    for (*_, is_precise), alike in members.alike(_kind):
        batch, dampening, step = [rows_of(m) for m in alike], alike[0].dampening, alike[0].step
        if is_precise and follows_moment(rule):
            step_along_moment(rule, batch, dampening, step)
            continue
        with _small_together(batch) as matrices:
            _step_all(rule, matrices, dampening, step)


def run_compiled(rule: Rule, members: Batch) -> None:
    """Step weights that `suits_rows` by a kernel that torch compiles for matrices of any size."""
    for _, alike in members.alike(_kind):
        step_compiled(rule, [rows_of(m) for m in alike], alike[0].dampening, alike[0].step)
    mark_written(members)


def _kind(m: StepInput) -> tuple[Any, ...]:
    """What weights have in common whose coefficients are computed together; whether none has to be cast, at last."""
    compute = accumulation_dtype(m.weight.dtype)
    is_precise = m.moment is not None and m.moment.dtype == m.weight.dtype == m.gradient.dtype == compute
    return m.dampening, m.step, m.moment is None, m.second is None, compute, m.weight.device, is_precise


def _step_all(rule: Rule, matrices: Sequence[GroupView], dampening: float, step: float) -> None:
    """Take the inner products of all matrices, find the coefficients of all their rows at once, and write."""
    taken: Scalar = 0.0
    products = torch.cat([dots_of(chunk) for rows in matrices for chunk in rows.chunks(_COPIED)], 1)
    if rule.needs_lengths:
        matrices, products, taken = without_radial_parts(matrices, products)
    factors, far, carried = what_to_write(rule, matrices, products, taken, dampening, step)
    is_far, start = some(far), 0
    for rows in matrices:
        for chunk in rows.chunks(_COPIED):
            end = start + len(chunk.weight)
            beyond = far[start:end] if is_far else None
            _combine(chunk, factors[start:end], None if beyond is None or not some(beyond) else beyond, carried=carried)
            start = end


def _combine(rows: GroupView, factors: Tensor, far: Tensor | None, *, carried: bool) -> None:
    """Write the linear combinations of each row, computed in float32 or better and rounded once."""
    wide = rows.wide()
    ww, wb, wg, bw, bb, bg = torch.split(factors, 1, 1)
    beyond = torch.zeros_like(ww, dtype=torch.bool) if far is None else far
    move = Coefficients(ww, wb, wg, bw, bb, bg, beyond, carried)
    combine_(wide, Spheres((1,), rows.radius), move, far)
    rows.write(wide)


@contextmanager
def _small_together(batch: Sequence[GroupView]) -> Iterator[list[GroupView]]:
    """Join small weights with groups of one size to matrices, and write back what became of them."""
    alike: dict[Any, list[GroupView]] = defaultdict(list)
    matrices: list[GroupView] = []
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


def _joined(portion: Sequence[GroupView]) -> GroupView:
    if len(portion) == 1:
        return portion[0]
    return GroupView(*(torch.cat(x) if isinstance(x[0], Tensor) else x[0] for x in zip(*portion, strict=True)))
