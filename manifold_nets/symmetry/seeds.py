"""Which parts of a weight get scales of their own, and how groups with one scale are expressed as a `Partition`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch.fx import Node

from manifold_nets.groups import Partition
from manifold_nets.symmetry.equations import Ids
from manifold_nets.symmetry.graph import bound_arguments, op_name

__all__ = ["joined_partition", "seed_label", "seed_partition", "without_last_axes"]


def seed_partition(sources: list[Node]) -> Partition:
    """Filters of the weight's first use: output channels of a transposed convolution are not its rows."""
    shape = tuple(sources[0].meta["val"].shape)
    for node in sources:
        for user in node.users:
            if "transpose" in op_name(user) and op_name(user).startswith("conv"):
                return Partition.transposed_filters(shape, int(bound_arguments(user)["groups"]))
    return Partition.filters(shape)


def seed_label(seed: Partition) -> Ids:
    """Number of the group of each entry of a weight, with size 1 along the axes where it does not vary."""
    if seed.view == seed.shape:
        return np.arange(seed.n_groups, dtype=np.int64).reshape(seed.spread_shape)
    groups, fan_in, per_group, *kernel = seed.view
    ids = np.arange(seed.n_groups, dtype=np.int64).reshape(groups, 1, per_group)
    spread = np.broadcast_to(ids, (groups, fan_in, per_group))
    return spread.reshape(groups * fan_in, per_group, *(1 for _ in kernel))


def without_last_axes(*partitions: Partition, least: int = 1) -> list[Partition]:
    """Partitions of one shape without the last axes, as many as lie in every group as a whole.

    Args:
        partitions: partitions of one shape.
        least: how many axes stay.

    Example:
        >>> without_last_axes(Partition.filters((6, 4, 3)))
        [Partition(shape=(6,), view=(6,), kept=(0,))]
    """
    shape, views = partitions[0].shape, [p.view for p in partitions]
    while len(shape) > least and all(
        view[-1] == shape[-1] and len(view) - 1 not in p.kept for view, p in zip(views, partitions, strict=True)
    ):
        shape, views = shape[:-1], [view[:-1] for view in views]
    return [Partition(shape, view, p.kept) for view, p in zip(views, partitions, strict=True)]


def joined_partition(seed: Partition, classes: list[list[int]]) -> Partition:
    """Write classes of seed groups as a partition: the finest one that a view can express.

    Each kept axis of the seed is cut into factors such that the class depends on some of them and is another one for
    each of their values: blocks of consecutive groups, interleaved ones, and any mixture of both have such a view.
    Other joins fall back to the whole tensor, which is a union of free groups and so free as well.

    Example:
        >>> joined_partition(Partition.filters((6, 4)), [[0, 2, 4], [1, 3, 5]])
        Partition(shape=(6, 4), view=(3, 2, 4), kept=(1,))
    """
    if len(classes) == seed.n_groups:
        return seed
    numbers = np.zeros(seed.n_groups, dtype=np.int64)
    # Counted by first occurrence, so that rows of classes that follow the same pattern differ by a constant.
    for number, members in enumerate(sorted(classes, key=min)):
        numbers[members] = number
    factors = _factors(numbers, seed.group_shape)
    if len(classes) == 1 or factors is None:
        return Partition.whole(seed.shape)
    view: list[int] = []
    kept: list[int] = []
    of_axis = dict(zip(seed.kept, factors, strict=True))
    for axis, size in enumerate(seed.view):
        for factor, varies in of_axis.get(axis, [(size, False)]):
            if varies:
                kept.append(len(view))
            view.append(factor)
    return Partition(seed.shape, tuple(view), tuple(kept))


def _factors(numbers: Ids, sizes: Sequence[int]) -> list[list[tuple[int, bool]]] | None:
    """Cut each size into factors with a flag whether the class varies along it; None where no cut fits."""
    if not sizes:
        return []
    if sizes[0] == 1:
        rest = _factors(numbers, sizes[1:])
        return None if rest is None else [[], *rest]
    for count in (n for n in range(sizes[0], 1, -1) if sizes[0] % n == 0):
        rows = numbers.reshape(count, -1)
        steps = (int(rows[0].max()) + 1) * np.arange(count)[:, None]
        varies = bool((rows == rows[0] + steps).all())
        if not varies and not (rows == rows[0]).all():
            continue
        rest = _factors(rows[0], (sizes[0] // count, *sizes[1:]))
        if rest is not None:
            return [[(count, varies), *rest[0]], *rest[1:]]
    return None
