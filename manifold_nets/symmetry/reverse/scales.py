"""The certificate the other way: invariant groups that the numbers show and that the structure does not explain.

At two independent points (weights, inputs and cotangents) the Euler field ``e = w ⊙ ∂L/∂w`` of every parameter is
summed over a family of partitions: the slices along each axis, blocks of them and interleaved ones for every divisor
(heads, groups of a normalization), the whole, each alone and with the entries of a vector of the same module. The same
is done with the gradient itself for shifts. A group whose sum vanishes at both points is invariant. What follows from
the symmetries that the structure knows, or has no gradient that could tell, is subtracted. What then remains holds
near both points and may not hold far from them, as that of a ReLU6 whose bound no activation reaches; `diagnose` puts
it to the finite move.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from manifold_nets.groups import Partition
from manifold_nets.symmetry.gradients import EVIDENCE_FLOOR, GradientPass
from manifold_nets.symmetry.joint import solve_jointly
from manifold_nets.symmetry.report import ShiftSymmetry, SymmetryFamily, UnexplainedSymmetry, WeightFinding
from manifold_nets.symmetry.reverse.explained import Direction, Explained, explained_scales
from manifold_nets.symmetry.reverse.shifts import unexplained_shifts
from manifold_nets.symmetry.trace import TracedGraph
from manifold_nets.symmetry.untraced import UNSUPPORTED

__all__ = ["search_unexplained", "still_unexplained"]


def search_unexplained(
    fields: tuple[GradientPass, GradientPass],
    findings: Iterable[WeightFinding],
    families: Iterable[SymmetryFamily],
    shifts: Iterable[ShiftSymmetry],
    tolerance: float,
    graph: TracedGraph,
) -> tuple[UnexplainedSymmetry, ...]:
    """Search for invariant groups that structure does not explain.

    Args:
        fields: weights and gradients at two independent points.
        findings: what structure and certificate say of each weight.
        families: the symmetries that structure found.
        shifts: the shifts that structure found.
        tolerance: largest certificate value of an invariant group.
        graph: the network.

    Returns:
        The groups that no combination of what structure found accounts for, parameter by parameter.
    """
    findings, families, shifts = tuple(findings), tuple(families), tuple(shifts)
    if any(euler.silent for euler in fields):
        return ()
    tolerance *= UNSUPPORTED
    found = _unexplained_scales(fields, explained_scales(findings, families, shifts), tolerance)
    dead = _dead(fields[0].shapes, shifts)
    if found and dead:
        # Biases that are dead cannot tie scales either, as they do in the equations above.
        joint = solve_jointly(graph, dead)
        found = _unexplained_scales(fields, explained_scales(findings, families, shifts, joint), tolerance)
    return (*found, *unexplained_shifts(fields, shifts, tolerance))


def still_unexplained(
    unexplained: Iterable[UnexplainedSymmetry],
    fields: tuple[GradientPass, GradientPass],
    shifts: Iterable[ShiftSymmetry],
    shown: Iterable[ShiftSymmetry],
    tolerance: float,
) -> tuple[UnexplainedSymmetry, ...]:
    """What is left of unexplained symmetries now that more shifts are known, those of ``shown``."""
    names = {name for shift in shown for name in shift.parameters}
    kept = [found for found in unexplained if found.kind == "scale" or names.isdisjoint(found.parameters)]
    return (*kept, *unexplained_shifts(fields, shifts, tolerance * UNSUPPORTED, names))


def _unexplained_scales(
    fields: tuple[GradientPass, GradientPass], explained: Explained, tolerance: float
) -> list[UnexplainedSymmetry]:
    """The groups that are invariant at both points and that nothing explains."""
    shapes = fields[0].shapes
    floors = [EVIDENCE_FLOOR * _largest(euler) for euler in fields]
    sums = _SliceSums(fields)
    searches = [
        _Search(sums, names, shape, axis, floors, tolerance)
        for name, shape in shapes.items()
        for axis in range(min(len(shape), 2))
        for names in [(name,), *((name, other) for other in _companions(shapes, name, axis))]
    ]
    for search in searches:
        search.mark(explained)
    return [symmetry for search in searches for symmetry in search.unexplained(explained)]


def _largest(euler: GradientPass) -> float:
    return max((euler.size(name) for name, w in euler.weights.items() if w.ndim >= 2 and w.numel()), default=0.0)


def _companions(shapes: Mapping[str, tuple[int, ...]], name: str, axis: int) -> list[str]:
    """Vectors of the same module with one entry for each slice; of two vectors the second follows the first."""
    module = name.rpartition(".")[0]
    found = []
    for other, shape in shapes.items():
        if other == name or other.rpartition(".")[0] != module or shape != (shapes[name][axis],):
            continue
        if len(shapes[name]) > 1 or list(shapes).index(other) > list(shapes).index(name):
            found.append(other)
    return found


def _dead(shapes: Mapping[str, tuple[int, ...]], shifts: Iterable[ShiftSymmetry]) -> set[str]:
    """Vectors of which every entry is dead."""
    entries: dict[str, int] = {}
    for shift in shifts:
        if shift.kind == "dead bias" and shift.certificate.verdict == "invariant":
            for name in shift.parameters:
                entries[name] = entries.get(name, 0) + sum(name in direction for direction in shift.directions)
    return {name for name, count in entries.items() if shapes[name] == (count,)}


class _SliceSums:
    """Σ w ⊙ g, Σ w² and Σ g² of each slice of a parameter along an axis, at every point; each is computed once."""

    def __init__(self, fields: tuple[GradientPass, GradientPass]) -> None:
        self.fields = fields
        self.known: dict[tuple[str, int], list[NDArray[np.float64]]] = {}

    def of(self, name: str, axis: int) -> list[NDArray[np.float64]]:
        """For each point an array of shape (3, slices)."""
        if (name, axis) not in self.known:
            self.known[name, axis] = [
                np.stack([_along(moment, axis).cpu().numpy() for moment in euler.moments(name)])
                for euler in self.fields
            ]
        return self.known[name, axis]


def _along(x: Tensor, axis: int) -> Tensor:
    others = [k for k in range(x.ndim) if k != axis]
    return x.sum(others) if others else x


@dataclass
class _Search:
    """Sums over the slices of a parameter along an axis, with the entries of a companion, at every point."""

    sums: _SliceSums
    names: tuple[str, ...]
    shape: tuple[int, ...]
    axis: int
    floors: list[float]
    tolerance: float

    def __post_init__(self) -> None:
        self.slices = Partition(self.shape, self.shape, (self.axis,))
        parts = [self.sums.of(self.names[0], self.axis), *(self.sums.of(name, 0) for name in self.names[1:])]
        # No sum can be larger; the product of the norms can where the scales of the entries differ.
        self.most = [sum(euler.size(name) for name in self.names) for euler in self.sums.fields]
        # Slices that are explained or found: so is what consists of them.
        self.known = np.zeros(self.shape[self.axis], dtype=bool)
        self.units = [np.sum(points, axis=0) for points in zip(*parts, strict=True)]

    def unexplained(self, explained: Explained) -> list[UnexplainedSymmetry]:
        """The invariant groups that nothing explains, from fine to coarse."""
        found = []
        for partition, members, values in self._levels():
            kept = [(number, units) for number, units in members if not explained.covers(self._direction(units))]
            if partition.n_groups == len(self.known):
                self.known[[units[0] for _, units in members]] = True
            new = [number for number, _ in kept]
            if new:
                found.append(
                    UnexplainedSymmetry("scale", self.names, partition, tuple(new), max(values[n] for n in new))
                )
        return found

    def mark(self, explained: Explained) -> None:
        """Take the slices without a gradient out of the search: nothing can be found of them."""
        explained.axis(self.names[0], self.slices)
        sizes = [np.sqrt(w * g) > floor for (_, w, g), floor in zip(self.units, self.floors, strict=True)]
        for index in np.flatnonzero(~np.all(sizes, axis=0)).tolist():
            explained.add(self._direction([index]))
            self.known[index] = True

    def _direction(self, units: Iterable[int]) -> Direction:
        places = [(self.names[0], self.axis), *((name, 0) for name in self.names[1:])]
        return {(name, axis, int(unit)): 1.0 for unit in units for name, axis in places}

    def _levels(self) -> Iterator[tuple[Partition, list[tuple[int, NDArray[np.int64]]], dict[int, float]]]:
        """Partitions from fine to coarse, with the groups that are invariant at all points and their values."""
        count = self.shape[self.axis]
        index = np.arange(count)
        if len(self.shape) > 1 or len(self.names) > 1:
            yield self._judged(self.slices, index[:, None])
        for blocks in (n for n in range(count - 1, 1, -1) if count % n == 0):
            before, after = self.shape[: self.axis], self.shape[self.axis + 1 :]
            size = count // blocks
            consecutive = Partition(self.shape, (*before, blocks, size, *after), (self.axis,))
            yield self._judged(consecutive, index.reshape(blocks, size))
            interleaved = Partition(self.shape, (*before, size, blocks, *after), (self.axis + 1,))
            yield self._judged(interleaved, index.reshape(size, blocks).T)
        # Slices along any axis are finer than the whole.
        if len(self.names) > 1 or self.axis == min(len(self.shape), 2) - 1:
            yield self._judged(Partition.whole(self.shape), index[None, :])

    def _judged(
        self, partition: Partition, members: NDArray[np.int64]
    ) -> tuple[Partition, list[tuple[int, NDArray[np.int64]]], dict[int, float]]:
        worst = np.zeros(len(members))
        for (products, weights, gradients), floor, most in zip(self.units, self.floors, self.most, strict=True):
            size = np.minimum(np.sqrt(weights[members].sum(1)) * np.sqrt(gradients[members].sum(1)), most)
            total = np.abs(products[members].sum(1))
            value = np.divide(total, size, out=np.full(len(members), np.inf), where=size > floor)
            worst = np.maximum(worst, value)
        numbers = np.flatnonzero((worst <= self.tolerance) & ~self.known[members].all(1)).tolist()
        return partition, [(n, members[n]) for n in numbers], {n: float(worst[n]) for n in numbers}
