"""The squared norm of weights as a function of rescalings: sums of squares over blocks that move in one piece.

Rescalings with logarithms t multiply a block by ``exp(Σ_s c_s t_s)`` and its sum of squares by the square of that. The
sums of a weight are taken once, as a matrix B whose rows and columns are cells that symmetries move: the squared norm
is ``rᵀ B c`` with the factors r of its rows and c of its columns. What a descent asks are products with B.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from manifold_nets.groups import Partition
from manifold_nets.symmetry.seeds import joined_partition

__all__ = ["Energies", "exponents_of"]


def exponents_of(entries: Sequence[tuple[int, int, float]], shape: tuple[int, int]) -> Tensor:
    """The exponents with which symmetries move cells: a sparse matrix, cells by symmetries, float64 on the CPU.

    Example:
        >>> exponents = exponents_of([(0, 0, 1.0), (2, 1, -1.0)], (3, 2))
        >>> (exponents @ torch.tensor([0.5, 2.0], dtype=torch.float64)).tolist()
        [0.5, 0.0, -2.0]
    """
    cells, symmetries, powers = zip(*entries, strict=True) if entries else ((), (), ())
    indices = torch.tensor([cells, symmetries], dtype=torch.int64, device="cpu")
    values = torch.tensor(powers, dtype=torch.float64, device="cpu")
    return torch.sparse_coo_tensor(indices, values, shape, check_invariants=True).coalesce()


@dataclass(frozen=True)
class Energies:
    """Sums of squares of a weight over the blocks that rescalings move in one piece, as a matrix.

    Rows and columns of a convolution weight, say, have its kernels as common blocks. Where partitions do not split into
    such as number the rows and such as number the columns of a matrix of blocks, it has one column.

    Args:
        blocks: the sums, on the device of the weight, float64.
        exponents: how symmetries move the rows of the matrix, and below that its columns; sparse.

    Example:
        >>> rows, columns = Partition.filters((2, 3, 5)), Partition((2, 3, 5), (2, 3, 5), (1,))
        >>> moved = {rows: exponents_of([(0, 0, 1.0)], (2, 2)), columns: exponents_of([(1, 1, -1.0)], (3, 2))}
        >>> energies = Energies.of(torch.ones(2, 3, 5), moved)
        >>> energies.blocks.tolist(), tuple(energies.exponents.shape)
        ([[5.0, 5.0, 5.0], [5.0, 5.0, 5.0]], (5, 2))
        >>> energies.products(torch.ones(5, dtype=torch.float64)).tolist()
        [15.0, 15.0, 10.0, 10.0, 10.0]
    """

    blocks: Tensor
    exponents: Tensor

    @classmethod
    def of(cls, weight: Tensor, exponents: Mapping[Partition, Tensor]) -> Energies:
        """Sum the squares of a weight over blocks.

        Args:
            weight: the weight.
            exponents: for each partition how symmetries move its groups.
        """
        coarse = [_coarsened(*item) for item in exponents.items()]
        squares = weight.detach().to(torch.float64, copy=True).square_()
        view = _common_view([partition for partition, _ in coarse])
        if view is None:
            return cls(squares.reshape(-1, 1), _stacked([(f, p.group_ids().flatten()) for p, f in coarse], []))
        kept = [_axes_in(view, partition) for partition, _ in coarse]
        sides = _sides(kept)
        inside = [axis for axis in range(len(view)) if axis not in sides[0] + sides[1]]
        blocks = squares.reshape(view)
        blocks = (blocks.sum(inside, keepdim=True) if inside else blocks).permute([*sides[0], *sides[1], *inside])
        moved: tuple[list[tuple[Tensor, Tensor]], ...] = ([], [])
        for own, (_, found) in zip(kept, coarse, strict=True):
            side = int(bool(own) and own[0] in sides[1])
            moved[side].append((found, _numbers(view, sides[side], own)))
        blocks = blocks.reshape(math.prod(view[axis] for axis in sides[0]), -1)
        return cls(blocks.contiguous(), _stacked(*moved))

    def products(self, factors: Tensor) -> Tensor:
        """``B c`` and below it ``Bᵀ r``, for the factors r of the rows and c of the columns; on the CPU."""
        rows, columns = torch.split(factors.to(self.blocks.device), list(self.blocks.shape))
        return torch.cat([self.blocks @ columns, self.blocks.T @ rows]).cpu()

    def counts(self) -> Tensor:
        """For each cell the largest number of symmetries that move one entry of it, shape (cells,)."""
        counts = torch.bincount(self.exponents.indices()[0], minlength=len(self.exponents)).double()
        rows, columns = torch.split(counts, list(self.blocks.shape))
        return torch.cat([rows + columns.max(), columns + rows.max()])


def _stacked(rows: Sequence[tuple[Tensor, Tensor]], columns: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """The exponents of the rows and columns of a matrix: sums of matrices, each with the cell of every row."""
    first = [found.index_select(0, cells) for found, cells in rows]
    second = [found.index_select(0, cells) for found, cells in columns] or [exponents_of([], (1, first[0].shape[1]))]
    return torch.cat([sum(first[1:], first[0]), sum(second[1:], second[0])]).coalesce()


def _coarsened(partition: Partition, exponents: Tensor) -> tuple[Partition, Tensor]:
    """Join groups that every symmetry moves alike, where a view of the weight has the joined ones as its groups."""
    moved: list[list[tuple[int, float]]] = [[] for _ in range(len(exponents))]
    for cell, symmetry, power in zip(*exponents.indices().tolist(), exponents.values().tolist(), strict=True):
        moved[cell].append((symmetry, power))
    alike: dict[tuple[tuple[int, float], ...], list[int]] = {}
    for cell, signature in enumerate(moved):
        alike.setdefault(tuple(signature), []).append(cell)
    classes = list(alike.values())
    joined = joined_partition(partition, classes) if len(classes) < partition.n_groups else partition
    if joined is partition or joined.n_groups != len(classes):
        return partition, exponents
    # The groups of the first partition, joined in the same way, number the classes in the order of the second.
    groups = Partition(partition.group_shape, partition.group_shape, tuple(range(len(partition.group_shape))))
    first = torch.empty(len(classes), dtype=torch.int64, device="cpu")
    ids = joined_partition(groups, classes).group_ids().flatten()
    for members in classes:
        first[ids[members[0]]] = members[0]
    return joined, exponents.index_select(0, first).coalesce()


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
