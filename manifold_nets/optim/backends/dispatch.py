"""Which backend steps which weights, as torch's optimizers choose among theirs; all take the same step, to rounding."""

from __future__ import annotations

import functools
import importlib
import sys
import warnings
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from manifold_nets.errors import NativeKernelError
from manifold_nets.gathered import is_sharded, local_part
from manifold_nets.joint_sphere import JointSphere, JointSphereMember, by_joint_sphere
from manifold_nets.manifold import SphereProduct
from manifold_nets.optim.backends import build, native
from manifold_nets.optim.backends.batched import run_batched, run_compiled
from manifold_nets.optim.backends.inputs import Batch
from manifold_nets.optim.backends.native import run_in_passes, run_native, suits_by_entries, suits_native
from manifold_nets.optim.backends.reference import run_single
from manifold_nets.optim.backends.rule import Rule, StepInput
from manifold_nets.optim.backends.sharded import part_of
from manifold_nets.optim.backends.views import suits_rows

__all__ = ["Backend", "assign", "has_triton", "in_motion", "joined", "run"]

_TENSORS = ("weight", "gradient", "moment", "second", "largest", "norms")

# Steps weights, and may give some of them back.
Backend = Callable[[Rule, Batch], "list[StepInput] | None"]


def assign(
    rule: Rule, members: Sequence[StepInput], *, foreach: bool | None, fused: bool | None, compiled: bool | None
) -> list[tuple[Backend, Batch]]:
    """Return the backends of a step and what each steps: what its options name, else the fastest for each weight.

    By default the kernel in C takes what it can on the CPU, those in Triton what they can on CUDA and ROCm devices, and
    batches of torch's operations the rest; without a kernel, or with ``fused=False``, batches take all.
    ``foreach=False`` takes one weight after the other. Weights whose groups are not runs of memory, and those with
    extreme radii, are always taken one after the other, but for what Triton takes, and so are sharded weights with
    groups across processes.

    Rules that kernels do not know have their coefficients computed by torch, between two passes of a kernel, and
    ``compiled`` says nothing of them. Steps with a second moment for every entry have no batches.

    Raises:
        NativeKernelError: ``fused`` is True and there is no kernel for the device of a weight.
    """
    remaining = [_local(member) for member in members] if rule.by_groups else list(members)
    found: list[tuple[Backend, Batch]] = []

    def give(backend: Backend, suits: Callable[[StepInput], bool]) -> None:
        taken: list[StepInput] = []
        left: list[StepInput] = []
        for member in remaining:
            (taken if suits(member) else left).append(member)
        remaining[:] = left
        if taken:
            found.append((backend, Batch(taken)))

    compiled = compiled and rule.has_kernel
    if compiled:
        give(run_compiled, suits_rows)
    elif rule.by_groups and (fused or (fused is None and foreach is None)):
        if kernel := _triton_for(members, fused=bool(fused)):
            give(kernel.run_triton, lambda m: has_triton(m.weight) and kernel.suits_triton(m, rule))
        if _wants_native(remaining, fused=bool(fused)):
            suits = suits_by_entries if rule.by_entries else suits_native
            give(run_native if rule.is_native else run_in_passes, suits)
    if rule.by_groups and not rule.by_entries and (foreach or (foreach is None and not compiled)):
        give(run_batched, suits_rows)
    give(run_single, lambda _: True)
    return found


def run(rule: Rule, batches: Sequence[tuple[Backend, Batch]]) -> None:
    """Take the step; weights that share memory with others are given back, and taken one after the other."""
    for backend, batch in batches:
        if backend.__name__ != "run_triton":
            for member in batch:
                member.step = float(member.step)  # a tensor where a step is to lie in a CUDA graph
        run_single(rule, backend(rule, batch) or ())


def _local(member: StepInput) -> StepInput:
    """Return the part of a sharded weight that this process holds, where that is whole groups; others as they are."""
    if not is_sharded(member.weight):
        return member
    part = part_of(member.manifold, member.weight)
    if part.combine is not None:
        return member
    tensors = {name: getattr(member, name) for name in _TENSORS}
    held: Any = {name: x if x is None else local_part(x.detach()) for name, x in tensors.items()}
    return replace(member, manifold=part.manifold, **held)


# ---- the kernels -----------------------------------------------------------------------------------------------------


