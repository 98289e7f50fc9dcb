"""What the graph says of one weight: which of its scales are free, and why the others are not."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from manifold_nets.groups import Partition
from manifold_nets.symmetry.rules import Absorption
from manifold_nets.symmetry.structure.partitions import joined_partition
from manifold_nets.symmetry.structure.scales import Break, Ids, Scales

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
    absorbed: set[int] = field(init=False)

    def __post_init__(self) -> None:
        removed = (a for a in self.absorptions if a.kind != "buffer")
        numbers = {n for a in removed for n in np.unique(self.scales.roots(a.ids)).tolist()}
        self.absorbed = {scale for n in numbers for scale in self.scales.form(n)}

    @property
    def free(self) -> list[list[int]]:
        """Groups of scales that are free: joined with each other, pinned by nothing, absorbed by something."""
        return [members for number, members in self._classes().items() if self._is_free(number)]

    def _classes(self) -> dict[int, list[int]]:
        """The scales of the weight, without those that zeros got on the way, by their common form."""
        return self.scales.classes(self.seed.n_groups)

    def _is_free(self, number: int) -> bool:
        """Whether a form is one scale that is free and absorbed: no product, no power."""
        form = self.scales.form(number)
        return list(form.values()) == [1.0] and not form.keys().isdisjoint(self.absorbed)

    @property
    def breaks(self) -> list[Break]:
        """The distinct reasons why scales are not free, in the order of the scales."""
        found: dict[Break, None] = {}
        for number, members in self._classes().items():
            because = self.scales.break_of(members[0])
            if because is not None:
                found[because] = None
            elif len(self.scales.form(number)) > 1:
                found[Break("product", "", "its scale is tied to a product of other scales of the weight")] = None
            elif not self._is_free(number):
                found[self._end(number)] = None
        return list(found)

    def _end(self, number: int) -> Break:
        """Where a scale ends that nothing refuses and no normalization absorbs."""
        if not self.used:
            return Break("unused", "", "reaches neither a normalization nor the output")
        return self.scales.end_of(number) or Break("scale", "", "reaches neither a normalization nor the output")

    @property
    def partition(self) -> Partition | None:
        """The partition into free groups; None where some part of the weight is not free."""
        free = self.free
        if sum(len(members) for members in free) == self.seed.n_groups:
            return joined_partition(self.seed, free)
        # Where scales are tied to products of others, the whole weight may still be free as one group.
        if self.absorbed and not self.scales.all_pinned and self.scales.allows(np.ones(self.seed.n_groups)):
            return Partition.whole(self.seed.shape)
        return None

    @property
    def count(self) -> int:
        """How many groups the weight has, whether or not a view can express them; 0 where it has none."""
        if self.partition is None:
            return 0
        free = self.free
        return len(free) if sum(len(members) for members in free) == self.seed.n_groups else 1

    def groups_of_forms(self, ids: Ids, groups: Ids) -> tuple[int, ...]:
        """Number of the group by whose scale each entry is multiplied: −1 for none, −2 for a product or a power."""
        numbers, inverse = np.unique(self.scales.roots(ids), return_inverse=True)
        found = []
        for number in numbers.tolist():
            exponents: dict[int, float] = {}
            for scale, c in self.scales.form(number).items():
                if scale >= len(groups):
                    continue  # of zeros
                exponents[int(groups[scale])] = exponents.get(int(groups[scale]), 0.0) + c
            plain = [group for group, c in exponents.items() if c == 1.0]
            found.append(-1 if not any(exponents.values()) else plain[0] if len(exponents) == len(plain) == 1 else -2)
        return tuple(np.array(found)[inverse.reshape(-1)].tolist())

    def group_of_scale(self, partition: Partition) -> Ids:
        """Number of the group of ``partition`` that each scale belongs to."""
        seed_ids = self.seed.group_ids().reshape(-1).numpy()
        group_ids = partition.group_ids().reshape(-1).numpy()
        result = np.zeros(self.seed.n_groups, dtype=np.int64)
        result[seed_ids] = group_ids
        return result
