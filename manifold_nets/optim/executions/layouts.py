"""How the groups of a weight lie in memory, remembered for each manifold."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from weakref import finalize

import numpy as np

from manifold_nets.groups import Partition
from manifold_nets.manifold import SphereProduct

__all__ = ["Layout", "layout_of"]

# Squares of radii in this range, and sums of a billion of them, are normal numbers of float32.
_SMALLEST, _LARGEST = 2.0**-40, 2.0**40


@dataclass(frozen=True)
class Layout:
    """What does not change from step to step.

    Attributes:
        partition: the groups.
        to_unit: whether radii are so extreme that a step has to be taken at radius 1.
        rows: number of groups.
        size: entries of a group.
        squares: squared radii, float64: one, or one a group.
        address: where the squared radii lie.
        matrix: shape and strides of a weight as a matrix with one group a row.
        column: shape and strides of one number a group, likewise.
    """

    partition: Partition
    to_unit: bool
    rows: int
    size: int
    squares: np.ndarray
    address: int
    matrix: tuple[tuple[int, int], tuple[int, int]]
    column: tuple[tuple[int, int], tuple[int, int]]
    _dense: dict[tuple[int, ...], bool] = field(default_factory=dict)

    def has_rows(self, stride: tuple[int, ...]) -> bool:
        """Whether a tensor of these strides holds its groups one after the other, each in one run of memory.

        So lie filters, blocks of filters and whole tensors, also in channels-last formats; not the filters of
        transposed convolutions.
        """
        known = self._dense.get(stride)
        if known is None:
            known = self._dense[stride] = _holds_rows(self.partition, stride)
        return known


# By identity: a manifold takes its layout along when it goes, and no number is used twice meanwhile.
_layouts: dict[int, Layout] = {}


def layout_of(manifold: SphereProduct) -> Layout:
    """Return the layout of a manifold, made at the first call.

    Example:
        >>> layout_of(SphereProduct((8, 3, 5, 5))).has_rows((75, 1, 15, 3))
        True
    """
    layout = _layouts.get(id(manifold))
    if layout is None:
        radii = manifold.radii
        extreme = float(radii.min()) < _SMALLEST or float(radii.max()) > _LARGEST
        squares = (radii[:1] if manifold.uniform_radius is not None else radii).square().numpy()
        partition = manifold.partition
        rows, size = partition.n_groups, partition.group_size
        views = ((rows, size), (size, 1)), ((rows, 1), (1, 1))
        layout = Layout(partition, extreme, rows, size, squares, squares.ctypes.data, *views)
        _layouts[id(manifold)] = layout
        finalize(manifold, _layouts.pop, id(manifold))
    return layout


def _holds_rows(partition: Partition, stride: tuple[int, ...]) -> bool:
    shape = partition.shape
    if partition.kept != tuple(range(len(partition.kept))):
        return False
    strides = sorted((step, size) for step, size in zip(stride, shape, strict=True) if size > 1)
    expected = 1
    for step, size in strides:
        if step != expected:
            return False  # there are gaps, or entries that share memory
        expected *= size
    contiguous = all(
        size == 1 or step == math.prod(shape[axis + 1 :])
        for axis, (step, size) in enumerate(zip(stride, shape, strict=True))
    )
    if contiguous or partition.n_groups == 1:
        return True
    # The order of the entries inside a group does not matter, if groups are made of whole slices of axis 0.
    return stride[0] * shape[0] == expected and shape[0] % partition.n_groups == 0
