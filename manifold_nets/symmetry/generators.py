"""Generators: what one symmetry moves, as a vector field on the weights.

A symmetry is a one-parameter group of changes of the parameters that does not change the function. It is given by its
generator ξ(w): ``c ⊙ w`` for scales, joint scales and rescalings (``exp(t) ↦ α``, each group is multiplied by
``α ** c``), and a constant ``d`` for shifts. Symmetries of the same form, such as those of the filters of one weight,
are stored together in arrays.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from manifold_nets.groups import Partition

__all__ = ["Direction", "Generators", "Part", "single_entries"]

# For each parameter the coefficient of each entry that moves, by its flat index.
Direction = dict[str, dict[int, float]]


def single_entries(shape: Sequence[int]) -> Partition:
    """Every entry by itself."""
    return Partition(tuple(shape), tuple(shape), tuple(range(len(shape))))


@dataclass(frozen=True)
class Part:
    """How some generators move one parameter.

    Args:
        parameter: its name.
        partition: a partition of it.
        groups: the groups that move.
        numbers: for each of them the number of the generator that moves it.
        coefficients: for each of them the entries of c or d, the same for all entries of the group.
    """

    parameter: str
    partition: Partition
    groups: NDArray[np.int64]
    numbers: NDArray[np.int64]
    coefficients: NDArray[np.float64]


@dataclass(frozen=True)
class Generators:
    """Independent symmetries of the same form.

    Args:
        parts: the parts of parameters that move.
        count: how many there are.
        adds: whether they are shifts, ``ξ = d``; otherwise ``ξ = c ⊙ w``.
        far: whether the finite move uses only its largest moves, in both directions: for claims by gradients alone.
    """

    parts: tuple[Part, ...]
    count: int
    adds: bool = False
    far: bool = False

    @classmethod
    def of_groups(cls, parameter: str, partition: Partition, groups: Sequence[int], **more: bool) -> Generators:
        """One for each of some groups of a parameter."""
        numbers = np.arange(len(groups))
        part = Part(parameter, partition, np.asarray(groups, dtype=np.int64), numbers, np.ones(len(groups)))
        return cls((part,), len(groups), **more)

    @classmethod
    def of_shifts(cls, directions: Sequence[Direction], shapes: Mapping[str, tuple[int, ...]]) -> Generators:
        """One for each of some shifts that are given entry by entry."""
        parts = []
        for name in directions[0] if directions else ():
            moved = [direction.get(name, {}) for direction in directions]
            numbers = np.repeat(np.arange(len(moved)), [len(entries) for entries in moved])
            groups = np.array([index for entries in moved for index in entries], dtype=np.int64)
            coefficients = np.array([c for entries in moved for c in entries.values()], dtype=np.float64)
            parts.append(Part(name, single_entries(shapes[name]), groups, numbers, coefficients))
        return cls(tuple(parts), len(directions), adds=True)

    def without(self, numbers: Collection[int]) -> Generators:
        """The same with some of them at rest."""
        if not numbers:
            return self
        parts = []
        for part in self.parts:
            kept = ~np.isin(part.numbers, list(numbers))
            groups, moved, powers = part.groups[kept], part.numbers[kept], part.coefficients[kept]
            parts.append(Part(part.parameter, part.partition, groups, moved, powers))
        return replace(self, parts=tuple(parts))

    @property
    def entries(self) -> NDArray[np.float64]:
        """How many entries each of them moves."""
        moved = np.zeros(self.count)
        for part in self.parts:
            np.add.at(moved, part.numbers, float(part.partition.group_size))
        return moved
