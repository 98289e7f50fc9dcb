"""Steps by torch's operations on matrices whose rows are groups: chunks that stay in cache, small weights together.

Where the direction of a step is its moment, `manifold_nets.optim.backends.momentum_step` takes it operation by
operation. Elsewhere the inner products of all weights come first, then the coefficients of all their groups at once,
then the writing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from manifold_nets.groups import accumulation_dtype
from manifold_nets.optim.backends.compiled import step_compiled
from manifold_nets.optim.backends.inputs import Batch, mark_written
from manifold_nets.optim.backends.momentum_step import step_along_moment
from manifold_nets.optim.backends.products import GroupView, some
from manifold_nets.optim.backends.reference import combine_
from manifold_nets.optim.backends.rule import Coefficients, Rule, StepInput
from manifold_nets.optim.backends.views import rows_of, small_together, what_to_write

__all__ = ["run_batched", "run_compiled"]

# Entries of a chunk where all that a step reads may have to be copied to float32.
_COPIED = 2**18


def run_batched(rule: Rule, members: Batch) -> None:
    """Step weights that `suits_rows` by torch's operations, large ones in chunks and small ones together."""
    for (*_, is_precise), alike in members.alike(_kind):
        batch, dampening, step = [rows_of(m) for m in alike], alike[0].dampening, alike[0].step
        if is_precise and rule.follows_moment:
            step_along_moment(rule, batch, dampening, step)
            continue
        with small_together(batch) as matrices:
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
    chunks = (chunk.wide() for rows in matrices for chunk in rows.chunks(_COPIED))
    products = torch.cat([torch.cat(chunk.products(), 1) for chunk in chunks]).t()
    matrices, factors, far, carried = what_to_write(rule, matrices, products, dampening, step)
    is_far, start = some(far), 0
    for chunk in (chunk for rows in matrices for chunk in rows.chunks(_COPIED)):
        end = start + len(chunk.weight)
        beyond, wide = far[start:end], chunk.wide()
        ww, wb, wg, bw, bb, bg = torch.split(factors[start:end], 1, 1)
        move = Coefficients(ww, wb, wg, bw, bb, bg, beyond, carried)
        combine_(wide, move, beyond if is_far and some(beyond) else None)
        chunk.write(wide)
        start = end
