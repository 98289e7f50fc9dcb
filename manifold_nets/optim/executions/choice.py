"""The executions of a step: one weight after the other, in batches, compiled by torch, or by the kernel in C.

All take the same step, to rounding. `choose` picks one, as torch's optimizers do among theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from manifold_nets.errors import NativeKernelError
from manifold_nets.gathered import is_sharded, local_part
from manifold_nets.optim.executions import native
from manifold_nets.optim.executions.batches import run_batched, run_compiled
from manifold_nets.optim.executions.layouts import layout_of
from manifold_nets.optim.executions.pieces import pieces
from manifold_nets.optim.executions.rows import suits_rows
from manifold_nets.optim.executions.sharding import part_of
from manifold_nets.optim.executions.workspace import Workspace
from manifold_nets.optim.rules.coefficients import bias_corrections
from manifold_nets.optim.rules.members import Member, Rule

__all__ = ["run", "run_native", "run_single", "suits_native"]

# Entries that are worth a thread: a quarter of a millisecond's work.
_PER_THREAD = 2**18


def run(
    rule: Rule, members: Sequence[Member], *, foreach: bool | None, fused: bool | None, compiled: bool | None
) -> None:
    """Step all weights of a group by the execution that its options name, else by the fastest one for each.

    By default the kernel in C takes what it can, and batches of torch's operations the rest; without a kernel, or with
    ``fused=False``, batches take all. ``foreach=False`` takes one weight after the other. Weights whose groups are not
    runs of memory, and those with extreme radii, are always taken one after the other, and so are sharded weights with
    groups across processes.

    Rules that kernels do not know are stepped in batches, and ``fused`` and ``compiled`` say nothing of them.

    Raises:
        NativeKernelError: ``fused`` is True and there is no kernel.
    """
    remaining = [_local(member) for member in members]
    compiled = compiled and rule.has_kernel
    if compiled:
        remaining = _pass_on(rule, remaining, suits_rows, run_compiled)
    elif rule.has_kernel and _wants_native(fused, foreach, members):
        remaining = _pass_on(rule, remaining, suits_native, run_native)
    if rule.by_groups and (foreach or (foreach is None and not compiled)):
        remaining = _pass_on(rule, remaining, suits_rows, run_batched)
    run_single(rule, remaining)


def _local(member: Member) -> Member:
    """Return the part of a sharded weight that this process holds, where that is whole groups; others as they are."""
    if not is_sharded(member.weight):
        return member
    part = part_of(member.manifold, member.weight)
    if part.combine is not None:
        return member
    second = member.second
    if second is not None:
        second = (local_part(second[0]), None if second[1] is None else local_part(second[1]))
    return replace(
        member,
        weight=part.read(member.weight),
        gradient=part.read(member.gradient),
        manifold=part.manifold,
        moment=None if member.moment is None else part.read(member.moment),
        second=second,
    )


def _wants_native(fused: bool | None, foreach: bool | None, members: Sequence[Member]) -> bool:
    wanted = fused or (fused is None and foreach is None)
    if not wanted or not any(member.weight.is_cpu for member in members):
        return False
    problem = native.available()
    if problem is not None and fused:
        raise NativeKernelError(problem)
    return problem is None


def _pass_on(
    rule: Rule,
    members: Sequence[Member],
    suits: Callable[[Member], bool],
    execute: Callable[[Rule, Sequence[Member]], None],
) -> list[Member]:
    """Step the weights that suit an execution, and return the others."""
    suited = [suits(member) for member in members]
    taken = [member for member, fits in zip(members, suited, strict=True) if fits]
    if taken:
        execute(rule, taken)
    return [member for member, fits in zip(members, suited, strict=True) if not fits]


def run_single(rule: Rule, members: Sequence[Member]) -> None:
    """Step one weight after the other by the reference rules; where no faster execution is left, piece by piece."""
    rule = replace(rule, lr=float(rule.lr))
    if not rule.has_kernel and rule.by_groups:
        members = [piece for member in members for _, piece in pieces(member)]
    for member in members:
        space = Workspace(member.manifold, member.weight)
        rule.update_(
            space.open(member.weight),
            space.read(member.gradient),
            None if member.moment is None else space.open(member.moment),
            member.second,
            space.spheres,
            dampening=member.dampening,
            step=member.step,
        )
        space.close()


def suits_native(member: Member) -> bool:
    """Whether the kernel in C can step a weight: on the CPU, with groups that are runs of memory."""
    weight, moment, layout = member.weight, member.moment, layout_of(member.manifold)
    if not weight.is_cpu or layout.to_unit or not native.know(weight.dtype) or hasattr(weight, "__tensor_flatten__"):
        return False
    stride = weight.stride()
    if not layout.has_rows(stride):
        return False
    return moment is None or (moment.stride() == stride and moment.dtype == weight.dtype)


def run_native(rule: Rule, members: Sequence[Member]) -> None:
    """Step all weights by one call of the kernel for each dtype among them."""
    for dtype in {member.weight.dtype for member in members}:
        chosen = [member for member in members if member.weight.dtype == dtype]
        gradients = [_like(member.gradient, member.weight) for member in chosen]
        jobs = np.array([_job(rule, *pair) for pair in zip(chosen, gradients, strict=True)], dtype=native.JOB)
        kind = 1 if rule.kind == "adam" else 0
        options = (kind, native.code_of(dtype), rule.nesterov, rule.maximize)
        packed = np.array((*options, float(rule.lr), rule.keep, rule.beta2, rule.eps), dtype=native.RULE)
        entries = int((jobs["rows"] * jobs["size"]).sum())
        native.step(packed, jobs, max(1, min(torch.get_num_threads(), entries // _PER_THREAD)))
    # The kernel writes behind torch's back; autograd has to know.
    torch.autograd.graph.increment_version(
        [x for m in members for x in (m.weight, m.moment, *(m.second or ())) if x is not None]
    )


def _like(gradient: Tensor, weight: Tensor) -> Tensor:
    """Return the gradient with the dtype and the order in memory of the weight: itself where it has them."""
    if gradient.dtype == weight.dtype and gradient.stride() == weight.stride():
        return gradient
    return torch.empty_like(weight, requires_grad=False).copy_(gradient.detach())


def _job(rule: Rule, member: Member, gradient: Tensor) -> tuple[float, ...]:
    layout, moment, second = layout_of(member.manifold), member.moment, member.second
    weight = member.weight.data_ptr()
    of_layout = (layout.address, layout.rows, layout.size, len(layout.squares))
    b = 0 if moment is None else moment.data_ptr()
    if second is None:
        return (weight, gradient.data_ptr(), b, 0, 0, *of_layout, 1.0 - member.dampening, 1.0, 1.0)
    step, v_max = float(member.step), 0 if second[1] is None else second[1].data_ptr()
    corrections = (1 - rule.keep, *map(float, bias_corrections(rule.keep, rule.beta2, step)))
    return (weight, gradient.data_ptr(), b, second[0].data_ptr(), v_max, *of_layout, *corrections)
