"""Reading the Euler certificate of one weight: which groups of a partition it calls invariant."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor

from manifold_nets.errors.base import listed
from manifold_nets.groups import Partition
from manifold_nets.models import groups_not_finite
from manifold_nets.symmetry.certificate.euler import EVIDENCE_FLOOR, EulerField
from manifold_nets.symmetry.findings.report import Certificate

__all__ = ["ROUNDED", "Certifier"]

# A sum this small against the evidence floor, some 45 roundings of the largest product of the network, refutes nothing:
# where gradients nearly cancel, as those of a channel with one active entry do, it is what rounding leaves.
ROUNDED = 1e-3
# Of some groups, which ones the pass could tell nothing of, and why.
Excused = Callable[[Tensor], tuple[Tensor, str]]


class Certifier:
    """Compares ``|Σ_G w ⊙ ∂L/∂w|`` with ``‖w_G‖ ‖∂L/∂w_G‖``, group by group.

    Args:
        field: weights and gradients of one float64 pass.
        tolerance: largest value of an invariant group.
        not_finite: for some parameters which of their entries are not finite in the model, and were drawn anew.
    """

    def __init__(
        self, field: EulerField, tolerance: float, not_finite: Mapping[str, Tensor] = MappingProxyType({})
    ) -> None:
        self.field, self.tolerance, self.not_finite = field, tolerance, not_finite
        names = [] if field.silent else [name for name, shape in field.shapes.items() if len(shape) >= 2]
        self.largest = max(filter(math.isfinite, map(field.size, names)), default=0.0)
        self.floor = EVIDENCE_FLOOR * self.largest

    def alone(self, name: str, partition: Partition) -> Certificate:
        """Certificate of the groups of a partition without any bias."""
        if self.field.silent:
            return Certificate(None, "no evidence", 0, 0, partition.n_groups)
        sums = self.field.sums(name, partition)
        lost = self.lost(name, partition)
        return self.verdict(sums.products, sums.weights.sqrt(), sums.gradients.sqrt(), self.field.size(name), lost=lost)

    def with_evidence(self, name: str, partition: Partition) -> tuple[int, ...]:
        """The numbers of the groups that have a gradient."""
        sums = self.field.sums(name, partition)
        return tuple((sums.weights.sqrt() * sums.gradients.sqrt() > self.floor).nonzero().flatten().tolist())

    def lost(self, name: str, partition: Partition) -> Sequence[int]:
        """The groups of a partition that are not finite in the model."""
        return groups_not_finite(self.not_finite[name], partition) if name in self.not_finite else ()

    def verdict(
        self,
        sums: Tensor,
        weight: Tensor,
        gradient: Tensor,
        most: float = math.inf,
        *,
        excused: Excused | None = None,
        lost: Sequence[int] = (),
    ) -> Certificate:
        """Certificate from the sum of each group and the norms of its weights and gradients.

        Where filters of different scales make a group, the product of its norms may be far above what any sum of it
        could be, and would hide that this one is not zero: ``most``, the size of the parameters, is what it is at most.
        Where groups are refuted, ``excused`` is asked which of them the pass could tell nothing of, and why. Those that
        are ``lost``, as they are not finite, and those whose gradient is not, have no evidence.
        """
        size = (weight * gradient).clamp_max(most if math.isfinite(most) else math.inf)
        evidence = size > self.floor
        evidence &= ~((sums.abs() > self.tolerance * size) & (sums.abs() <= ROUNDED * self.floor))
        values = torch.where(evidence, sums.abs() / size, torch.zeros_like(size))
        # A sum that is not a number is no evidence of invariance.
        refuted = (evidence & ~(values <= self.tolerance)) | ~sums.isfinite()
        unread, unknown = torch.zeros_like(evidence), ~gradient.isfinite()
        unread[list(lost)] = True
        because = [_not_finite(lost, len(sums))] if lost else []
        because += ["gradients are not finite on these inputs"] if bool((unknown & ~unread).any()) else []
        refuted, evidence = refuted & ~(unread | unknown), evidence & ~(unread | unknown)
        if excused is not None and bool(refuted.any()):
            without, words = excused(refuted | ~evidence)
            refuted, evidence = refuted & ~without, evidence & ~without
            because += [words] if words else []
        n_refuted, n_evidence = int(refuted.sum()), int((evidence | refuted).sum())
        verdict = "not invariant" if n_refuted else "invariant" if n_evidence else "no evidence"
        return Certificate(
            value=_finite(float(values[evidence | refuted].max())) if n_evidence else None,
            verdict=verdict,
            groups_certified=n_evidence - n_refuted,
            groups_refuted=n_refuted,
            groups_without_evidence=len(sums) - n_evidence,
            because="; ".join(because),
            silent=tuple((~(evidence | refuted)).nonzero().flatten().tolist()),
        )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _not_finite(groups: Sequence[int], count: int) -> str:
    if count == 1:
        return "it is not finite"
    return f"group{'s' if len(groups) > 1 else ''} {listed(groups)} {'are' if len(groups) > 1 else 'is'} not finite"
