"""Balancing: the point of smallest norm on the orbit of the rescaling symmetries.

A rescaling multiplies some parts of the parameters by α and divides others by it; the function stays. Along one
symmetry with exponents c the squared norm is ``Σ_i ‖w_i‖² exp(2 c_i t)``, ``t = ln α``, a convex function of t; over
all of them together it is convex as well. See `descent` for how its minimum is found.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from manifold_nets.constraints import constrained_weights
from manifold_nets.conversion.descent import Descent, descend
from manifold_nets.conversion.energies import Energies, Exponents
from manifold_nets.conversion.same_model import require_same_model
from manifold_nets.conversion.verify import Verification, both_modes, compare_outputs, eval_limit
from manifold_nets.errors import FunctionChangedError
from manifold_nets.groups import Partition
from manifold_nets.models import duplicate
from manifold_nets.symmetry import SymmetryFamily, SymmetryReport, diagnose

__all__ = ["BalanceRecord", "Rescaling", "balance", "rescaling_families", "smallest_norm"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BalanceRecord:
    """What balancing did.

    Args:
        balanced: one line for each family that was balanced.
        left: one line for each rescaling family that was left, with the reason.
        norm_before: Euclidean norm of all parameters that take part, before.
        norm_after: the same, after.
        sweeps: how often all symmetries were moved.
        converged: whether the smallest norm was reached; where not, the function stays all the same.
        imbalance: what grows and what shrinks with a symmetry weigh the same at the minimum: the largest difference of
            the two over their sum; at most 1e-9 where it converged.
        verification: how far the function is from what it was.
    """

    balanced: tuple[str, ...]
    left: tuple[str, ...]
    norm_before: float
    norm_after: float
    sweeps: int
    converged: bool
    imbalance: float
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

    The norm is the smallest where what grows with a symmetry weighs as much as what shrinks, for each of them:
    ``Σ_{c > 0} c ‖w_i‖² = Σ_{c < 0} |c| ‖w_i‖²`` over the parts i that are multiplied by ``α^c``. The descent ends
    where the two differ by no more than 1e-9 of their sum, or after 100 sweeps: then the record and a warning in the
    log say so.

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
    require_same_model(model, report)
    rescalings = rescaling_families(model, report)
    chosen = [family for family, why in rescalings if why is None]
    left = [f"{family}: {why}" for family, why in rescalings if why is not None]
    found = smallest_norm(chosen, dict(model.named_parameters()))
    target = model if inplace else duplicate(model)
    verification = _put_in_place(model, target, found, report.example_inputs)
    record = BalanceRecord(
        balanced=tuple(map(str, chosen)),
        left=tuple(left),
        norm_before=math.sqrt(found.descent.energies[0]),
        norm_after=math.sqrt(found.descent.energies[1]),
        sweeps=found.descent.sweeps,
        converged=found.descent.converged,
        imbalance=found.descent.imbalance,
        verification=verification,
    )
    return target, record


def rescaling_families(model: nn.Module, report: SymmetryReport) -> list[tuple[SymmetryFamily, str | None]]:
    """Return every family of rescalings with the reason why it cannot be balanced, or None where it can."""
    constrained = {weight.name for weight in constrained_weights(model)}
    return [(family, _why_left(family, constrained)) for family in report.families if family.kind == "rescaling"]


@dataclass(frozen=True)
class Rescaling:
    """Factors for the symmetries of some families, as a descent found them.

    Args:
        families: the families.
        descent: the logarithms of their factors, family by family, and how they were found.
    """

    families: tuple[SymmetryFamily, ...]
    descent: Descent

    def values(self, state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Yield the name of each tensor that takes part, and its rescaled values in float64.

        Args:
            state: the tensors that take part, and perhaps others, by name; they are not changed.
        """
        for name, exponents in _exponents(self.families).items():
            value = state[name].detach().to(torch.float64, copy=True)
            for partition, found in exponents.items():
                factors = found.logarithms(self.descent.steps).exp().to(value.device)
                value = partition.multiply(value, partition.spread(factors))
            yield name, value

    def steps_of(self, families: Sequence[SymmetryFamily]) -> Tensor:
        """The logarithms for the symmetries of other families: zeros for those that are not among its own."""
        steps = torch.split(self.descent.steps, [len(family.symmetries) for family in self.families])
        own = {id(family): found for family, found in zip(self.families, steps, strict=True)}
        return torch.cat([own.get(id(f), self.descent.steps.new_zeros(len(f.symmetries))) for f in families])


def smallest_norm(
    families: Sequence[SymmetryFamily], state: Mapping[str, Tensor], start: Rescaling | None = None
) -> Rescaling:
    """Find the rescaling to the smallest norm; nothing is changed. A descent that does not converge is logged.

    Args:
        families: rescalings that can be balanced.
        state: the tensors that take part, and perhaps others, by name.
        start: where to start: a rescaling that was found for this state, or for another one. It comes back where it is
            the one to the smallest norm, and is improved where it is not, so that it is never out of date.
    """
    weights = [Energies.of(state[name], exponents) for name, exponents in _exponents(families).items()]
    steps = torch.zeros(sum(len(family.symmetries) for family in families), dtype=torch.float64, device="cpu")
    descent = descend(weights, steps if start is None or not families else start.steps_of(families))
    if not descent.converged:
        _log.warning("balance: %s", descent)
    return Rescaling(tuple(families), descent)


def _exponents(families: Sequence[SymmetryFamily]) -> dict[str, dict[Partition, Exponents]]:
    """For each parameter and each of its partitions how the symmetries of all families move the groups."""
    entries: dict[str, dict[Partition, list[tuple[int, int, float]]]] = {}
    symmetries = [(family, symmetry) for family in families for symmetry in family.symmetries]
    for number, (family, symmetry) in enumerate(symmetries):
        for place, exponents in symmetry.items():
            groups = entries.setdefault(place[0], {}).setdefault(family.partitions[place], [])
            groups.extend((group, number, power) for group, power in exponents.items())
    return {
        name: {partition: Exponents.of(found, (partition.n_groups, len(symmetries))) for partition, found in by.items()}
        for name, by in entries.items()
    }


def _why_left(family: SymmetryFamily, constrained: set[str]) -> str | None:
    if family.certificate.verdict != "invariant":
        return f"certificate {family.certificate}"
    if family.absorbed:
        return "stored statistics would have to follow"
    if len(family.parameters) < len(family.partitions):
        return "it moves rows and columns of one weight at once"
    on_spheres = [name for name in family.parameters if name in constrained]
    return f"{on_spheres[0]} is on spheres" if on_spheres else None


def _put_in_place(model: nn.Module, target: nn.Module, rescaling: Rescaling, inputs: Any) -> Verification:
    before = both_modes(model, inputs)
    parameters = dict(target.named_parameters())
    saved: dict[str, Tensor] = {}
    with torch.no_grad():
        for name, value in rescaling.values(parameters):
            saved[name] = parameters[name].detach().clone()
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
