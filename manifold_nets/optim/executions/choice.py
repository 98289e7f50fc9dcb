"""The executions of a step: one weight after the other, in batches, compiled by torch, or by the kernel in C.

All take the same step, to rounding. `choose` picks one, as torch's optimizers do among theirs.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace

from manifold_nets.errors import NativeKernelError
from manifold_nets.gathered import is_sharded, local_part
from manifold_nets.optim.executions import native
from manifold_nets.optim.executions.batches import run_batched, run_compiled
from manifold_nets.optim.executions.kernel import run_in_passes, run_native, suits_by_entries, suits_native
from manifold_nets.optim.executions.pieces import pieces
from manifold_nets.optim.executions.rows import suits_rows
from manifold_nets.optim.executions.sharding import part_of
from manifold_nets.optim.executions.workspace import Workspace
from manifold_nets.optim.rules.members import Member, Rule, Seen
from manifold_nets.optim.rules.products import rounding_of

__all__ = ["run", "run_by_entries", "run_single"]


def run(
    rule: Rule, members: Sequence[Member], *, foreach: bool | None, fused: bool | None, compiled: bool | None
) -> None:
    """Step all weights of a group by the execution that its options name, else by the fastest one for each.

    By default the kernel in C takes what it can, and batches of torch's operations the rest; without a kernel, or with
    ``fused=False``, batches take all. ``foreach=False`` takes one weight after the other. Weights whose groups are not
    runs of memory, and those with extreme radii, are always taken one after the other, and so are sharded weights with
    groups across processes.

    Rules that kernels do not know have their coefficients computed by torch, between two passes of the kernel in C, and
    ``compiled`` says nothing of them.

    Raises:
        NativeKernelError: ``fused`` is True and there is no kernel.
    """
    remaining = [_local(member) for member in members] if rule.by_groups else list(members)
    compiled = compiled and rule.has_kernel
    if compiled:
        remaining = _pass_on(rule, remaining, suits_rows, run_compiled)
    elif rule.by_groups and _wants_native(fused, foreach, members):
        remaining = _pass_on(rule, remaining, suits_native, _run_by_kernel)
    if rule.by_groups and (foreach or (foreach is None and not compiled)):
        remaining = _pass_on(rule, remaining, suits_rows, run_batched)
    run_single(rule, remaining)


def run_by_entries(rule: Rule, members: Sequence[Member], *, foreach: bool | None, fused: bool | None) -> list[Member]:
    """Step weights with a second moment for every entry by the kernel in C, and return those that it does not take.

    Raises:
        NativeKernelError: ``fused`` is True and there is no kernel.
    """
    if _wants_native(fused, foreach, members):
        return _pass_on(rule, members, suits_by_entries, run_native)
    return list(members)


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
        seen=Seen(),
    )


def _wants_native(fused: bool | None, foreach: bool | None, members: Sequence[Member]) -> bool:
    wanted = fused or (fused is None and foreach is None)
    if not wanted or not any(member.weight.is_cpu for member in members):
        return False
    problem = native.available()
    if problem is not None:
        if fused:
            raise NativeKernelError(problem)
        _warn_of_slow_steps(problem)
    return problem is None


_has_warned = False


def _warn_of_slow_steps(problem: str) -> None:
    """Warn once per process that steps which the kernel would take are taken by torch's operations."""
    global _has_warned
    if not _has_warned:
        _has_warned = True
        warnings.warn(
            f"The compiled kernel for steps on spheres is not available ({problem}). Optimizer steps on the CPU use "
            "torch's operations instead and take several times longer. Install gcc or clang, or set CC to a C "
            "compiler; with foreach=True the optimizer uses torch's operations without this warning.",
            stacklevel=_depth(),
        )


def _depth() -> int:
    """Return how many callers up the code is that called the optimizer, for a warning in the function that asks."""
    depth, frame = 1, sys._getframe(1)
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in ("manifold_nets", "torch"):
        depth, frame = depth + 1, frame.f_back
    return depth


def _run_by_kernel(rule: Rule, members: Sequence[Member]) -> None:
    """Let the kernel in C step weights, and take those that share memory one after the other."""
    run_single(rule, (run_native if rule.has_kernel else run_in_passes)(rule, members) or ())


def _pass_on(
    rule: Rule,
    members: Sequence[Member],
    suits: Callable[[Member], bool],
    execute: Callable[[Rule, Sequence[Member]], list[Member] | None],
) -> list[Member]:
    """Step the weights that suit an execution, and return the others, with those that it gives back."""
    suited = [suits(member) for member in members]
    taken = [member for member, fits in zip(members, suited, strict=True) if fits]
    given_back = (execute(rule, taken) if taken else None) or []
    return [member for member, fits in zip(members, suited, strict=True) if not fits] + given_back


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
            rounding=rounding_of(member.gradient.dtype),
        )
        space.close()
