"""Linear combinations of sparse directions: which ones follow from those that are known already."""

from __future__ import annotations

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
        self._rows: dict[Any, dict[Any, float]] = {}
        # Short directions first: then most of the longer ones are reduced at once.
        for direction in sorted(directions, key=len):
            self.add(direction)

    def add(self, direction: Mapping[Any, float]) -> bool:
        """Add a direction; False where it is a linear combination of those before."""
        rest = dict(direction)
        open_keys = list(rest)
        while open_keys:
            pivot = open_keys.pop()
            row = self._rows.get(pivot)
            if row is None or pivot not in rest:
                continue
            factor = rest[pivot]
            for key, value in row.items():
                total = rest.get(key, 0.0) - factor * value
                if abs(total) > _NOTHING:
                    rest[key] = total
                    open_keys.append(key)
                else:
                    rest.pop(key, None)
        if not rest:
            return False
        pivot = next(iter(rest))
        self._rows[pivot] = {key: value / rest[pivot] for key, value in rest.items()}
        return True
