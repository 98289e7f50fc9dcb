"""Sums over groups of weights and gradients, block by block, so that no product of a whole weight needs memory.

The certificates use ``Σ_G w ⊙ g``, ``‖w_G‖²`` and ``‖g_G‖²`` of several partitions of one weight. All are computed in
one pass over slices that fit the cache, in float64; the sums of a coarser partition come from those of a finer one.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from manifold_nets.groups import Partition, sum_over

__all__ = ["GroupSums", "coarsened", "group_sums"]

# Entries of a weight that are multiplied at once, so that the products of a block stay in the cache, and how many
# neighbours of these at most where there are more: sums over an outer axis are written once for each run of neighbours.
_BLOCK, _RUN = 1 << 15, 1 << 10
Floats = NDArray[np.float64]


class GroupSums(NamedTuple):
    """What the certificates read of the groups of a partition: float64 vectors, one entry a group.

    Args:
        products: ``Σ_G w ⊙ g``.
        weights: ``Σ_G w²``.
        gradients: ``Σ_G g²``.
        slopes: ``Σ_G g``.
    """

    products: Floats
    weights: Floats
    gradients: Floats
    slopes: Floats


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
    if all(partition.group_size == 1 for partition in partitions):
        w, g = (x.to(torch.float64).flatten().cpu().numpy() for x in (weight, gradient))
        return [GroupSums(w * g, w * w, g * g, g)] * len(partitions)
    finest = [p for p in dict.fromkeys(partitions) if not any(_is_finer(q, p) for q in partitions if q != p)]
    common: tuple[int, ...] | None = ()
    for partition in finest:
        common = _common_view(partition.view, common) if common is not None else None
    if common is None:
        taken = {partition: _read(weight, gradient, [partition], partition.view)[0] for partition in finest}
    else:
        taken = dict(zip(finest, _read(weight, gradient, finest, common), strict=True))
    for partition in (p for p in partitions if p not in taken):
        coarse = (coarsened(taken[fine], fine, partition) for fine in finest)
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
    view, kept = _merged(view, [_refined(partition, view) for partition in partitions])
    runs = [_runs([axis for axis in range(len(view)) if axis not in axes]) for axes in kept]
    totals = [
        torch.zeros((4, *(n if axis in axes else 1 for axis, n in enumerate(view))), dtype=torch.float64)
        for axes in kept
    ]
    totals = [total.to(weight.device) for total in totals]
    viewed = weight.reshape(view), gradient.reshape(view)
    room = torch.empty(4 * min(weight.numel(), _BLOCK), dtype=torch.float64, device=weight.device)
    for block in _blocks(view):
        w, g = (x[block].to(torch.float64) for x in viewed)
        entries = room[: 4 * w.numel()].view(4, *w.shape)
        for product, (x, y) in zip(entries, ((w, g), (w, w), (g, g)), strict=False):
            torch.mul(x, y, out=product)
        entries[3] = g
        for axes, reduced, total in zip(kept, runs, totals, strict=True):
            place = (slice(None), *(part if axis in axes else slice(None) for axis, part in enumerate(block)))
            total[place] += sum_over(entries, reduced)
    return [GroupSums(*total.reshape(4, -1).cpu().numpy()) for total in totals]


def _merged(view: Sequence[int], kept: Sequence[set[int]]) -> tuple[tuple[int, ...], list[list[int]]]:
    """A view with neighbouring axes joined that all partitions treat alike, and the axes that each of these keeps."""
    kinds = [tuple(axis in axes for axes in kept) for axis in range(len(view))]
    joined = [
        (kind, [n for _, n in axes]) for kind, axes in itertools.groupby(zip(kinds, view, strict=True), lambda x: x[0])
    ]
    return (
        tuple(math.prod(sizes) for _, sizes in joined),
        [[axis for axis, (kind, _) in enumerate(joined) if kind[k]] for k in range(len(kept))],
    )


def _runs(axes: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """Neighbouring axes together, the last ones first, counted behind the axis of the four sums."""
    runs: list[tuple[int, ...]] = []
    for axis in reversed(axes):
        runs = [*runs[:-1], (axis + 1, *runs[-1])] if runs and runs[-1][0] == axis + 2 else [*runs, (axis + 1,)]
    return tuple(runs)


def _blocks(view: tuple[int, ...]) -> Iterator[tuple[slice, ...]]:
    """Slices of a view that have at most `_BLOCK` entries each."""
    steps, size, most = list(view), 1, min(_RUN, _BLOCK) if math.prod(view) > _BLOCK else _BLOCK
    for axis in reversed(range(len(view))):
        pieces = math.ceil(view[axis] / max(1, most // size))
        steps[axis] = math.ceil(view[axis] / pieces)
        size *= steps[axis]
        most = _BLOCK
    ranges = [range(0, n, by) for n, by in zip(view, steps, strict=True)]
    for starts in itertools.product(*ranges):
        yield tuple(slice(start, start + by) for start, by in zip(starts, steps, strict=True))


def coarsened(sums: GroupSums, fine: Partition, coarse: Partition) -> GroupSums | None:
    """Add the sums of the groups of ``fine`` that lie in each group of ``coarse``; None where some lie in several.

    Args:
        sums: those of the groups of ``fine``.
        fine: a partition.
        coarse: a partition of the same shape.

    Example:
        >>> rows, blocks = Partition.filters((4, 3)), Partition.blocks((4, 3), 2)
        >>> sums = GroupSums(*np.arange(16.0).reshape(4, 4))
        >>> coarsened(sums, rows, blocks).products.tolist(), coarsened(sums, blocks, rows) is None
        ([1.0, 5.0], True)
    """
    plan = _coarsening(fine, coarse) if coarse.kept else ((-1,), (0,))
    if plan is None:
        return None
    view, dropped = plan
    return GroupSums(*(values.reshape(view).sum(dropped).ravel() for values in sums))


@functools.lru_cache(maxsize=1024)
def _coarsening(fine: Partition, coarse: Partition) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """The view of the groups of a partition, and its axes over which those of another one are sums; None where none."""
    common = _common_view(fine.view, coarse.view)
    if common is None:
        return None
    of_fine, of_coarse = _refined(fine, common), _refined(coarse, common)
    if not of_coarse <= of_fine:
        return None
    axes = sorted(of_fine)
    view, (kept,) = _merged([common[axis] for axis in axes], [{n for n, axis in enumerate(axes) if axis in of_coarse}])
    return view, tuple(axis for axis in range(len(view)) if axis not in kept)


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
