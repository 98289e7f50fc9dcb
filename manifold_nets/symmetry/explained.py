"""Which directions are linear combinations of the symmetries that the structure explains.

The slices of every parameter are coordinates, and a symmetry is a direction: its exponent at each slice that it moves.
One random vector orthogonal to all known directions represents their span: a group of slices is explained exactly if
its sum over this vector vanishes. The vector is found by elimination, in whole rounds: a direction with one remaining
coordinate sets it to zero, and a direction with a coordinate that no other one has is solved for it at the end. The
rest is small and solved row by row.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

__all__ = ["NOTHING", "Explained"]

# A sum this small against its terms is rounding.
NOTHING = 1e-9
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


class Explained:
    """The span of known directions.

    Example:
        >>> known = Explained()
        >>> a, b, c = known.coordinates(3)
        >>> known.add([0, 0], [a, b], [1.0, 1.0])
        >>> known.follows(np.array([[a, b], [b, c]])).tolist()
        [True, False]
    """

    def __init__(self) -> None:
        self.size, self.rank, self._count = 0, 0, 0
        self._entries: list[tuple[Ints, Ints, Floats]] = []
        self._vector: Floats | None = None

    def coordinates(self, count: int) -> Ints:
        """New coordinates."""
        self.size, self._vector = self.size + count, None
        return np.arange(self.size - count, self.size)

    def add(
        self, numbers: Sequence[int] | Ints, places: Sequence[int] | Ints, values: Sequence[float] | Floats
    ) -> None:
        """Add directions: for each entry the number of its direction, its coordinate, and its value."""
        rows = np.asarray(numbers, dtype=np.int64)
        if len(rows):
            self._entries.append(
                (rows + self._count, np.asarray(places, dtype=np.int64), np.asarray(values, dtype=float))
            )
            self._count += int(rows.max()) + 1
            self._vector = None

    @property
    def vector(self) -> Floats:
        """A random vector that is orthogonal to all directions."""
        if self._vector is None:
            self._vector = self._solved()
        return self._vector

    def follows(self, groups: Ints) -> NDArray[np.bool_]:
        """Which rows of coordinates, each moved by the same exponent, follow from the directions."""
        values = self.vector[groups]
        return np.asarray(_without_rounding(values.sum(1), np.abs(values).sum(1)) == 0)

    def take(self, groups: Ints) -> NDArray[np.bool_]:
        """Add rows of disjoint coordinates; False for each that follows from the directions and the rows before it."""
        new = ~self.follows(groups)
        rank, entries, count = self.rank, len(self._entries), self._count
        self._add_rows(groups[new])
        self._vector = self._solved()
        if self.rank == rank + int(new.sum()):
            return new
        del self._entries[entries:]
        self._count, self._vector = count, None
        for number in np.flatnonzero(new):
            row = groups[number : number + 1]
            new[number] = not self.follows(row)[0]
            self._add_rows(row[new[number : number + 1]])
        return new

    def _add_rows(self, groups: Ints) -> None:
        numbers = np.repeat(np.arange(len(groups)), groups.shape[1])
        self.add(numbers, groups.ravel(), np.ones(groups.size))

    def _solved(self) -> Floats:
        generator = np.random.default_rng(0)
        vector, self.rank = generator.standard_normal(self.size), 0
        if not self._entries:
            return vector
        rows, places, values = (np.concatenate(parts) for parts in zip(*self._entries, strict=True))
        postponed: list[tuple[Ints, Ints, Floats, Ints]] = []
        while len(rows):
            single = np.bincount(rows, minlength=self._count)[rows] == 1
            if single.any():
                zero = np.unique(places[single])
                vector[zero], self.rank = 0.0, self.rank + len(zero)
                kept = ~np.isin(places, zero)
            else:
                own = np.flatnonzero(np.bincount(places, minlength=self.size)[places] == 1)
                solved, first = np.unique(rows[own], return_index=True)
                if not len(solved):
                    break
                away = np.isin(rows, solved)
                postponed.append((rows[away], places[away], values[away], places[own[first]]))
                self.rank, kept = self.rank + len(solved), ~away
            rows, places, values = rows[kept], places[kept], values[kept]
        if len(rows):
            self._solve_core(vector, rows, places, values)
        for rows, places, values, pivots in reversed(postponed):
            pivot = np.isin(places, pivots)
            terms = values[~pivot] * vector[places[~pivot]]
            others = np.bincount(rows[~pivot], terms, self._count).astype(float)
            others = _without_rounding(others, np.bincount(rows[~pivot], np.abs(terms), self._count).astype(float))
            vector[places[pivot]] = -others[rows[pivot]] / values[pivot]
        return vector

    def _solve_core(self, vector: Floats, rows: Ints, places: Ints, values: Floats) -> None:
        """Solve what the rounds leave; coordinates that all of its directions treat alike count as one."""
        order = np.lexsort((rows, places))
        rows, places, values = rows[order], places[order], values[order]
        marks = np.random.default_rng(1).standard_normal(self._count)
        columns, column = np.unique(places, return_inverse=True)
        _, first, alike = np.unique(np.bincount(column, marks[rows] * values), return_index=True, return_inverse=True)
        chosen = np.isin(column, first)
        directions: dict[int, dict[int, float]] = {}
        entries = (rows[chosen], alike[column[chosen]], values[chosen])
        for row, place, value in zip(*(x.tolist() for x in entries), strict=True):
            directions.setdefault(row, {})[place] = value
        echelon = _echelon(directions.values())
        self.rank += len(echelon)
        totals = np.bincount(alike, vector[columns])
        vector[columns] -= (totals / np.bincount(alike))[alike]
        for pivot, row in reversed(echelon):
            terms = [value * totals[place] for place, value in row.items() if place != pivot]
            total = -math.fsum(terms)
            totals[pivot] = total if abs(total) > NOTHING * sum(map(abs, terms)) else 0.0
        vector[columns] += (totals / np.bincount(alike))[alike]


def _echelon(directions: Iterable[dict[int, float]]) -> list[tuple[int, dict[int, float]]]:
    """Independent directions with the same span; each has a pivot, which the later ones lack and at which it is 1."""
    found: list[tuple[int, dict[int, float]]] = []
    ages: dict[int, int] = {}
    # Short directions first: then most of the longer ones are reduced at once.
    for direction in sorted(directions, key=len):
        rest = dict(direction)
        due = [ages[place] for place in rest if place in ages]
        heapq.heapify(due)
        while due:
            pivot, row = found[heapq.heappop(due)]
            factor = rest.get(pivot, 0.0)
            for place, value in row.items() if factor else ():
                total = rest.get(place, 0.0) - factor * value
                if place not in rest and place in ages:
                    heapq.heappush(due, ages[place])
                rest[place] = total
                if abs(total) <= NOTHING:
                    del rest[place]
        if rest:
            pivot = next(reversed(rest))
            ages[pivot] = len(found)
            found.append((pivot, {place: value / rest[pivot] for place, value in rest.items()}))
    return found


def _without_rounding(sums: Floats, sizes: Floats | float) -> Floats:
    """Zeros in the place of sums that are small against their terms."""
    return np.where(np.abs(sums) <= NOTHING * sizes, 0.0, sums)
