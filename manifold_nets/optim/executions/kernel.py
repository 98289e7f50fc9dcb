"""Steps by the kernel in C: whole ones by rules that it knows, and its passes for the coefficients of all others."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch

from manifold_nets.optim.executions import native
from manifold_nets.optim.executions.layouts import layout_of
from manifold_nets.optim.executions.rows import Rows, rows_of, what_to_write, without_radial_parts
from manifold_nets.optim.rules.coefficients import bias_corrections
from manifold_nets.optim.rules.members import Member, Rule
from manifold_nets.optim.rules.products import Scalar, rounding_of

__all__ = ["run_in_passes", "run_native", "suits_by_entries", "suits_native"]

# Entries that are worth a thread: a quarter of a millisecond's work.
_PER_THREAD = 2**18


def suits_native(member: Member) -> bool:
    """Whether the kernel in C can step a weight: on the CPU, with groups that are runs of memory."""
    weight, moment, layout = member.weight, member.moment, layout_of(member.manifold)
    if not weight.is_cpu or layout.to_unit or not native.know(weight.dtype) or hasattr(weight, "__tensor_flatten__"):
        return False
    stride = weight.stride()
    if not layout.has_rows(stride):
        return False
    return moment is None or (moment.stride() == stride and moment.dtype == weight.dtype)


def suits_by_entries(member: Member) -> bool:
    """Whether the kernel in C can step a weight with a second moment for every entry."""
    stride, size = member.weight.stride(), layout_of(member.manifold).size
    return (
        suits_native(member)
        and size <= native.SHORT
        and member.second is not None
        and (member.second[0].stride() == stride)
    )


def run_native(rule: Rule, members: Sequence[Member]) -> None:
    """Step all weights by one call of the kernel for each dtype among them."""
    for dtype in {member.weight.dtype for member in members}:
        chosen = [member for member in members if member.weight.dtype == dtype]
        ready = [_ready(member) for member in chosen]
        jobs = np.array([_job(rule, member) for member in ready], dtype=native.JOB)
        jobs["rounding"] = [rounding_of(member.gradient.dtype) for member in chosen]
        native.step(_packed(rule, dtype), jobs, _threads(jobs))
    _changed(members)


def run_in_passes(rule: Rule, members: Sequence[Member]) -> None:
    """Step all weights in two passes of the kernel, one that measures and one that writes what torch has computed.

    The coefficients of all rows are computed together, in float64.
    """
    alike: dict[Any, list[Member]] = defaultdict(list)
    for m in members:
        alike[m.dampening, float(m.step), m.moment is None, m.second is None, m.weight.dtype].append(m)
    for (dampening, step, *_, dtype), chosen in alike.items():
        matrices: Sequence[Rows] = [rows_of(member) for member in chosen]
        ready = [_ready(member) for member in chosen]
        jobs = np.array([_job(rule, member) for member in ready], dtype=native.JOB)
        measured = torch.empty(int(jobs["rows"].sum()), 6, dtype=torch.float64)
        first = np.cumsum(jobs["rows"]) - jobs["rows"]
        packed, threads = _packed(rule, dtype), _threads(jobs)
        jobs["products"] = measured.data_ptr() + first * measured[0].nbytes
        native.measure(packed, jobs, threads)
        products, taken = measured.t(), cast("Scalar", 0.0)
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


def _changed(members: Sequence[Member]) -> None:
    """Tell autograd what the kernel has written behind torch's back."""
    torch.autograd.graph.increment_version(
        [x for m in members for x in (m.weight, m.moment, *(m.second or ())) if x is not None]
    )


def _ready(member: Member) -> Member:
    """Return a weight whose gradient has its dtype and order in memory: itself where that is so."""
    weight, gradient = member.weight, member.gradient
    if gradient.dtype == weight.dtype and gradient.stride() == weight.stride():
        return member
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
