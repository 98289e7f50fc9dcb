"""The squared norm of a weight as a function of rescalings: sums of squares over blocks that move in one piece.

Rescalings with logarithms t multiply a block by ``exp(Σ_s c_s t_s)`` and its sum of squares by the square of that. The
sums are taken once; what a descent asks of them are products of a matrix with vectors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from manifold_nets.groups import Partition
from manifold_nets.symmetry.structure.partitions import joined_partition

__all__ = ["Energies", "Exponents", "ScaledEnergies"]


@dataclass(frozen=True)
class Exponents:
    """The exponents with which symmetries move the cells of a weight: a sparse matrix C, cells by symmetries.

    Args:
        cells: row of each entry, int64.
        symmetries: column of each entry, int64.
        powers: the entries, float64.
        shape: how many cells and symmetries there are.

    Example:
        >>> exponents = Exponents.of([(0, 0, 1.0), (2, 1, -1.0)], (3, 2))
        >>> exponents.logarithms(torch.tensor([0.5, 2.0], dtype=torch.float64)).tolist()
        [0.5, 0.0, -2.0]
    """

    cells: Tensor
    symmetries: Tensor
    powers: Tensor
    shape: tuple[int, int]

    @classmethod
    def of(cls, entries: Sequence[tuple[int, int, float]], shape: tuple[int, int]) -> Exponents:
        """Build the matrix from (cell, symmetry, exponent)."""
        cells, symmetries, powers = zip(*entries, strict=True) if entries else ((), (), ())
        indices = torch.tensor([cells, symmetries], dtype=torch.int64, device="cpu")
        return cls(indices[0], indices[1], torch.tensor(powers, dtype=torch.float64, device="cpu"), shape)

    def logarithms(self, steps: Tensor) -> Tensor:
        """``C t``: the logarithm of each cell's factor, shape (cells,)."""
        return steps.new_zeros(self.shape[0]).index_add_(0, self.cells, self.powers * steps[self.symmetries])

    def collected(self, sums: Tensor, powers: Tensor) -> Tensor:
        """``Cᵀ e`` with other entries at the same places: a sum over the cells of each symmetry."""
        return sums.new_zeros(self.shape[1]).index_add_(0, self.symmetries, powers * sums[self.cells])

    def without_cells(self, count: int) -> Exponents:
        """As many cells that nothing moves, for the same symmetries."""
        return Exponents(self.cells[:0], self.symmetries[:0], self.powers[:0], (count, self.shape[1]))

    def crowds(self) -> Tensor:
        """How many symmetries move each cell, shape (cells,)."""
        return torch.bincount(self.cells, minlength=self.shape[0]).double()

    def on(self, groups: Tensor) -> Exponents:
        """The matrix with a row for each element of an index: cell ``groups[i]`` in row i."""
        order = self.cells.argsort(stable=True)
        counts = torch.bincount(self.cells, minlength=self.shape[0])
        many = counts[groups]
        rows = torch.arange(len(groups), device="cpu").repeat_interleave(many)
        within = torch.arange(len(rows), device="cpu") - (many.cumsum(0) - many)[rows]
        taken = order[(counts.cumsum(0) - counts)[groups][rows] + within]
        return Exponents(rows, self.symmetries[taken], self.powers[taken], (len(groups), self.shape[1]))

    def classes(self) -> list[list[int]]:
        """The cells, those together that every symmetry moves alike; ordered by their first."""
        moved: list[list[tuple[int, float]]] = [[] for _ in range(self.shape[0])]
        for cell, *how in zip(*(x.tolist() for x in (self.cells, self.symmetries, self.powers)), strict=True):
            moved[cell].append((how[0], how[1]))
        alike: dict[tuple[tuple[int, float], ...], list[int]] = {}
        for cell, signature in enumerate(moved):
            alike.setdefault(tuple(sorted(signature)), []).append(cell)
        return list(alike.values())


@dataclass(frozen=True)
class ScaledEnergies:
    """Sums of squares of a weight after rescaling, by the rows and by the columns of its blocks; factors likewise."""

    rows: Tensor
    columns: Tensor
    row_factors: Tensor
    column_factors: Tensor

    @property
    def total(self) -> float:
        """The squared norm of the weight."""
        return float(self.rows.sum())


