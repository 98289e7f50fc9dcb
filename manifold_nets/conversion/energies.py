"""Sums of squares of a weight over the blocks that several partitions have in common."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from torch import Tensor

from manifold_nets.groups import Partition

__all__ = ["Energies"]


@dataclass
class Energies:
    """Sums of non-negative entries over blocks, for sums over the groups of any of some partitions.

    Rows and columns of a convolution weight, say, have its kernels as common blocks: their sums are a matrix, and every
    sum over a row or a column of the weight is one of that matrix. Factors of rows and columns keep that true; they are
    kept beside the matrix, so that a sum is a product of matrix and vector and nothing large is written.

    Args:
        blocks: the sums, without the factors.
        coarse: each partition of the weight as one of the blocks.
        along: factors along axes of the blocks.

    Example:
        >>> import torch
        >>> rows, columns = Partition((2, 3, 5), (2, 3, 5), (0,)), Partition((2, 3, 5), (2, 15), (1,))
        >>> energies = Energies.of(torch.ones(2, 3, 5), [rows, Partition((2, 3, 5), (2, 3, 5), (1,))])
        >>> tuple(energies.blocks.shape), energies.over(rows).tolist()
        ((2, 3), [15.0, 15.0])
        >>> tuple(Energies.of(torch.ones(2, 3, 5), [rows, columns]).blocks.shape)
        (2, 3, 5)
    """

    blocks: Tensor
    coarse: dict[Partition, Partition]
    along: dict[int, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, entries: Tensor, partitions: Sequence[Partition]) -> Energies:
        """Sum entries over the largest blocks that lie within one group of every partition.

        Where no view of the weight is finer than those of all partitions, the blocks are single entries.
        """
        distinct = list(dict.fromkeys(partitions))
        view = _common_view(distinct)
        if view is None:
            return cls(entries.clone(), {partition: partition for partition in distinct})
        kept = {partition: _axes_in(view, partition) for partition in distinct}
        every = sorted(set().union(*kept.values()))
        inside = [axis for axis in range(len(view)) if axis not in every]
        blocks = entries.reshape(view)
        blocks = blocks.sum(inside) if inside else blocks.clone()
        shape = tuple(view[axis] for axis in every) or (1,)
        coarse = {p: Partition(shape, shape, tuple(every.index(axis) for axis in axes)) for p, axes in kept.items()}
        return cls(blocks.reshape(shape), coarse)

    def over(self, partition: Partition) -> Tensor:
        """The sum over each group of a partition, shape (groups,)."""
        coarse = self.coarse[partition]
        if self.blocks.ndim == 2 and len(coarse.kept) == 1:
            (axis,) = coarse.kept
            matrix = self.blocks if axis == 0 else self.blocks.T
            across = self.along.get(1 - axis)
            sums = matrix.sum(1) if across is None else matrix @ across
            return sums * self.along.get(axis, 1.0)
        blocks = self.blocks
        for axis, factors in self.along.items():
            blocks = blocks * factors.view([-1 if other == axis else 1 for other in range(blocks.ndim)])
        return coarse.sum(blocks).flatten()

    def multiply(self, partition: Partition, factors: Tensor) -> None:
        """Multiply every group of a partition by a factor of its own, shape (groups,)."""
        coarse, factors = self.coarse[partition], factors.to(self.blocks.device)
        if len(coarse.kept) == 1:
            (axis,) = coarse.kept
            self.along[axis] = self.along.get(axis, 1.0) * factors
        else:
            self.blocks = coarse.multiply(self.blocks, coarse.spread(factors))


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
