"""Balancing: the point of smallest norm on the orbit of the rescaling symmetries.

A rescaling multiplies some parts of the parameters by α and divides others by it; the function stays. Along one
symmetry with exponents c the squared norm is ``Σ_i ‖w_i‖² exp(2 c_i t)``, ``t = ln α``, a convex function of t. Taking
its minimum symmetry by symmetry, again and again, reaches the minimum over all of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from manifold_nets.constraints import constrained_weights
from manifold_nets.conversion.energies import Energies
from manifold_nets.conversion.verify import Verification, both_modes, compare_outputs, eval_limit
from manifold_nets.errors import FunctionChangedError, ReportMismatchError
from manifold_nets.symmetry import SymmetryFamily, SymmetryReport, diagnose
from manifold_nets.symmetry.network.twin import duplicate

__all__ = ["BalanceRecord", "balance", "balanced_values", "rescaling_families"]

_SWEEPS = 200
_SMALLEST_STEP = 1e-9
# One symmetry moves no part by more than this factor in one sweep.
_LARGEST_STEP = math.log(1e3)


@dataclass(frozen=True)
class BalanceRecord:
    """What balancing did.

    Args:
        balanced: one line for each family that was balanced.
        left: one line for each rescaling family that was left, with the reason.
        norm_before: Euclidean norm of all parameters that take part, before.
        norm_after: the same, after.
        sweeps: passes over all symmetries until nothing moved.
        verification: how far the function is from what it was.
    """

    balanced: tuple[str, ...]
    left: tuple[str, ...]
    norm_before: float
    norm_after: float
    sweeps: int
    verification: Verification

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {**vars(self), "verification": self.verification.to_dict()}


def balance(
    model: nn.Module, report_or_example_inputs: Any, *, inplace: bool = False
) -> tuple[nn.Module, BalanceRecord]:
    """Move a network to the point of smallest norm on the orbit of its rescaling symmetries; its function stays.

    Only rescalings that leave every stored statistic alone are carried out, so that the function is the same in both
    modes up to rounding. Families that touch a weight on spheres are left: balance first, then convert.

    Args:
        model: the network; left as it is unless ``inplace``.
        report_or_example_inputs: what `diagnose` returned for it, or example inputs.
        inplace: change the values of the model itself.

    Returns:
        The balanced copy, or the model itself, and what was done.

    Raises:
        ReportMismatchError: the report is of another model.
        FunctionChangedError: the outputs would change by more than rounding; nothing was changed.

    References:
        Sinkhorn-like balancing of rescaling orbits: Stock, Graham, Gribonval, Jégou, *Equi-normalization of neural
        networks*, ICLR 2019, arXiv:1902.10416.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> with torch.no_grad():
        ...     _ = net[0].weight.mul_(100)
        >>> balanced, record = balance(net, torch.randn(8, 4))
        >>> record.norm_after < record.norm_before
        True
    """
    given = report_or_example_inputs
    report = given if isinstance(given, SymmetryReport) else diagnose(model, given)
    rescalings = rescaling_families(model, report)
    chosen = [family for family, why in rescalings if why is None]
    left = [f"{family}: {why}" for family, why in rescalings if why is not None]
    values, sweeps, before = balanced_values(chosen, dict(model.named_parameters()))
    target = model if inplace else duplicate(model)
    verification = _put_in_place(model, target, values, report.example_inputs)
    record = BalanceRecord(tuple(map(str, chosen)), tuple(left), before, _norm(values), sweeps, verification)
    return target, record


def rescaling_families(model: nn.Module, report: SymmetryReport) -> list[tuple[SymmetryFamily, str | None]]:
    """Return every family of rescalings with the reason why it cannot be balanced, or None where it can.

    Raises:
        ReportMismatchError: the report is of another model.
    """
    parameters = dict(model.named_parameters())
    unknown = [n for family in report.families for n in family.parameters if n not in parameters]
    if unknown:
        raise ReportMismatchError(type(model).__name__, report.model, unknown)
    constrained = {weight.name for weight in constrained_weights(model)}
    return [(family, _why_left(family, constrained)) for family in report.families if family.kind == "rescaling"]


def balanced_values(
    families: Sequence[SymmetryFamily], state: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], int, float]:
    """Return the float64 values of smallest norm, the sweeps taken, and the norm before; nothing is changed.

    Args:
        families: rescalings that can be balanced.
        state: the tensors that take part, and perhaps others, by name.
    """
    names = dict.fromkeys(name for family in families for name in family.parameters)
    values = {name: state[name].detach().to(torch.float64).clone() for name in names}
    before = _norm(values)
    return values, _descend(families, values), before


def _why_left(family: SymmetryFamily, constrained: set[str]) -> str | None:
    if family.certificate.verdict != "invariant":
        return f"certificate {family.certificate}"
    if family.absorbed:
        return "stored statistics would have to follow"
    if len(family.parameters) < len(family.partitions):
        return "it moves rows and columns of one weight at once"
    on_spheres = [name for name in family.parameters if name in constrained]
    return f"{on_spheres[0]} is on spheres" if on_spheres else None


def _norm(values: dict[str, Tensor]) -> float:
    return math.sqrt(sum(float(value.square().sum()) for value in values.values()))


def _descend(families: Sequence[SymmetryFamily], values: dict[str, Tensor]) -> int:
    """Minimize the squared norm symmetry by symmetry, all symmetries of a family at once; return the sweeps taken.

    Sums of squares over the blocks that all families leave in one piece are taken once: the sweeps never read a weight.
    """
    energies = {
        name: Energies.of(value.square(), [p for f in families for (n, _), p in f.partitions.items() if n == name])
        for name, value in values.items()
    }
    logarithms = [
        {place: torch.zeros(partition.n_groups, dtype=torch.float64) for place, partition in family.partitions.items()}
        for family in families
    ]
    taken = _SWEEPS
    for sweep in range(1, _SWEEPS + 1):
        moves = [_minimize(f, energies, logs) for f, logs in zip(families, logarithms, strict=True)]
        if max(moves, default=0.0) < _SMALLEST_STEP:
            taken = sweep
            break
    for family, logs in zip(families, logarithms, strict=True):
        for (name, part), partition in family.partitions.items():
            factors = logs[name, part].exp().to(values[name].device)
            values[name] = partition.multiply(values[name], partition.spread(factors))
    return taken


def _minimize(family: SymmetryFamily, energies: dict[str, Energies], total: dict[tuple[str, str], Tensor]) -> float:
    """Take the symmetries of a family to their minima, one after the other; return the largest ``|ln α|``."""
    sums = {place: energies[place[0]].over(partition).tolist() for place, partition in family.partitions.items()}
    logarithms = {place: [0.0] * len(values) for place, values in sums.items()}
    largest = 0.0
    for symmetry in family.symmetries:
        moved = [(place, index, c) for place, exponents in symmetry.items() for index, c in exponents.items()]
        step = _minimum([(sums[place][index], c) for place, index, c in moved])
        largest = max(largest, abs(step))
        for place, index, c in moved:
            sums[place][index] *= math.exp(2 * c * step)
            logarithms[place][index] += c * step
    for place, partition in family.partitions.items():
        logs = torch.tensor(logarithms[place], dtype=torch.float64)
        energies[place[0]].multiply(partition, (2 * logs).exp())
        total[place] += logs
    return largest


def _minimum(terms: list[tuple[float, float]]) -> float:
    """Minimize ``Σ a exp(2 c t)`` over t, at once where all ``|c|`` are equal, else by Newton; 0 without a minimum."""
    growing = sum(a for a, c in terms if c > 0)
    shrinking = sum(a for a, c in terms if c < 0)
    if not (growing > 0 and shrinking > 0 and math.isfinite(growing + shrinking)):
        return 0.0
    if len({abs(c) for _, c in terms if c}) == 1:
        c = abs(next(c for _, c in terms if c))
        return max(-_LARGEST_STEP, min(_LARGEST_STEP, math.log(shrinking / growing) / (4 * c)))
    t = 0.0
    for _ in range(100):
        slope = sum(a * c * math.exp(2 * c * t) for a, c in terms)
        curvature = 2 * sum(a * c * c * math.exp(2 * c * t) for a, c in terms)
        step = max(-1.0, min(1.0, slope / curvature))
        t = max(-_LARGEST_STEP, min(_LARGEST_STEP, t - step))
        if abs(step) < 1e-14:
            break
    return t


def _put_in_place(model: nn.Module, target: nn.Module, values: dict[str, Tensor], inputs: Any) -> Verification:
    before = both_modes(model, inputs)
    parameters = dict(target.named_parameters())
    saved = {name: parameters[name].detach().clone() for name in values}
    with torch.no_grad():
        for name, value in values.items():
            parameters[name].copy_(value)
    verification = compare_outputs(before, both_modes(target, inputs))
    dtype = next((p.dtype for p in parameters.values() if p.is_floating_point()), torch.float32)
    limit = eval_limit(dtype)
    if not verification.eval_difference <= limit:
        with torch.no_grad():
            for name, value in saved.items():
                parameters[name].copy_(value)
        raise FunctionChangedError(type(model).__name__, "evaluation", verification.eval_difference, limit)
    return verification
