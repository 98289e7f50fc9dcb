"""Steps by the kernel in C: whole ones by rules that it knows, and its passes for the coefficients of all others."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from manifold_nets.groups import accumulation_dtype
from manifold_nets.optim.executions import native
from manifold_nets.optim.executions.layouts import layout_of
from manifold_nets.optim.executions.rows import rows_of, what_to_write, without_radial_parts
from manifold_nets.optim.rules.coefficients import bias_corrections
from manifold_nets.optim.rules.members import Member, Rule, Seen
from manifold_nets.optim.rules.products import Scalar, rounding_of

__all__ = ["run_in_passes", "run_native", "suits_by_entries", "suits_native"]

# Entries that are worth a thread: a quarter of a millisecond's work.
_PER_THREAD = 2**18


def _fits(member: Member) -> tuple[bool, bool]:
    """Whether the kernel in C can step a weight, and whether it can read the gradient where it lies.

    It takes weights on the CPU whose groups are runs of memory. Shapes, and that there is memory for all entries, have
    been checked by `manifold_nets.optim.executions.inputs`.
    """
    weight, layout = member.weight, layout_of(member.manifold)
    if layout.to_unit or not _is_plain(weight) or not native.know(weight.dtype):
        return False, False
    stride, dtype = weight.stride(), weight.dtype
    if not layout.has_rows(stride) or not (member.moment is None or _lies(member.moment, dtype, stride)):
        return False, False
    wide = accumulation_dtype(dtype)
    if not all(x is None or (_is_plain(x) and x.dtype == wide and x.is_contiguous()) for x in _per_sphere(member)):
        return False, False
    return True, _lies(member.gradient, dtype, stride)


def _per_sphere(member: Member) -> tuple[Tensor | None, ...]:
    """Return the second moments of spheres; those of entries lie as the weight does."""
    second = member.second
    return () if second is None or second[0].numel() == member.weight.numel() else second


def suits_native(member: Member) -> bool:
    """Whether the kernel in C can step a weight."""
    seen = member.seen
    if seen.fits is None:
        with _as_tensors():
            seen.fits = _fits(member)
    return seen.fits[0]


def suits_by_entries(member: Member) -> bool:
    """Whether the kernel in C can step a weight with a second moment for every entry."""
    weight = member.weight
    return (
        layout_of(member.manifold).size <= native.SHORT
        and member.second is not None
        and suits_native(member)
        and _lies(member.second[0], accumulation_dtype(weight.dtype), weight.stride())
    )


# Without it every look at a weight asks its class first.
_as_tensors = torch._C.DisableTorchFunctionSubclass


def _is_plain(tensor: Tensor) -> bool:
    """Whether the values of a tensor are what lies in its memory."""
    dispatch = type(tensor).__torch_dispatch__
    return dispatch is Tensor.__torch_dispatch__ and tensor.is_cpu and not tensor.is_neg() and tensor.data_ptr() != 0


def _lies(tensor: Tensor, dtype: torch.dtype, stride: tuple[int, ...]) -> bool:
    return tensor.dtype == dtype and tensor.stride() == stride and _is_plain(tensor)


def run_native(rule: Rule, members: Sequence[Member]) -> list[Member]:
    """Step weights by one call of the kernel for each dtype among them; return those that share memory with others."""
    shared: list[Member] = []
    for dtype, (_, jobs) in _jobs(rule, members, lambda member: member.weight.dtype, shared).items():
        native.step(_packed(rule, dtype), jobs, _threads(jobs))
    _changed(members)
    return shared


def run_in_passes(rule: Rule, members: Sequence[Member]) -> list[Member]:
    """Step weights in two passes of the kernel, one that measures and one that writes what torch has computed.

    The coefficients of all rows are computed together, in float64. Weights that share memory with others are returned.
    """

    def alike(m: Member) -> Any:
        return m.dampening, float(m.step), m.moment is None, m.second is None, m.weight.dtype

    shared: list[Member] = []
    for (dampening, step, *_, dtype), (chosen, jobs) in _jobs(rule, members, alike, shared).items():
        matrices = [rows_of(member) for member, _ in chosen]
        # On the CPU whatever torch's default device is: the kernel writes there.
        measured = torch.empty(int(jobs["rows"].sum()), 6, dtype=torch.float64, device="cpu")
        first = np.cumsum(jobs["rows"]) - jobs["rows"]
        packed, threads = _packed(rule, dtype), _threads(jobs)
        jobs["products"] = measured.data_ptr() + first * measured[0].nbytes
        native.measure(packed, jobs, threads)
        # Without a moment, its products are left out, as in all other executions.
        products, taken = measured.t()[: 3 if matrices[0].moment is None else 6], cast("Scalar", 0.0)
        if rule.needs_lengths:
            former, (matrices, products, taken) = matrices, without_radial_parts(matrices, products)
            for job, old, new in zip(jobs, former, matrices, strict=True):
                if new is not old:
                    job["g"] = new.gradient.data_ptr()
        factors, far, carried = what_to_write(rule, matrices, products, taken, dampening, step)
        marks = far.to(torch.uint8) * (native.CARRIED if carried else native.ALONE)
        jobs["written"] = factors.data_ptr() + first * factors[0].nbytes
        jobs["far"] = marks.data_ptr() + first
        native.write(packed, jobs, threads)
    _changed(members)
    return shared


def _jobs(
    rule: Rule, members: Sequence[Member], key: Callable[[Member], Any], shared: list[Member]
) -> dict[Any, tuple[list[tuple[Member, Member]], np.ndarray]]:
    """Return what the kernel is called with, for members that are alike; others than those that share memory.

    Each member comes with the one whose gradient the kernel reads, which has to live as long as its job.
    """
    alike: dict[Any, list[tuple[Member, Member]]] = defaultdict(list)
    with _as_tensors():
        for member in members:
            alike[key(member)].append((member, _ready(member)))
        found = {}
        for kind, chosen in alike.items():
            jobs = np.array([_job(rule, ready) for _, ready in chosen], dtype=native.JOB)
            jobs["rounding"] = [rounding_of(member.gradient.dtype) for member, _ in chosen]
            apart = _apart(jobs, chosen[0][0])
            if not apart.all():
                # A gradient by itself, as it is only read; weights and moments are left to whoever can take them.
                shared += [
                    replace(m, gradient=m.gradient.clone(), seen=Seen())
                    for (m, _), own in zip(chosen, apart, strict=True)
                    if not own
                ]
                chosen, jobs = [pair for pair, own in zip(chosen, apart, strict=True) if own], jobs[apart]
            if chosen:
                found[kind] = chosen, jobs
    return found


# Jobs that have been found apart: mostly a step has those of the last one.
_known_apart: set[tuple[Any, ...]] = set()


def _apart(jobs: np.ndarray, first: Member) -> np.ndarray:
    """Return for each job whether nothing that it reads or writes overlaps with anything else in the jobs."""
    apart = np.ones(len(jobs), dtype=bool)
    by_entries = first.second is not None and first.second[0].numel() == first.weight.numel()
    starts = np.concatenate([jobs[name] for name in ("w", "g", "b", "v", "v_max", "rows", "size")])
    plan = first.weight.dtype, by_entries, starts.tobytes()
    if plan in _known_apart:
        return apart
    starts, entries = starts[: 5 * len(jobs)], jobs["rows"] * jobs["size"]
    width, wide = first.weight.itemsize, max(4, first.weight.itemsize)
    lengths = np.concatenate([entries * width] * 3 + [(entries if by_entries else jobs["rows"]) * wide] * 2)
    order = np.argsort(starts, kind="stable")
    order = order[np.searchsorted(starts[order], 1) :]  # null where there is no moment
    starts, ends = starts[order], np.maximum.accumulate(starts[order] + lengths[order])
    meets = starts[1:] < ends[:-1]
    if meets.any():
        runs = np.concatenate([[0], np.cumsum(~meets)])
        apart[order[np.bincount(runs)[runs] > 1] % len(jobs)] = False
        return apart
    if len(_known_apart) > 256:
        _known_apart.clear()
    _known_apart.add(plan)
    return apart


def _changed(members: Sequence[Member]) -> None:
    """Tell autograd what the kernel has written behind torch's back."""
    torch.autograd.graph.increment_version(
        [x for m in members for x in (m.weight, m.moment, *(m.second or ())) if x is not None]
    )


