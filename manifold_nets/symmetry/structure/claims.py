"""What the graph says of one weight: which of its scales are free, and why the others are not."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from manifold_nets.groups import Partition
from manifold_nets.symmetry.rules import Absorption
from manifold_nets.symmetry.structure.partitions import joined_partition
from manifold_nets.symmetry.structure.scales import UNSCALED, Break, Ids, Scales

__all__ = ["Structure"]


@dataclass
class Structure:
    """What the graph says of one weight.

    Args:
        name: the weight.
        seed: the partition whose groups were given one scale each.
        scales: what the network demands of these scales.
        absorptions: the normalizations that absorb some of them.
        companions: biases that are scaled along, with the scale of each entry.
        used: whether some output depends on it.
    """

    name: str
    seed: Partition
    scales: Scales
    absorptions: list[Absorption]
    companions: dict[str, Ids]
    used: bool = True

    @cached_property
    def absorbed(self) -> frozenset[int]:
        """The free scales that some normalization removes."""
        removed = (self.scales.scales_in(a.ids).tolist() for a in self.absorptions if a.kind != "buffer")
        return frozenset(scale for scales in removed for scale in scales)

    @cached_property
    def free(self) -> list[list[int]]:
        """Groups of scales that are free: joined with each other, pinned by nothing, absorbed by something."""
        return [members for number, members in self._classes.items() if self._is_free(number)]

    @cached_property
    def _classes(self) -> dict[int, list[int]]:
        """The scales of the weight, without those that zeros got on the way, by their common form."""
        return self.scales.classes(self.seed.n_groups)

    def _is_free(self, number: int) -> bool:
        """Whether a form is one scale that is free and absorbed: no product, no power."""
        return number - 1 in self.absorbed

    @property
    def breaks(self) -> list[Break]:
        """The distinct reasons why scales are not free, in the order of the scales."""
        found: dict[Break, None] = {}
        # Where a scale ends that nothing refuses and no normalization absorbs.
        nowhere = Break("scale" if self.used else "unused", "", "reaches neither a normalization nor the output")
        ends = self.scales.ends() if self.used else {}
        for number, members in self._classes.items():
            because, form = self.scales.break_of(members[0]), self.scales.form(number)
            if because is not None:
                found[because] = None
            elif len(form) > 1:
                found[Break("product", "", "its scale is tied to a product of other scales of the weight")] = None
            elif not self._is_free(number):
                found[ends.get(min(form), nowhere)] = None
        return list(found)

    @cached_property
    def partition(self) -> Partition | None:
        """The partition into free groups; None where some part of the weight is not free."""
        if self._is_covered:
            return joined_partition(self.seed, self.free)
        # Where scales are tied to products of others, the whole weight may still be free as one group.
        if self.absorbed and not self.scales.all_pinned and self.scales.allows(np.ones(self.seed.n_groups)):
            return Partition.whole(self.seed.shape)
        return None

    @property
    def _is_covered(self) -> bool:
        return sum(len(members) for members in self.free) == self.seed.n_groups

    @property
    def count(self) -> int:
        """How many groups the weight has, whether or not a view can express them; 0 where it has none."""
        if self.partition is None:
            return 0
        return len(self.free) if self._is_covered else 1

    def groups_of_forms(self, ids: Ids, groups: Ids) -> tuple[int, ...]:
        """Number of the group by whose scale each entry is multiplied: −1 for none, −2 for a product or a power."""
        roots = self.scales.roots(ids).reshape(-1)
        group_of = np.full(self.scales.count + 1, -1)
        group_of[1 : len(groups) + 1] = groups  # further scales are those of zeros
        found = group_of[np.maximum(roots, UNSCALED)]
        for number in np.unique(roots[roots < UNSCALED]).tolist():
            exponents: dict[int, float] = {}
            for scale, c in self.scales.form(number).items():
                group = int(group_of[scale + 1])
                if group >= 0:
                    exponents[group] = exponents.get(group, 0.0) + c
            plain = [group for group, c in exponents.items() if c == 1.0]
            found[roots == number] = (
                -1 if not any(exponents.values()) else plain[0] if len(exponents) == len(plain) == 1 else -2
            )
        return tuple(found.tolist())

    def group_of_scale(self, partition: Partition) -> Ids:
        """Number of the group of ``partition`` that each scale belongs to."""
        seed_ids = self.seed.group_ids().reshape(-1).numpy()
        group_ids = partition.group_ids().reshape(-1).numpy()
        result = np.zeros(self.seed.n_groups, dtype=np.int64)
        result[seed_ids] = group_ids
        return result