@dataclass(frozen=True)
class Energies:
    """Sums of squares of a weight over the blocks that rescalings move in one piece, as a matrix.

    Rows and columns of a convolution weight, say, have its kernels as common blocks. Where partitions do not split into
    such as number the rows and such as number the columns of a matrix of blocks, it has one column.

    Args:
        blocks: the sums, on the device of the weight, float64.
        rows: how symmetries move the rows of the matrix.
        columns: how they move its columns.

    Example:
        >>> rows, columns = Partition.filters((2, 3, 5)), Partition((2, 3, 5), (2, 3, 5), (1,))
        >>> exponents = {rows: Exponents.of([(0, 0, 1.0)], (2, 2)), columns: Exponents.of([(1, 1, -1.0)], (3, 2))}
        >>> energies = Energies.of(torch.ones(2, 3, 5), exponents)
        >>> tuple(energies.blocks.shape)
        (2, 3)
        >>> energies.at(torch.tensor([math.log(2), math.log(3)], dtype=torch.float64)).columns
        tensor([25.0000,  2.7778, 25.0000], dtype=torch.float64)
    """

    blocks: Tensor
    rows: Exponents
    columns: Exponents

    @classmethod
    def of(cls, weight: Tensor, exponents: Mapping[Partition, Exponents]) -> Energies:
        """Sum the squares of a weight over blocks.

        Args:
            weight: the weight.
            exponents: for each partition how symmetries move its groups.
        """
        coarse = [_coarsened(*item) for item in exponents.items()]
        squares = weight.detach().to(torch.float64, copy=True).square_()
        view = _common_view([partition for partition, _ in coarse])
        if view is None:
            rows = _stacked([found.on(partition.group_ids().flatten()) for partition, found in coarse])
            return cls(squares.reshape(-1, 1), rows, rows.without_cells(1))
        kept = [_axes_in(view, partition) for partition, _ in coarse]
        sides = _sides(kept)
        inside = [axis for axis in range(len(view)) if axis not in sides[0] + sides[1]]
        blocks = squares.reshape(view)
        blocks = (blocks.sum(inside, keepdim=True) if inside else blocks).permute([*sides[0], *sides[1], *inside])
        size = math.prod(view[axis] for axis in sides[0])
        moved: tuple[list[Exponents], list[Exponents]] = [], []
        for own, (_, found) in zip(kept, coarse, strict=True):
            side = int(bool(own) and own[0] in sides[1])
            moved[side].append(found.on(_numbers(view, sides[side], own)))
        rows = _stacked(moved[0])
        columns = _stacked(moved[1]) if moved[1] else rows.without_cells(1)
        return cls(blocks.reshape(size, -1).contiguous(), rows, columns)

    def at(self, steps: Tensor) -> ScaledEnergies:
        """The sums after rescaling by ``α_s = exp(t_s)``; all of it float64 on the CPU, where ``steps`` is."""
        row_factors = (2 * self.rows.logarithms(steps)).exp()
        column_factors = (2 * self.columns.logarithms(steps)).exp()
        rows = row_factors * self._times(column_factors)
        return ScaledEnergies(rows, column_factors * self._transposed_times(row_factors), row_factors, column_factors)

    def hessian_times(self, scaled: ScaledEnergies, direction: Tensor) -> Tensor:
        """The Hessian of the squared norm in t times a vector, shape (symmetries,), in two products with the blocks."""
        rows, columns = self.rows.logarithms(direction), self.columns.logarithms(direction)
        by_row = scaled.rows * rows + scaled.row_factors * self._times(scaled.column_factors * columns)
        by_column = scaled.columns * columns + scaled.column_factors * self._transposed_times(scaled.row_factors * rows)
        return 4 * (
            self.rows.collected(by_row, self.rows.powers) + self.columns.collected(by_column, self.columns.powers)
        )

    def _times(self, columns: Tensor) -> Tensor:
        return (self.blocks @ columns.to(self.blocks.device)).cpu()

    def _transposed_times(self, rows: Tensor) -> Tensor:
        return (self.blocks.T @ rows.to(self.blocks.device)).cpu()


def _coarsened(partition: Partition, exponents: Exponents) -> tuple[Partition, Exponents]:
    """Join groups that every symmetry moves alike, where a view of the weight has the joined ones as its groups."""
    classes = exponents.classes()
    if len(classes) == partition.n_groups:
        return partition, exponents
    joined = joined_partition(partition, classes)
    if joined.n_groups != len(classes):
        return partition, exponents
    # The groups of the first partition, joined in the same way, number the classes in the order of the second.
    groups = Partition(partition.group_shape, partition.group_shape, tuple(range(len(partition.group_shape))))
    first = torch.empty(len(classes), dtype=torch.int64, device="cpu")
    ids = joined_partition(groups, classes).group_ids().flatten()
    for members in classes:
        first[ids[members[0]]] = members[0]
    return joined, exponents.on(first)


def _stacked(found: Sequence[Exponents]) -> Exponents:
    """The sum of matrices of one shape."""
    cells, symmetries, powers = (torch.cat([getattr(m, n) for m in found]) for n in ("cells", "symmetries", "powers"))
    return Exponents(cells, symmetries, powers, found[0].shape)


def _sides(kept: Sequence[Sequence[int]]) -> tuple[list[int], list[int]]:
    """Split axes in two, such that each partition keeps axes of one side alone; else all are on the first side."""
    parts: list[set[int]] = []
    for axes in kept:
        if axes:
            touched = [part for part in parts if part & set(axes)]
            parts = [part for part in parts if not part & set(axes)] + [set(axes).union(*touched)]
    if len(parts) == 2:
        first, second = sorted(parts, key=min)
        return sorted(first), sorted(second)
    return sorted(set().union(*parts)), []


def _numbers(view: Sequence[int], side: Sequence[int], own: Sequence[int]) -> Tensor:
    """For each cell along the axes of a side the number of the group that it lies in."""
    sizes = [view[axis] if axis in own else 1 for axis in side]
    numbers = torch.arange(math.prod(sizes), device="cpu").reshape(sizes)
    return numbers.expand([view[axis] for axis in side]).flatten()


def _ends(view: Sequence[int]) -> list[int]:
    """Entries behind the start of each axis, and 1 behind the last: products of the sizes from the right."""
    return [math.prod(view[axis:]) for axis in range(len(view) + 1)]


def _common_view(partitions: Sequence[Partition]) -> tuple[int, ...] | None:
    """The coarsest view that splits no axis of any partition's view, if there is one."""
    ends = sorted({end for partition in partitions for end in _ends(partition.view)}, reverse=True)
    steps = list(pairwise(ends))
    return None if any(a % b for a, b in steps) else tuple(a // b for a, b in steps)


def _axes_in(view: tuple[int, ...], partition: Partition) -> list[int]:
    """The axes of a finer view that make up the kept axes of a partition."""
    fine, own = _ends(view), _ends(partition.view)
    return [
        axis
        for axis in range(len(view))
        if any(own[kept] >= fine[axis] and fine[axis + 1] >= own[kept + 1] for kept in partition.kept)
    ]
