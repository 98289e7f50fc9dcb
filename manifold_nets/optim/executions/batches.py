"""Steps by torch's operations on matrices whose rows are groups: blocks that stay in cache, and many weights at once.

A large weight is stepped in blocks of rows, so that what the operations leave between them stays in cache and takes
little memory; small weights with groups of one size are stepped as one matrix. Compiled, one kernel with sizes of any
value serves all weights of a dtype.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from manifold_nets.groups import accumulation_dtype
from manifold_nets.optim.executions.layouts import layout_of
from manifold_nets.optim.rules.members import Member, Rule
from manifold_nets.optim.rules.products import Spheres

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
    batches: dict[Any, list[Rows]] = defaultdict(list)
    for member in members:
        rows = _rows(member)
        if rows.weight.numel() <= _SMALL:
            batches[_kind(member)].append(rows)
            continue
        at_once = max(1, _BLOCK // rows.weight.shape[1]) if rows.weight.is_cpu else rows.weight.shape[0]
        for start in range(0, rows.weight.shape[0], at_once):
            _step_wide(rule, rows.between(start, start + at_once), member.dampening, member.step)
    for (dampening, step, *_), batch in batches.items():
        for part in _portions(batch):
            _step_together(rule, part, dampening, step)


def run_compiled(rule: Rule, members: Sequence[Member]) -> None:
    """Step weights that `suits_rows` by one kernel that torch compiles for matrices of any size."""
    lr = torch.as_tensor(rule.lr, dtype=torch.float64)
    for member in members:
        rows = _rows(member)
        if not isinstance(rows.radius, Tensor):
            dtype = accumulation_dtype(rows.weight.dtype)
            # A number would be a constant of the compiled kernel.
            rows = rows._replace(radius=rows.weight.new_full((len(rows.weight), 1), rows.radius, dtype=dtype))
        for x in rows:
            for axis in range(2):
                if isinstance(x, Tensor) and x.shape[axis] > 1:
                    torch._dynamo.maybe_mark_dynamic(x, axis)
        scalars = (torch.as_tensor(x, dtype=torch.float64) for x in (member.dampening, member.step))
        _compiled()(replace(rule, lr=lr), rows, *scalars)


@functools.cache
def _compiled() -> Callable[..., None]:
    return torch.compile(_step_wide, fullgraph=True)


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


def _step_wide(rule: Rule, rows: Rows, dampening: float | Tensor, step: float | Tensor) -> None:
    """Step rows in float32 or better, and round the results once."""
    dtype = accumulation_dtype(rows.weight.dtype)
    weight, gradient = rows.weight.to(dtype), rows.gradient.to(dtype)
    moment = None if rows.moment is None else rows.moment.to(dtype)
    second = None if rows.second is None else (rows.second, rows.largest)
    rule.update_(weight, gradient, moment, second, Spheres((1,), rows.radius), dampening=dampening, step=step)
    if weight is not rows.weight:
        rows.weight.copy_(weight)
    if moment is not None and rows.moment is not None and moment is not rows.moment:
        rows.moment.copy_(moment)


def _kind(member: Member) -> tuple[Any, ...]:
    """What weights that are stepped together have in common."""
    radius = member.manifold.uniform_radius
    return (
        *(member.dampening, float(member.step), radius, layout_of(member.manifold).size),
        *(member.weight.dtype, member.weight.device, member.gradient.dtype),
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


def _step_together(rule: Rule, batch: Sequence[Rows], dampening: float, step: float) -> None:
    if len(batch) == 1:
        _step_wide(rule, batch[0], dampening, step)
        return
    columns = [torch.cat(parts) if isinstance(parts[0], Tensor) else parts[0] for parts in zip(*batch, strict=True)]
    joined = Rows(*columns)
    _step_wide(rule, joined, dampening, step)
    for whole, parts in zip(joined, zip(*batch, strict=True), strict=True):
        if isinstance(whole, Tensor) and whole is not joined.gradient and whole is not joined.radius:
            torch._foreach_copy_(list(parts), list(torch.split(whole, [len(part) for part in parts])))
