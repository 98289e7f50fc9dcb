"""The gradient test: which symmetries one float64 gradient confirms, refutes, or gives no evidence about.

If the output does not change along a vector field ξ on the weights then ``⟨∂L/∂w, ξ⟩ = 0``, for every cotangent of the
output: for scales, joint scales and rescalings ``ξ = c ⊙ w`` (Euler), for shifts ``ξ = d``. So one forward and one
backward pass with a random cotangent test all generators at once, each by

    value = |Σ c_i Σ_i w ⊙ g| / Σ |c_i| ‖w_i‖ ‖g_i‖    or    |Σ d_i Σ_i g| / Σ |d_i| √n_i ‖g_i‖ ,

with sums over the groups i that the generator moves and g = ∂L/∂w. For a symmetry this value is a rounding error;
otherwise it is of order one. The gradient is computed in float64, in training mode, with the eps of every normalization
made negligible and with dropout off. Where it vanishes there is no evidence.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from manifold_nets.errors import listed
from manifold_nets.groups import Partition
from manifold_nets.models import groups_not_finite
from manifold_nets.symmetry.generators import Generators
from manifold_nets.symmetry.gradients import GradientPass
from manifold_nets.symmetry.low_variance import LowVariance, Places, describe
from manifold_nets.symmetry.report import Certificate

__all__ = ["EVIDENCE_FLOOR", "ROUNDED", "Excuse", "InvarianceTest"]

# A gradient this much smaller than the largest one of the network is rounding and proves nothing.
EVIDENCE_FLOOR = 1e-11
# So is one that is smaller than the rounding of the loss, as the gradients of attention with one key are.
_LOSS_ROUNDING = 64 * float(np.finfo(np.float64).eps)
# A sum this small against the evidence floor, some 45 roundings of the largest product of the network, refutes nothing:
# where gradients nearly cancel, as those of a channel with one active entry do, it is what rounding leaves.
ROUNDED = 1e-3
Floats = NDArray[np.float64]
# Given the generators that are refuted or lack a gradient: those absorbed by a statistic of low variance, and where.
Excuse = Callable[[NDArray[np.bool_]], Mapping[int, Places]]


class InvarianceTest:
    """Tests generators by the gradients of one pass.

    Args:
        gradients: weights and gradients of one float64 pass.
        tolerance: largest value of a symmetry.
        low_variance: finds the statistics without variance, for generators that are refuted.
        not_finite: for some parameters which of their entries are not finite in the model, and were drawn anew.
    """

    def __init__(
        self,
        gradients: GradientPass,
        tolerance: float,
        low_variance: LowVariance | None = None,
        not_finite: Mapping[str, Tensor] = MappingProxyType({}),
    ) -> None:
        self.gradients, self.tolerance, self.low_variance = gradients, tolerance, low_variance
        self.not_finite = not_finite

    @cached_property
    def largest(self) -> float:
        """The size ``‖w_i‖ ‖g_i‖`` of the largest group of a weight."""
        names = [name for name, shape in self.gradients.shapes.items() if len(shape) >= 2 and 0 not in shape]
        return max(filter(math.isfinite, map(self.gradients.largest_group, names)), default=0.0)

    def floor(self, *, adds: bool = False) -> float:
        """The size up to which a generator has no evidence."""
        largest = self.gradients.largest_slope if adds else self.largest
        loss = abs(self.gradients.loss)
        return max(EVIDENCE_FLOOR * largest, _LOSS_ROUNDING * loss if math.isfinite(loss) else 0.0)

    def values(self, totals: Floats, sizes: Floats, *, adds: bool) -> Floats:
        """|⟨g, ξ⟩| over its size, for sums that only the numbers know; infinite where there is no evidence."""
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.where(sizes > self.floor(adds=adds), np.abs(totals) / sizes, np.inf)

    def of_partition(self, name: str, partition: Partition) -> Certificate:
        """Certificate of all groups of a parameter without any bias."""
        return self.certificate(Generators.of_groups(name, partition, range(partition.n_groups)), claimed=False)

    def with_evidence(self, name: str, partition: Partition) -> tuple[int, ...]:
        """The groups of a partition that have a gradient."""
        return tuple(np.flatnonzero(self._part_sums(name, partition, adds=False)[1] > self.floor()).tolist())

    def certificate(self, generators: Generators, excuse: Excuse | None = None, *, claimed: bool = True) -> Certificate:
        """Test each generator.

        Args:
            generators: what may be a symmetry.
            excuse: asked where some are refuted; those that it returns have no evidence.
            claimed: whether the structure claims them. A single entry, which moves the output wherever it has a
                gradient, then is compared with the other parameters.
        """
        count = generators.count
        if self.gradients.without_values:
            return Certificate(None, "no evidence", 0, 0, count, no_evidence=tuple(range(count)))
        totals, sizes, finite = self._sums(generators, claimed)
        floor = self.floor(adds=generators.adds)
        with np.errstate(invalid="ignore", divide="ignore"):
            evidence = sizes > floor
            evidence &= ~((totals > self.tolerance * sizes) & (totals <= ROUNDED * floor))
            values = np.where(evidence, totals / sizes, 0.0)
            # A sum that is not a number is no evidence of a symmetry.
            refuted = (evidence & ~(values <= self.tolerance)) | ~np.isfinite(totals)
        lost = self._lost(generators)
        because = [_not_finite(np.flatnonzero(lost).tolist(), count)] if lost.any() else []
        because += ["gradients are not finite on these inputs"] if bool((~finite & ~lost).any()) else []
        known = finite & ~lost
        if excuse is not None and bool((refuted & known).any()):
            places = excuse(known & (refuted | ~evidence))
            known[list(places)] = False
            because += [describe(places.values())] if places else []
        refuted, evidence = refuted & known, (evidence | refuted) & known
        n_refuted, n_evidence = int(refuted.sum()), int(evidence.sum())
        largest = float(values[evidence].max()) if n_evidence else math.nan
        return Certificate(
            value=largest if math.isfinite(largest) else None,
            verdict="not invariant" if n_refuted else "invariant" if n_evidence else "no evidence",
            groups_certified=n_evidence - n_refuted,
            groups_refuted=n_refuted,
            groups_without_evidence=count - n_evidence,
            because="; ".join(because),
            no_evidence=tuple(np.flatnonzero(~evidence).tolist()),
        )

    def _sums(self, generators: Generators, claimed: bool) -> tuple[Floats, Floats, NDArray[np.bool_]]:
        """|⟨g, ξ⟩| and its size for each generator, and whether its gradients are finite."""
        totals, sizes, finite = (np.zeros(generators.count) for _ in range(3))
        for part in generators.parts:
            total, size = self._part_sums(part.parameter, part.partition, adds=generators.adds)
            np.add.at(totals, part.numbers, part.coefficients * total[part.groups])
            np.add.at(sizes, part.numbers, np.abs(part.coefficients) * size[part.groups])
            squares = self.gradients.sums(part.parameter, part.partition).gradients
            np.add.at(finite, part.numbers, ~np.isfinite(squares[part.groups]))
        if claimed:
            sizes[generators.entries == 1] = self.gradients.largest_slope if generators.adds else self.largest
        return np.abs(totals), sizes, finite == 0

    def _part_sums(self, name: str, partition: Partition, *, adds: bool) -> tuple[Floats, Floats]:
        """Σ w ⊙ g or Σ g of each group, and the size that it is compared with.

        Where filters of different scales make a group, the product of its norms may be far above what any sum of it
        could be, and would hide that this one is not zero: the size of the parameter is what it is at most.
        """
        sums = self.gradients.sums(name, partition)
        norms = np.sqrt(sums.gradients)
        if adds:
            return sums.slopes, norms * partition.group_size**0.5
        most = self.gradients.size(name)
        return sums.products, np.minimum(np.sqrt(sums.weights) * norms, most if math.isfinite(most) else math.inf)

    def _lost(self, generators: Generators) -> NDArray[np.bool_]:
        """The scales that move entries which are not finite in the model."""
        lost = np.zeros(generators.count, dtype=bool)
        for part in generators.parts if not generators.adds else ():
            if part.parameter in self.not_finite:
                groups = groups_not_finite(self.not_finite[part.parameter], part.partition)
                lost[part.numbers[np.isin(part.groups, groups)]] = True
        return lost


def _not_finite(groups: Sequence[int], count: int) -> str:
    if count == 1:
        return "it is not finite"
    return f"group{'s' if len(groups) > 1 else ''} {listed(groups)} {'are' if len(groups) > 1 else 'is'} not finite"
