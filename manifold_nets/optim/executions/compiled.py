"""Steps by a kernel that torch compiles for matrices of any size: inner products, coefficients and writing in one.

The coefficients are an output of the kernel: what is written to memory is computed once a row, where the compiler would
else compute square roots and quotients anew for every few entries. Where the direction is the moment itself, the moment
``b`` and the gradient enter as ``q = b + c g``, with ``c`` chosen so that the new moment is μ times that: fewer inner
products then say the same, as the tangential part of a sum is the sum of the tangential parts.

Rows for which that is not exact (steps of more than a radian; tangential gradients of which digits were lost) are left
as they are by the kernel, and stepped by the reference.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from manifold_nets.groups import accumulation_dtype
from manifold_nets.optim.executions.rows import Rows, blocks_of
from manifold_nets.optim.rules.members import Rule
from manifold_nets.optim.rules.products import Spheres, is_short, pairs, some, tangential, tangential_of
from manifold_nets.optim.rules.updates import write_

__all__ = ["step_compiled"]

# Entries that a call of the kernel takes on a CPU: more stay in no cache between its two passes, fewer cost more calls.
_BLOCK = 2**20
# A smaller share of the old moment would make the gradient's share of it too large a number.
_LEAST_KEPT = 2**-6


@dataclass(frozen=True)
class _Kind:
    """What a kernel is compiled for; all else it gets as tensors.

    Attributes:
        rule: ``"sgd"`` or ``"adam"``.
        nesterov: whether to look ahead.
        maximize: whether to ascend.
        mixes: whether the gradient enters with the moment, as one matrix.
    """

    rule: str
    nesterov: bool
    maximize: bool
    mixes: bool


def step_compiled(rule: Rule, matrices: Sequence[Rows], dampening: float, step: float) -> None:
    """Take one step of all rows, in place, after equally many steps and on one device."""
    first = matrices[0]
    kind = _Kind(rule.kind, rule.nesterov, rule.maximize, _mixes(rule, first))
    kernel, dtype = _kernel(kind), accumulation_dtype(first.weight.dtype)
    values = (rule.lr, rule.keep, dampening, rule.beta2, rule.eps, step)
    # In float64, as 1 − β₂ has to be exact; but for devices that have none.
    precise = torch.float32 if first.weight.device.type == "mps" else torch.float64
    numbers = torch.tensor([float(value) for value in values], dtype=precise, device=first.weight.device)
    share = (1 - rule.keep if rule.kind == "adam" else 1 - dampening) / rule.keep if kind.mixes else 1.0
    share = -share if rule.maximize else share
    uniform: dict[float, tuple[Tensor, Tensor]] = {}
    left = []
    for rows in matrices:
        for block in blocks_of(rows, _BLOCK):
            radius = block.radius
            if isinstance(radius, Tensor):
                columns = _radius_and_share(radius.to(dtype), share)
            elif radius in uniform:
                columns = uniform[radius]
            else:
                columns = uniform[radius] = _radius_and_share(numbers.new_full((1, 1), radius, dtype=dtype), share)
            left.append((block, kernel(*map(_apart, block[:5]), *columns, numbers)[:, -1]))
    if some(torch.cat([flags for _, flags in left]) != 0):
        for block, flags in left:
            _step_left(kind, replace(rule, lr=float(rule.lr)), block, flags.nonzero().squeeze(1), dampening, step)


def _mixes(rule: Rule, rows: Rows) -> bool:
    return rows.moment is not None and not rule.nesterov and rule.keep >= _LEAST_KEPT


def _radius_and_share(radius: Tensor, share: float) -> tuple[Tensor, Tensor]:
    return radius, radius * radius * share


def _apart(x: Tensor | None) -> Tensor | None:
    """A tensor on the same memory that is a view of no other: what a view is of would be compiled for as well."""
    return None if x is None else x.new_empty(0).set_(x.untyped_storage(), x.storage_offset(), x.shape, x.stride())


@functools.cache
def _kernel(kind: _Kind) -> Callable[..., Tensor]:
    # Each kernel counts by itself the variants of dtypes and of single rows that it is compiled for.
    limits: dict[str, Any] = {"recompile_limit": 64, "isolate_recompiles": True}
    return cast(
        "Callable[..., Tensor]", torch.compile(functools.partial(_step, kind), fullgraph=True, dynamic=True, **limits)
    )


def _step(
    kind: _Kind,
    weight: Tensor,
    gradient: Tensor,
    moment: Tensor | None,
    second: Tensor | None,
    largest: Tensor | None,
    radius: Tensor,
    share: Tensor,
    numbers: Tensor,
) -> Tensor:
    """Step the rows, in place, and return the coefficients and, as last column, where a row was left as it is.

    The share is ± r² times what the gradient counts for beside the moment.
    """
    dtype = accumulation_dtype(weight.dtype)
    w, g, b = weight.to(dtype), gradient.to(dtype), None
    if moment is not None:
        b = moment.to(dtype)
        b = b + g * share if kind.mixes else b
    states = None if second is None else (second.clone(), None if largest is None else largest.clone())
    columns = _columns(kind, w, g, b, states, radius, share, numbers)
    ww, wb, bw, bb, *more = torch.split(columns, 1, 1)
    new, turned = w * ww, w * bw
    if b is not None:
        new, turned = new + b * wb, turned + b * bb
    if not kind.mixes:
        new, turned = new + g * more[0], turned + g * more[1]
    weight.copy_(new)
    if moment is not None:
        moment.copy_(turned)
    for old, state in zip((second, largest), states or (), strict=False):
        if old is not None and state is not None:
            old.copy_(torch.where(more[-1] != 0, old, state))
    return columns


def _columns(
    kind: _Kind,
    w: Tensor,
    g: Tensor,
    b: Tensor | None,
    states: tuple[Tensor, Tensor | None] | None,
    radius: Tensor,
    share: Tensor,
    numbers: Tensor,
) -> Tensor:
    """Return what each row is multiplied by, and update the second moments; what is left is written as it is."""
    lr, keep, dampening, *rest, step = numbers.unbind()
    dots = [(x * y).sum(1, keepdim=True) for x, y in pairs(w, g, b)]
    if kind.mixes:
        # The direction has no need of the gradient's products any more; Adam's second moment has of two.
        zero = torch.zeros_like(dots[0])
        dots = [dots[0], *(dots[1:3] if states is not None else (zero, zero)), dots[3], zero, dots[5]]
    found = tangential_of(dots, radius * radius, maximize=kind.maximize)
    options: Any = (kind.rule, lr, 0.0 if b is None else keep, kind.nesterov, kind.maximize, *rest)
    move = Rule(*options).coefficients(found, states, dampening=1.0 if kind.mixes else dampening, step=step)
    left = move.far if states is None else move.far | is_short(found)
    # 1 w + 0 b + 0 g, and so on.
    terms = [(move.ww, 1.0), (move.wb, 0.0), (move.bw, 0.0), (move.bb, 1.0)]
    terms += [] if kind.mixes else [(move.wg * share, 0.0), (move.bg * share, 0.0)]
    kept = [torch.where(left, as_it_is, torch.as_tensor(x)).to(w.dtype) for x, as_it_is in terms]
    return torch.cat([*kept, left.to(w.dtype)], 1)


def _step_left(kind: _Kind, rule: Rule, rows: Rows, which: Tensor, dampening: float, step: float) -> None:
    """Step rows that the kernel has left, by the reference; with their moments, where that was so, mixed already."""
    dtype = accumulation_dtype(rows.weight.dtype)
    radius = rows.radius[which] if isinstance(rows.radius, Tensor) else rows.radius
    spheres = Spheres((1,), radius)
    w, g = rows.weight[which].to(dtype), rows.gradient[which].to(dtype)
    b, second, largest = (None if x is None else x[which].to(dtype) for x in rows[2:5])
    states = None if second is None else (second, largest)
    found = tangential(w, g, b, spheres, maximize=rule.maximize, sharp=states is not None)
    move = rule.coefficients(found, states, dampening=1.0 if kind.mixes else dampening, step=step)
    write_(w, g, b, spheres, move, maximize=rule.maximize)
    for old, new in zip((rows.weight, *rows[2:5]), (w, b, second, largest), strict=True):
        if old is not None and new is not None:
            old[which] = new.to(old.dtype)