def _ready(member: Member) -> Member:
    """Return a weight whose gradient lies in memory as it does: itself where that is so."""
    if member.seen.fits is not None and member.seen.fits[1]:
        return member
    weight, gradient = member.weight, member.gradient
    return replace(member, gradient=torch.empty_like(weight, requires_grad=False).copy_(gradient.detach()))


def _packed(rule: Rule, dtype: torch.dtype) -> np.ndarray:
    # Passes by themselves do not ask for the rule.
    options = (native.KINDS.get(rule.kind, 0), native.code_of(dtype), rule.nesterov, rule.maximize)
    return np.array((*options, float(rule.lr), rule.keep, rule.beta2, rule.eps), dtype=native.RULE)


def _threads(jobs: np.ndarray) -> int:
    return max(1, min(torch.get_num_threads(), int((jobs["rows"] * jobs["size"]).sum()) // _PER_THREAD))


def _job(rule: Rule, member: Member) -> tuple[float, ...]:
    layout, moment, second = layout_of(member.manifold), member.moment, member.second
    weight = member.weight.data_ptr()
    unused = (0.0, 0, 0, 0)
    of_layout = (layout.address, layout.rows, layout.size, len(layout.squares))
    b = 0 if moment is None else moment.data_ptr()
    if second is None:
        return (weight, member.gradient.data_ptr(), b, 0, 0, *of_layout, 1.0 - member.dampening, 1.0, 1.0, *unused)
    step, v_max = float(member.step), 0 if second[1] is None else second[1].data_ptr()
    corrections = (1 - rule.keep, *map(float, bias_corrections(rule.keep, rule.beta2, step)))
    return (weight, member.gradient.data_ptr(), b, second[0].data_ptr(), v_max, *of_layout, *corrections, *unused)
