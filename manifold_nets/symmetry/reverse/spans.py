"""Linear combinations of sparse directions: which ones follow from those that are known already."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping
from typing import Any

__all__ = ["Span"]

# Coefficients are small rationals; what is left of one by cancellation is rounding.
_NOTHING = 1e-9


class Span:
    """The linear span of directions, each given by its coordinates that are not zero.

    Example:
        >>> span = Span([{"a": 1.0, "b": 1.0}])
        >>> span.add({"b": 1.0}), span.add({"a": 2.0})
        (True, False)
    """

    def __init__(self, directions: Iterable[Mapping[Any, float]] = ()) -> None:
        self._rows: list[tuple[Any, dict[Any, float]]] = []
        self._ages: dict[Any, int] = {}
        # Short directions first: then most of the longer ones are reduced at once.
        for direction in sorted(directions, key=len):
            self.add(direction)

    def add(self, direction: Mapping[Any, float]) -> bool:
        """Add a direction; False where it is a linear combination of those before."""
        rest = dict(direction)
        # A row holds no pivot of an older one. Oldest first, each row is subtracted at most once.
        due = [self._ages[key] for key in rest if key in self._ages]
        heapq.heapify(due)
        while due:
            pivot, row = self._rows[heapq.heappop(due)]
            factor = rest.get(pivot)
            if factor is None:
                continue
            for key, value in row.items():
                known = key in rest
                total = rest.get(key, 0.0) - factor * value
                if abs(total) <= _NOTHING:
                    rest.pop(key, None)
                    continue
                rest[key] = total
                if not known and key in self._ages:
                    heapq.heappush(due, self._ages[key])
        if not rest:
            return False
        # Of the wholes of a tensor, which have an entry for each of its slices, the last one is the least in demand.
        pivot = next(reversed(rest))
        self._ages[pivot] = len(self._rows)
        self._rows.append((pivot, {key: value / rest[pivot] for key, value in rest.items()}))
        return True
