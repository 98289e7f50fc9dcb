"""Steps by a kernel that torch compiles for matrices of any size: inner products, coefficients and writing in one.

On a CPU the kernel has one loop over the rows, so that the second pass over a row finds it in cache. For that the
coefficients of a row must be numbers that the compiler writes down, and no more than one row's at once: they are
outputs of the kernel, and whether a row was left as it is is an integer of two bytes, which torch's compiler does not
put into vectors with those of other rows. Where the direction is the moment itself, the moment ``b`` and the gradient
enter as ``q = b + c g``, with ``c`` chosen so that the new moment is μ times that: fewer inner products then say the
same, as the tangential part of a sum is the sum of the tangential parts.

Rows for which that is not exact (steps of more than a radian; tangential gradients of which digits were lost) are left
as they are by the kernel, and stepped by the reference. On an accelerator the host would have to wait for the answer
which these are; there the kernel is the reference itself, and measures in all rows what is otherwise measured in these.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from manifold_nets.groups import accumulation_dtype
from manifold_nets.optim.backends.products import (
    GroupView,
    Scalar,
    TangentProducts,
    is_short,
    tangential,
    tangential_of,
)
from manifold_nets.optim.backends.reference import step_, write_
from manifold_nets.optim.backends.rule import (
    Coefficients,
    Rule,
    adam_factor,
    adam_update,
    bias_corrections,
    normalized_step,
    sgd_update,
)

__all__ = ["step_compiled"]

# Up to this many entries of a row are added in sequence, lane by lane; that is exact to a few machine epsilons.
_IN_SEQUENCE = 2**13
# What kernels are compiled with: sizes that are worth threads, and of which none can be taken for another.
_SHAPE, _LONG_SHAPE = (1031, 1021), (131, _IN_SEQUENCE + 3)
# Tensors of more entries are indexed otherwise by kernels on accelerators.
_WIDE = 2**31 - 1
# A dtype of flags that torch's compiler puts into no vectors.
_FLAG = torch.int16
# A smaller share of the old moment would make the gradient's share of it too large a number.
_LEAST_KEPT = 2**-6


class _Kind(NamedTuple):
    """What a step is compiled for; all else it gets as tensors.

    Attributes:
        rule: ``"sgd"`` or ``"adam"``.
        nesterov: whether to look ahead.
        maximize: whether to ascend.
        mixes: whether the gradient enters with the moment, as one matrix.
        complete: whether no row is left.
        threads: whether there are several, for a CPU.
    """

    rule: str
    nesterov: bool
    maximize: bool
    mixes: bool
    complete: bool
    threads: bool


class _Form(NamedTuple):
    """What else of matrices makes another kernel; beyond that, one takes all sizes."""

    dtypes: tuple[torch.dtype | None, ...]
    compute: torch.dtype
    device: torch.device
    one_row: bool
    one_entry: bool
    long: bool
    wide: bool
    one_radius: bool


def step_compiled(rule: Rule, matrices: Sequence[GroupView], dampening: float, step: float) -> None:
    """Take one step of all rows, in place, after equally many steps and on one device."""
    first = matrices[0]
    device, dtype = first.weight.device, accumulation_dtype(first.weight.dtype)
    complete = _completes(device)
    mixes = not complete and first.moment is not None and not rule.nesterov and rule.beta1 >= _LEAST_KEPT
    kind = _Kind(rule.kind, rule.nesterov, rule.maximize, mixes, complete, torch.get_num_threads() > 1)
    is_adam = rule.kind == "adam"
    corrections = bias_corrections(rule.beta1, rule.beta2, step) if is_adam else (1.0, 1.0)
    share = (1 - rule.beta1 if is_adam else 1 - dampening) / rule.beta1 if mixes else 1.0
    share = -share if rule.maximize else share
    values = (rule.lr, rule.beta1, dampening, rule.beta2, rule.eps, *corrections, share)
    numbers = torch.tensor([float(value) for value in values], dtype=_precise(device), device=device)
    uniform: dict[float, Tensor] = {}
    flags: list[Tensor] = []
    for rows in matrices:
        radius = rows.radius
        if not isinstance(radius, Tensor):
            if radius not in uniform:
                uniform[radius] = numbers.new_full((1, 1), radius, dtype=dtype)
            radius = uniform[radius]
        flags += _kernel(kind, _form_of(rows, dtype, device))(*rows[:5], radius.to(dtype), numbers)[-1:]
    if complete:
        return
    # For the reference a rate is a number.
    rule = replace(rule, lr=float(rule.lr))
    for rows, which in _left(matrices, flags):
        _step_left(rule, rows, which, dampening, step)


def _completes(device: torch.device) -> bool:
    return device.type != "cpu"


def _left(matrices: Sequence[GroupView], flags: Sequence[Tensor]) -> Iterator[tuple[GroupView, Tensor]]:
    """Yield the matrices of which rows were left, and these rows."""
    left = torch.cat(list(flags)).view(-1).nonzero().squeeze(1)
    if len(left) == 0:
        return
    ends = torch.tensor(list(itertools.accumulate(map(len, flags))), device=left.device)
    counts = torch.bincount(torch.searchsorted(ends, left, right=True), minlength=len(flags)).tolist()
    for rows, flag, end, which in zip(matrices, flags, ends.tolist(), torch.split(left, counts), strict=True):
        if len(which) > 0:
            yield rows, which - (end - len(flag))


def _precise(device: torch.device) -> torch.dtype:
    """Of options: float64, as 1 − β₂ has to be exact; but for devices that have none."""
    return torch.float32 if device.type == "mps" else torch.float64


def _form_of(rows: GroupView, compute: torch.dtype, device: torch.device) -> _Form:
    count, size = rows.weight.shape
    dtypes = tuple(None if x is None else x.dtype for x in rows[:5])
    one_radius = not isinstance(rows.radius, Tensor) or rows.radius.shape[0] == 1
    long, wide = size > _IN_SEQUENCE, count * size > _WIDE
    return _Form(dtypes, compute, device, count == 1, size == 1, long, wide, one_radius)


@functools.cache
def _kernel(kind: _Kind, form: _Form) -> Callable[..., Sequence[Tensor]]:
    """Compile a step for matrices of a form.

    The kernel is taken as torch compiles it ahead of time: torch would else ask before every call whether it is still
    right, for longer than a small weight's step takes. What it asks is what a form says.
    """

    def step(*arguments: Any) -> Sequence[Tensor]:
        return _step(kind, GroupView(*arguments[:6]), arguments[6])

    compiled: Any = torch.compile(step, fullgraph=True, dynamic=True)
    try:
        if not form.wide:
            ahead = compiled.aot_compile((_examples(form), {}))
            ahead.disable_guard_check()
            return cast("Callable[..., Sequence[Tensor]]", ahead)
    except (AttributeError, RuntimeError, TypeError):
        pass  # torch cannot, or may keep no compiled code
    # Each kernel counts by itself the variants of sizes that it is compiled for.
    limits: dict[str, Any] = {"recompile_limit": 64, "isolate_recompiles": True}
    guarded: Any = torch.compile(step, fullgraph=True, dynamic=True, **limits)

    def on_no_views(*arguments: Tensor | None) -> Sequence[Tensor]:
        # What a view is of would be compiled for as well; as `.data` a tensor is a view of none.
        return cast("Sequence[Tensor]", guarded(*(None if x is None else x.data for x in arguments)))

    return on_no_views


def _examples(form: _Form) -> tuple[Tensor | None, ...]:
    """Return arguments of a step by which a kernel for all matrices of a form is compiled."""
    rows, size = _LONG_SHAPE if form.long else _SHAPE
    rows, size = 1 if form.one_row else rows, 1 if form.one_entry else size
    columns = (size, size, size, 1, 1)
    matrices = [
        None if dtype is None else torch.ones(rows, width, dtype=dtype, device=form.device)
        for width, dtype in zip(columns, form.dtypes, strict=True)
    ]
    radius = torch.ones(1 if form.one_radius else rows, 1, dtype=form.compute, device=form.device)
    return (*matrices, radius, torch.ones(8, dtype=_precise(form.device), device=form.device))


def _step(kind: _Kind, rows: GroupView, numbers: Tensor) -> list[Tensor]:
    """Step the rows, in place, and return the coefficients and, at last, where a row was left as it is."""
    wide = rows.wide()
    # ± r² times what the gradient counts for beside the moment.
    share = rows.radius * rows.radius * numbers[7]
    if kind.complete:
        # By the reference, which measures everywhere where a graph cannot ask.
        found, exact = tangential(wide, maximize=kind.maximize, sharp=rows.second is not None)
        write_(exact, _move(kind, found, wide, numbers), maximize=kind.maximize)
        rows.write(wide)
        return []
    w, g, b = wide[:3]
    mixed = b + g * share if b is not None and kind.mixes else b
    second, largest = (None if x is None else x.clone() for x in rows[3:5])
    wide = wide._replace(moment=mixed, second=second, largest=largest)
    *factors, left = _factors(kind, wide, share, numbers)
    ww, wb, wg, bw, bb, bg = factors
    new, turned = w * ww + g * wg, w * bw + g * bg
    if b is not None:
        new, turned = new + b * wb, turned + b * bb
    rows.write(rows._replace(weight=new, moment=turned))
    for old, state in ((rows.second, second), (rows.largest, largest)):
        if old is not None and state is not None:
            old.copy_(torch.where(left != 0, old, state))
    return [*factors, left]


def _factors(kind: _Kind, rows: GroupView, share: Scalar, numbers: Tensor) -> list[Tensor]:
    """Return what each row is multiplied by, and update the second moments; what is left is written as it is."""
    found = _tangential(kind, rows)
    move = _move(kind, found, rows, numbers)
    left = move.far if rows.second is None else move.far | is_short(found)
    # A gradient that is in the moment is written with it.
    wg, bg = (move.wb, move.bb) if kind.mixes else (move.wg, move.bg)
    # 1 w + 0 b + 0 g, and so on.
    terms = [(move.ww, 1.0), (move.wb, 0.0), (wg * share, 0.0), (move.bw, 0.0), (move.bb, 1.0), (bg * share, 0.0)]
    kept = [torch.where(left, as_it_is, torch.as_tensor(x, device=left.device)) for x, as_it_is in terms]
    return [*(x.to(rows.weight.dtype) for x in kept), left.to(_FLAG)]


def _tangential(kind: _Kind, rows: GroupView) -> TangentProducts:
    """Take the inner products that are needed: of a gradient that is in the moment, Adam's second moment's alone."""
    w, _, b = rows[:3]
    if not kind.mixes or b is None:
        return tangential_of(rows.products(), rows.radius, maximize=kind.maximize)
    products = list(rows.dots((w, w)) if rows.second is None else rows._replace(moment=None).products())
    products += [torch.zeros_like(products[0])] * (3 - len(products))
    found = tangential_of(products, rows.radius, maximize=kind.maximize)
    wb, total = (x / (rows.radius * rows.radius) for x in rows.dots((w, b), (b, b)))
    slope = wb / found.ww
    return found._replace(b_slope=slope, bb=total - slope * wb, b_total=total)


def _move(kind: _Kind, found: TangentProducts, rows: GroupView, numbers: Tensor) -> Coefficients:
    """Return what to write, of options that are tensors, and update the second moments."""
    lr, beta1, dampening, beta2, eps, *corrections = numbers[:7].unbind()
    # What a gradient counts for beside the moment may be in it already.
    apart: Any = 1.0 if kind.mixes else dampening
    if rows.second is None:
        momentum: Any = 0.0 if rows.moment is None else beta1
        return normalized_step(found, sgd_update(momentum, apart, nesterov=kind.nesterov), lr)
    options: Any = {"beta2": beta2, "eps": eps, "corrections": corrections}
    factor = adam_factor(found.gg, rows.second, rows.largest, **options)
    return normalized_step(found, adam_update(beta1, factor, 1 - apart), lr)


def _step_left(rule: Rule, rows: GroupView, which: Tensor, dampening: float, step: float) -> None:
    """Step rows that the kernel has left as they were, by the reference."""
    left = rows.of_groups(which)
    wide = left.wide()
    step_(rule, wide, dampening=dampening, step=step)
    left.write(wide)
    for old, new in zip(rows[:5], left[:5], strict=True):
        if isinstance(old, Tensor) and isinstance(new, Tensor) and old is not rows.gradient:
            old[which] = new
