"""Sums over groups of weights and gradients, block by block: no product of a whole weight takes memory.

The certificates read ``Σ_G w ⊙ g``, ``‖w_G‖²`` and ``‖g_G‖²`` of several partitions of one weight. All are taken in one
pass over slices that fit the cache, in float64; the sums of a coarser partition come from those of a finer one.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from manifold_nets.groups import Partition

__all__ = ["GroupSums", "coarsened", "group_sums"]

# Entries of a weight that are multiplied at once: some products of a megabyte each.
_BLOCK = 1 << 17


@dataclass(frozen=True)
class GroupSums:
    """What the certificates read of the groups of a partition: float64 vectors, one entry a group.

    Args:
        products: ``Σ_G w ⊙ g``.
        weights: ``Σ_G w²``.
        gradients: ``Σ_G g²``.
        slopes: ``Σ_G g``.
    """

    products: Tensor
    weights: Tensor
    gradients: Tensor
    slopes: Tensor

    def coarsened(self, fine: Partition, coarse: Partition) -> GroupSums | None:
        """The sums of a partition whose groups are unions of groups; None where they are not."""
        parts = [coarsened(values, fine, coarse) for values in (self.products, self.weights, self.gradients)]
        slopes = coarsened(self.slopes, fine, coarse)
        if slopes is None or any(part is None for part in parts):
            return None
        products, weights, gradients = (part for part in parts if part is not None)
        return GroupSums(products, weights, gradients, slopes)


def group_sums(weight: Tensor, gradient: Tensor, partitions: Sequence[Partition]) -> list[GroupSums]:
    """Return the sums of several partitions of one weight.

    Args:
        weight: ``w``, of any real dtype.
        gradient: ``g``, in the same shape.
        partitions: partitions of that shape.

    Example:
        >>> w, g = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.ones(2, 2)
        >>> [sums.products.tolist() for sums in group_sums(w, g, [Partition.filters((2, 2)), Partition.whole((2, 2))])]
        [[3.0, 7.0], [10.0]]
    """
    common: tuple[int, ...] | None = ()
    for partition in partitions:
        common = _common_view(partition.view, common) if common is not None else None
    if common is None:
        return [sums for partition in partitions for sums in group_sums(weight, gradient, [partition])]
    kept = [sorted(_refined(partition, common)) for partition in partitions]
    totals = [
        torch.zeros((4, *(n if axis in axes else 1 for axis, n in enumerate(common))), dtype=torch.float64)
        for axes in kept
    ]
    totals = [total.to(weight.device) for total in totals]
    viewed = weight.reshape(common), gradient.reshape(common)
    for block in _blocks(common):
        w, g = (x[block].to(torch.float64) for x in viewed)
        for number, entries in enumerate((w * g, w * w, g * g, g)):
            for axes, total in zip(kept, totals, strict=True):
                reduced = [axis for axis in range(len(common)) if axis not in axes]
                place = tuple(part if axis in axes else slice(None) for axis, part in enumerate(block))
                total[number][place] += entries.sum(reduced, keepdim=True) if reduced else entries
    return [GroupSums(*total.reshape(4, -1)) for total in totals]


def _blocks(view: tuple[int, ...]) -> Iterator[tuple[slice, ...]]:
    """Slices of a view that have about `_BLOCK` entries each."""
    inner = next((axis for axis in range(len(view)) if math.prod(view[axis + 1 :]) <= _BLOCK), 0)
    step = max(1, _BLOCK // math.prod(view[inner + 1 :]))
    steps = [1 if axis < inner else step if axis == inner else n for axis, n in enumerate(view)]
    ranges = [range(0, n, by) for n, by in zip(view, steps, strict=True)]
    for starts in itertools.product(*ranges):
        yield tuple(slice(start, start + by) for start, by in zip(starts, steps, strict=True))


def coarsened(values: Tensor, fine: Partition, coarse: Partition) -> Tensor | None:
    """Add the values of the groups of ``fine`` that lie in each group of ``coarse``; None where some lie in several.

    Args:
        values: one value a group of ``fine``.
        fine: a partition.
        coarse: a partition of the same shape.

    Example:
        >>> rows, blocks = Partition.filters((4, 3)), Partition.blocks((4, 3), 2)
        >>> coarsened(torch.tensor([1.0, 2.0, 3.0, 4.0]), rows, blocks)
        tensor([3., 7.])
        >>> coarsened(torch.tensor([1.0, 2.0]), blocks, rows) is None
        True
    """
    if not coarse.kept:
        return values.sum().reshape(1)
    common = _common_view(fine.view, coarse.view)
    if common is None:
        return None
    of_fine, of_coarse = _refined(fine, common), _refined(coarse, common)
    if not of_coarse <= of_fine:
        return None
    axes = sorted(of_fine)
    dropped = [number for number, axis in enumerate(axes) if axis not in of_coarse]
    viewed = values.reshape([common[axis] for axis in axes])
    return (viewed.sum(dropped) if dropped else viewed).reshape(-1)


def _ends(view: Sequence[int]) -> list[int]:
    """How many entries lie from each axis of a view on, counted from its end."""
    return list(itertools.accumulate(reversed(view), lambda a, b: a * b))


def _common_view(first: Sequence[int], second: Sequence[int]) -> tuple[int, ...] | None:
    """The coarsest view of which both are joined from, without axes of one entry; None where there is none."""
    ends = sorted({1, *_ends(first), *_ends(second)})
    if any(b % a for a, b in itertools.pairwise(ends)):
        return None
    return tuple(reversed([b // a for a, b in itertools.pairwise(ends)]))


def _refined(partition: Partition, common: Sequence[int]) -> set[int]:
    """The axes of a finer view that number the groups."""
    strides = [1, *_ends(partition.view)]
    spans = [(strides[-2 - axis], strides[-1 - axis]) for axis in partition.kept]
    edges = [1, *_ends(common)]
    return {
        axis
        for axis in range(len(common))
        if any(low <= edges[-2 - axis] and edges[-1 - axis] <= high for low, high in spans)
    }
