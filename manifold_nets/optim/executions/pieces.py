"""Large weights cut into runs of whole groups, so that what a step leaves between its operations stays small."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import replace
from weakref import WeakKeyDictionary

from torch import Tensor

from manifold_nets.gathered import is_sharded
from manifold_nets.groups import Partition
from manifold_nets.manifold import SphereProduct
from manifold_nets.optim.rules.members import Member

__all__ = ["cuts", "pieces"]

# Entries of a piece: a few of them, in float32, fit in the second or third level of a processor's cache.
_ENTRIES = 2**18


@functools.lru_cache(maxsize=4096)
def cuts(partition: Partition) -> tuple[tuple[slice, slice, Partition], ...]:
    """Return where to cut a weight along its first axis, so that each piece holds whole groups.

    Returns:
        For each piece the rows of the weight, the positions along the first axis of the view, and its partition; one
        piece where the weight is small, or where its groups are no runs along the first axis.

    Example:
        >>> [rows for rows, _, _ in cuts(Partition.filters((300, 2048)))]
        [slice(0, 128, None), slice(128, 256, None), slice(256, 300, None)]
        >>> len(cuts(Partition.whole((300, 2048))))
        1
    """
    rows, blocks = partition.shape[0], partition.view[0]
    if 0 not in partition.kept or rows % blocks:
        return ((slice(0, rows), slice(0, blocks), partition),)
    entries, height = partition.n_groups * partition.group_size // blocks, rows // blocks
    at_once = max(1, _ENTRIES // entries)
    found = []
    for start in range(0, blocks, at_once):
        end = min(start + at_once, blocks)
        shape, view = ((end - start) * height, *partition.shape[1:]), (end - start, *partition.view[1:])
        place = slice(start * height, end * height), slice(start, end)
        found.append((*place, Partition(shape, view, partition.kept)))
    return tuple(found)


def pieces(member: Member) -> Iterator[tuple[slice | None, Member]]:
    """Yield a weight piece by piece; whole where it is small, sharded, or not on the CPU.

    The tensors of a piece are views of the weight's.

    Yields:
        The rows of the weight that a piece holds, None for all, and the piece.
    """
    places = cuts(member.manifold.partition)
    if len(places) == 1 or is_sharded(member.weight) or not member.weight.is_cpu:
        yield None, member
        return
    for (rows, along, _), manifold in zip(places, _manifolds(member.manifold), strict=True):
        second = member.second
        if second is not None:
            second = (second[0][along], None if second[1] is None else second[1][along])
        yield (
            rows,
            replace(
                member,
                weight=member.weight.detach()[rows],
                gradient=member.gradient.detach()[rows],
                manifold=manifold,
                moment=None if member.moment is None else member.moment[rows],
                second=second,
            ),
        )


_known: WeakKeyDictionary[SphereProduct, tuple[SphereProduct, ...]] = WeakKeyDictionary()


def _manifolds(manifold: SphereProduct) -> tuple[SphereProduct, ...]:
    if manifold not in _known:
        uniform, each = manifold.uniform_radius, manifold.partition.n_groups // manifold.partition.view[0]
        _known[manifold] = tuple(
            SphereProduct(partition, radius=_radii(manifold.radii, along, each) if uniform is None else uniform)
            for _, along, partition in cuts(manifold.partition)
        )
    return _known[manifold]


def _radii(radii: Tensor, along: slice, each: int) -> Tensor:
    return radii[along.start * each : along.stop * each]