def _wants_native(members: Sequence[StepInput], *, fused: bool) -> bool:
    if not any(member.weight.is_cpu for member in members):
        return False
    problem = native.available()
    if problem is not None:
        if fused:
            raise NativeKernelError(problem, build.PLATFORM.remedy)
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
            f"torch's operations instead, which take several times longer. {build.PLATFORM.remedy}; foreach=True uses "
            "torch's operations without this warning.",
            stacklevel=_depth(),
        )


def _depth() -> int:
    """Return how many callers up the code is that called the optimizer, for a warning in the function that asks."""
    depth, frame = 1, sys._getframe(1)
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in ("manifold_nets", "torch"):
        depth, frame = depth + 1, frame.f_back
    return depth


# The type of CUDA's and of ROCm's devices.
_TRITON_DEVICES: tuple[str, ...] = ("cuda",)


@functools.cache
def _triton_kernel() -> Any:
    """Return the module of the kernels in Triton, or why it cannot be imported."""
    try:
        return importlib.import_module("manifold_nets.optim.backends.triton_kernel")
    except ImportError as error:
        return f"{error}"


def has_triton(weight: Tensor) -> bool:
    """Whether the kernels in Triton are for the device of a weight, and can be imported."""
    device = weight.device
    # Triton compiles for NVIDIA's devices from Volta on.
    is_old = device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) < (7, 0)
    return device.type in _TRITON_DEVICES and not is_old and not isinstance(_triton_kernel(), str)


def _triton_for(members: Sequence[StepInput], *, fused: bool) -> Any:
    """Return the module of the kernels in Triton where a weight is on a device for them; else None."""
    if not any(member.weight.device.type in _TRITON_DEVICES for member in members):
        return None
    found = _triton_kernel()
    if not isinstance(found, str):
        return found
    if fused:
        raise NativeKernelError(f"weights on a GPU without Triton ({found})", "Install Triton (`pip install triton`)")
    return None


# ---- joint spheres ---------------------------------------------------------------------------------------------------


def in_motion(manifolds: Sequence[SphereProduct | None], places: Container[int]) -> set[JointSphere]:
    """Return the joint spheres of which a weight in one of these places has a gradient; missing ones count as zero."""
    # What is asked first costs nothing, and holds for almost all.
    other = [(place, m) for place, m in enumerate(manifolds) if m is not None and type(m) is not SphereProduct]
    return {m.joint for place, m in other if isinstance(m, JointSphereMember) and place in places}


@contextmanager
def joined(members: Sequence[StepInput], *, by_entries: bool = False) -> Iterator[list[StepInput]]:
    """Make one input of all weights of each joint sphere for the time of a step, then write what became of it.

    Row c of its matrix holds group c of all weights, so that the inner products of a step run over all of them. Each
    weight keeps a state of its own, in which the second moments are the joint ones.

    Args:
        members: weights of one parameter group; of a joint sphere all or none.
        by_entries: whether second moments are those of the entries, of each weight its own.
    """
    alone = [member for member in members if not isinstance(member.manifold, JointSphereMember)]
    found = by_joint_sphere((member.manifold, member) for member in members)
    joints = [(joint, list(parts.values())) for joint, parts in found.items()]
    wholes = [_whole(joint, parts, by_entries) for joint, parts in joints]
    yield [*alone, *wholes]
    for (joint, parts), whole in zip(joints, wholes, strict=True):
        _write_back(joint, parts, whole, by_entries)


def _whole(joint: JointSphere, members: Sequence[StepInput], by_entries: bool) -> StepInput:
    first = members[0]

    def together(name: str, *, joins: bool = True) -> Any:
        held = getattr(first, name)
        if held is None:
            return None
        return joint.join([getattr(m, name).detach() for m in members]) if joins else held.clone().reshape(-1, 1)

    point, gradient, moment = (together(name) for name in ("weight", "gradient", "moment"))
    second, largest = (together(name, joins=by_entries) for name in ("second", "largest"))
    norms = together("norms", joins=False)
    return StepInput(point, gradient, joint.sphere, moment, second, largest, first.dampening, first.step, norms)


def _write_back(joint: JointSphere, members: Sequence[StepInput], whole: StepInput, by_entries: bool) -> None:
    for name in ("weight", "moment", "second", "largest", "norms"):
        new = getattr(whole, name)
        splits = name in ("weight", "moment") or (by_entries and name != "norms")
        parts = [new] * len(members) if new is None or not splits else joint.split(new)
        for member, part in zip(members, parts, strict=True):
            if part is not None:
                old = getattr(member, name).detach()
                old.copy_(part.reshape(old.shape))
