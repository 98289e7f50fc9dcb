"""How unknown scales run through a network: labels on tensors, and what the scales have to satisfy.

Seed a weight with one unknown positive scale α_k a group and follow it through the graph. A `Label` says by which α
each entry of a tensor is multiplied. Operations put conditions on the scales: a sum of two entries needs both scaled
alike (`Scales.join`), an entry that a non-homogeneous operation reads must not be scaled at all (`Scales.pin`). What is
neither pinned nor joined at the end is a symmetry.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Break", "Ids", "Label", "Scales"]

Ids = NDArray[np.int64]
UNSCALED = -1


@dataclass(frozen=True)
class Label:
    """Entry i of a tensor is multiplied by ``α[ids[i]] ** degree``; −1 marks an entry that no scale reaches.

    ``ids`` broadcasts to the shape of the tensor: axes along which the label does not vary have size 1.
    """

    ids: Ids
    degree: float = 1.0

    @classmethod
    def compressed(cls, ids: Ids, degree: float = 1.0) -> Label | None:
        """Reduce every axis along which the ids do not vary to size 1; None where nothing is scaled."""
        for axis in range(ids.ndim):
            if ids.shape[axis] > 1:
                first = ids.take([0], axis)
                if (ids == first).all():
                    ids = first
        return None if (ids == UNSCALED).all() else cls(ids, degree)

    def along(self, shape: Sequence[int], axes: Sequence[int]) -> Ids:
        """Return the ids with the given axes at their full size and the others as they are."""
        full = [n if axis in axes else have for axis, (n, have) in enumerate(zip(shape, self.ids.shape, strict=True))]
        spread: Ids = np.broadcast_to(self.ids, full)
        return spread

    @property
    def present(self) -> Ids:
        """The scales that occur in the label."""
        found: Ids = np.unique(self.ids)
        present: Ids = found[found != UNSCALED]
        return present


@dataclass(frozen=True)
class Break:
    """Why a scale is not free: the operation that refuses it and the module that runs it."""

    op: str
    module: str
    reason: str
    unknown: bool = False

    def __str__(self) -> str:
        where = f" in {self.module}" if self.module else ""
        return f"{self.op}{where}: {self.reason}"


class Scales:
    """A union-find over the unknown scales of one weight, with the reasons why some are pinned to 1."""

    def __init__(self, count: int) -> None:
        self._parent = np.arange(count, dtype=np.int64)
        self._pins: dict[int, Break] = {}

    @property
    def count(self) -> int:
        """Number of scales before any of them was joined."""
        return len(self._parent)

    def roots(self, ids: Ids) -> Ids:
        """Replace each scale by the representative of its class; −1 stays."""
        result: Ids = np.where(ids == UNSCALED, UNSCALED, self._parent[ids])
        return result

    def join(self, left: Ids, right: Ids, because: Break) -> None:
        """Require ``α[left] == α[right]`` entry by entry; a scale against an unscaled entry is pinned."""
        left, right = np.broadcast_arrays(self.roots(left), self.roots(right))
        different = left != right
        if not different.any():
            return
        for a, b in np.unique(np.stack([left[different], right[different]], axis=1), axis=0).tolist():
            if UNSCALED in (a, b):
                self._pin_one(max(a, b), because)
            else:
                self._join_one(a, b)

    def merge(self, ids: Ids, axes: Sequence[int], because: Break) -> Ids:
        """Require one scale along the given axes and return the ids with these axes reduced to size 1."""
        first = ids
        for axis in axes:
            first = first.take([0], axis)
        if all(ids.shape[axis] == 1 for axis in axes):
            return first
        self.join(ids, first, because)
        return self.roots(first)

    def pin(self, ids: Ids, because: Break) -> None:
        """Require α = 1 for every scale in ``ids``."""
        for scale in np.unique(self.roots(ids)).tolist():
            if scale != UNSCALED:
                self._pin_one(scale, because)

    def break_of(self, scale: int) -> Break | None:
        """Why the scale is pinned, or None where it is free."""
        return self._pins.get(int(self._parent[scale]))

    @property
    def all_pinned(self) -> bool:
        """True where no scale is free any more."""
        return bool(np.isin(self._parent, list(self._pins)).all())

    def classes(self) -> dict[int, list[int]]:
        """Scales that have to be equal, by representative, in increasing order."""
        found: dict[int, list[int]] = {}
        for scale, root in enumerate(self._parent.tolist()):
            found.setdefault(root, []).append(scale)
        return found

    def _pin_one(self, scale: int, because: Break) -> None:
        self._pins.setdefault(int(self._parent[scale]), because)

    def _join_one(self, a: int, b: int) -> None:
        a, b = sorted((int(self._parent[a]), int(self._parent[b])))
        if a == b:
            return
        self._parent[self._parent == b] = a
        moved = self._pins.pop(b, None)
        if moved is not None:
            self._pins.setdefault(a, moved)
