"""Sums over groups of weights and gradients, block by block: no product of a whole weight takes memory.

The certificates read ``Σ_G w ⊙ g``, ``‖w_G‖²`` and ``‖g_G‖²`` of several partitions of one weight. All are taken in one
pass over slices that fit the cache, in float64; the sums of a coarser partition come from those of a finer one.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from manifold_nets.groups import Partition, sum_over

__all__ = ["GroupSums", "coarsened", "group_sums"]

# Entries of a weight that are multiplied at once, so that the products of a block stay in the cache.
_BLOCK = 1 << 15


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
        if _coarsening(fine, coarse) is None:
            return None
        found = (coarsened(values, fine, coarse) for values in vars(self).values())
        return GroupSums(*(values for values in found if values is not None))


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
    finest = [p for p in dict.fromkeys(partitions) if not any(_is_finer(q, p) for q in partitions if q != p)]
    common: tuple[int, ...] | None = ()
    for partition in finest:
        common = _common_view(partition.view, common) if common is not None else None
    if common is None:
        taken = {partition: _read(weight, gradient, [partition], partition.view)[0] for partition in finest}
    else:
        taken = dict(zip(finest, _read(weight, gradient, finest, common), strict=True))
    for partition in (p for p in partitions if p not in taken):
        coarse = (taken[fine].coarsened(fine, partition) for fine in finest)
        taken[partition] = next(sums for sums in coarse if sums is not None)
    return [taken[partition] for partition in partitions]


@functools.lru_cache(maxsize=1024)
def _is_finer(fine: Partition, coarse: Partition) -> bool:
    """Whether the groups of one partition are unions of those of another, and more than a few."""
    common = _common_view(fine.view, coarse.view)
    if common is None or fine.n_groups == coarse.n_groups:
        return False
    return _refined(coarse, common) < _refined(fine, common)


def _read(weight: Tensor, gradient: Tensor, partitions: Sequence[Partition], view: tuple[int, ...]) -> list[GroupSums]:
    """The sums of partitions whose kept axes are axes of a view, from one pass over the entries."""
    kept = [sorted(_refined(partition, view)) for partition in partitions]
    runs = [_runs([axis for axis in range(len(view)) if axis not in axes]) for axes in kept]
    totals = [
        torch.zeros((4, *(n if axis in axes else 1 for axis, n in enumerate(view))), dtype=torch.float64)
        for axes in kept
    ]
    totals = [total.to(weight.device) for total in totals]
    viewed = weight.reshape(view), gradient.reshape(view)
    entries = torch.empty((4, 0))
    for block in _blocks(view):
        w, g = (x[block].to(torch.float64) for x in viewed)
        if entries.shape[1:] != w.shape:
            entries = torch.empty((4, *w.shape), dtype=torch.float64, device=w.device)
        for product, (x, y) in zip(entries, ((w, g), (w, w), (g, g)), strict=False):
            torch.mul(x, y, out=product)
        entries[3] = g
        for axes, reduced, total in zip(kept, runs, totals, strict=True):
            place = tuple(part if axis in axes else slice(None) for axis, part in enumerate(block))
            total[(slice(None), *place)] += sum_over(entries, reduced)
    return [GroupSums(*total.reshape(4, -1)) for total in totals]


def _runs(axes: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """Neighbouring axes together, the last ones first, counted behind the axis of the four sums."""
    runs: list[tuple[int, ...]] = []
    for axis in reversed(axes):
        runs = [*runs[:-1], (axis + 1, *runs[-1])] if runs and runs[-1][0] == axis + 2 else [*runs, (axis + 1,)]
    return tuple(runs)


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
    plan = _coarsening(fine, coarse)
    if plan is None:
        return None
    view, dropped = plan
    viewed = values.reshape(view)
    return (viewed.sum(dropped) if dropped else viewed).reshape(-1)


@functools.lru_cache(maxsize=1024)
def _coarsening(fine: Partition, coarse: Partition) -> tuple[list[int], list[int]] | None:
    """The view of the groups of a partition, and its axes over which those of another one are sums; None where none."""
    common = _common_view(fine.view, coarse.view)
    if common is None:
        return None
    of_fine, of_coarse = _refined(fine, common), _refined(coarse, common)
    if not of_coarse <= of_fine:
        return None
    axes = sorted(of_fine)
    return [common[axis] for axis in axes], [number for number, axis in enumerate(axes) if axis not in of_coarse]


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
