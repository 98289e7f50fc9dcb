"""The certificate the other way: invariant groups that the numbers show and that the structure does not explain.

At two independent points (weights, inputs and cotangents) the Euler field ``e = w ⊙ ∂L/∂w`` of every parameter is
summed over a family of partitions: the slices along each axis, blocks of them and interleaved ones for every divisor
(heads, groups of a normalization), the whole, each alone and with the entries of a vector of the same module. The same
is done with the gradient itself for shifts. A group whose sum vanishes at both points is invariant. What follows from
the symmetries that the structure knows, or has no gradient that could tell, is subtracted; the rest is reported.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from manifold_nets.groups import Partition
from manifold_nets.symmetry.certificate import EVIDENCE_FLOOR, EulerField
from manifold_nets.symmetry.report import SymmetryFamily, WeightFinding
from manifold_nets.symmetry.shift_report import ShiftSymmetry
from manifold_nets.symmetry.shift_search import unexplained_shifts
from manifold_nets.symmetry.spans import Span
from manifold_nets.symmetry.unexplained import UnexplainedSymmetry

__all__ = ["search_unexplained"]

Key = tuple[str, int, int]
Direction = dict[Key, float]
Numbers = NDArray[np.float64]


@dataclass
class _Explained:
    """The directions that structure knows, as coordinates (parameter, axis, index): one for each slice of an axis."""

    shapes: Mapping[str, tuple[int, ...]]
    by_name: dict[str, list[Direction]] = field(default_factory=dict)
    dead: set[Key] = field(default_factory=set)

    def add(self, direction: Direction) -> None:
        for name in {key[0] for key in direction}:
            self.by_name.setdefault(name, []).append(direction)

    def within(self, names: tuple[str, ...], axis: int) -> Iterator[Direction]:
        """Directions that move nothing but these parameters (the first along this axis) and entries without effect."""
        for name in names:
            for direction in self.by_name.get(name, []):
                moved: Direction | None = {}
                for key, value in direction.items():
                    if key in self.dead:
                        continue
                    if key[0] not in names:
                        moved = None
                        break
                    moved[key] = value
                if moved:
                    turned = self._along(moved, names[0], axis)
                    if turned is not None:
                        yield turned
        yield from ({key: 1.0} for key in self.dead if key[0] in names[1:])

    def _along(self, direction: Direction, name: str, axis: int) -> Direction | None:
        """The direction with the slices of a parameter along an axis; None where it is no sum of such slices."""
        others = {key[1] for key in direction if key[0] == name} - {axis}
        if not others:
            return direction
        values = {key: value for key, value in direction.items() if key[0] == name}
        size = self.shapes[name][next(iter(others))]
        if len(others) > 1 or len(values) != size or len(set(values.values())) > 1:
            return None
        rest = {key: value for key, value in direction.items() if key[0] != name}
        common = next(iter(values.values()))
        return {**rest, **{(name, axis, index): common for index in range(self.shapes[name][axis])}}


def search_unexplained(
    fields: tuple[EulerField, EulerField],
    findings: Iterable[WeightFinding],
    families: Iterable[SymmetryFamily],
    shifts: Iterable[ShiftSymmetry],
    tolerance: float,
) -> tuple[UnexplainedSymmetry, ...]:
    """Search for invariant groups that structure does not explain.

    Args:
        fields: weights and gradients at two independent points.
        findings: what structure and certificate say of each weight.
        families: the symmetries that structure found.
        shifts: the shifts that structure found.
        tolerance: largest certificate value of an invariant group.

    Returns:
        The groups that no combination of what structure found accounts for, parameter by parameter.
    """
    shifts = tuple(shifts)
    if any(euler.silent for euler in fields):
        return ()
    shapes = {name: tuple(weight.shape) for name, weight in fields[0].weights.items()}
    explained = _explained(shapes, findings, families, shifts)
    floors = [EVIDENCE_FLOOR * _largest(euler) for euler in fields]
    found: list[UnexplainedSymmetry] = []
    for name, shape in shapes.items():
        span_of_name: list[UnexplainedSymmetry] = []
        for axis in range(min(len(shape), 2)):
            if axis > 0 and shape[axis] == 1:
                continue
            for names in [(name,), *((name, other) for other in _companions(shapes, name, axis))]:
                search = _Search(fields, names, shape, axis, floors, tolerance)
                span_of_name += search.unexplained(explained)
        found += span_of_name
    return (*found, *unexplained_shifts(fields, shifts, tolerance))


def _largest(euler: EulerField) -> float:
    sizes = (float(w.norm() * euler.gradients[name].norm()) for name, w in euler.weights.items() if w.ndim >= 2)
    return max(sizes, default=0.0)


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


def _explained(
    shapes: Mapping[str, tuple[int, ...]],
    findings: Iterable[WeightFinding],
    families: Iterable[SymmetryFamily],
    shifts: Iterable[ShiftSymmetry],
) -> _Explained:
    explained = _Explained(shapes)
    for shift in shifts:
        if shift.kind == "dead bias" and shift.certificate.verdict == "invariant":
            explained.dead |= {(name, 0, index) for d in shift.directions for name, part in d.items() for index in part}
    for family in families:
        if family.certificate.verdict != "invariant":
            continue
        for symmetry in family.symmetries:
            direction: Direction = {}
            for place, exponents in symmetry.items():
                axis = _axis_of(family.partitions[place])
                direction.update({(place[0], axis, index): c for index, c in exponents.items()})
            explained.add(direction)
    for finding in findings:
        if finding.partition is not None and finding.certificate.verdict == "invariant":
            _add_finding(explained, finding, finding.partition)
    return explained


def _axis_of(partition: Partition) -> int:
    """The axis along which a partition cuts slices; −1 where its groups are no slices of one axis."""
    if partition.view == partition.shape and len(partition.kept) == 1:
        return partition.kept[0]
    return 0 if len(partition.shape) == 1 else -1


def _add_finding(explained: _Explained, finding: WeightFinding, partition: Partition) -> None:
    """Add the groups of a weight, as slices along each axis, with the biases that are scaled along."""
    along: dict[int, Direction] = {}
    for bias in finding.scaled_along:
        for index, group in enumerate(bias.groups):
            along.setdefault(group, {})[bias.name, 0, index] = 1.0
    for axis in range(min(len(finding.shape), 2)):
        for slices, groups in _slices_of_groups(partition, axis):
            direction: Direction = {(finding.name, axis, index): 1.0 for index in slices}
            for group in groups:
                direction.update(along.get(group, {}))
            explained.add(direction)


def _slices_of_groups(partition: Partition, axis: int) -> list[tuple[list[int], list[int]]]:
    """The smallest sets of slices along an axis that consist of whole groups, each with these groups."""
    shape, view, kept = list(partition.shape), list(partition.view), partition.kept
    while len(shape) > axis + 1 and view[-1] == shape[-1] and len(view) - 1 not in kept:
        shape.pop()
        view.pop()
    small = Partition(tuple(shape), tuple(view), kept)
    ids = small.group_ids().movedim(axis, 0).reshape(shape[axis], -1).numpy()
    label = np.arange(shape[axis])
    while True:
        least = np.full(small.n_groups, shape[axis], dtype=np.int64)
        np.minimum.at(least, ids.ravel(), np.repeat(label, ids.shape[1]))
        joined = least[ids].min(1)
        if (joined == label).all():
            break
        label = joined
    order = np.argsort(label, kind="stable")
    cuts = np.flatnonzero(np.diff(label[order])) + 1
    return [(slices.tolist(), np.unique(ids[slices]).tolist()) for slices in np.split(order, cuts)]


@dataclass
class _Search:
    """Sums over the slices of a parameter along an axis, with the entries of a companion, at both points."""

    fields: tuple[EulerField, EulerField]
    names: tuple[str, ...]
    shape: tuple[int, ...]
    axis: int
    floors: list[float]
    tolerance: float

    def __post_init__(self) -> None:
        self.slices = Partition(self.shape, self.shape, (self.axis,)) if self.shape else Partition((), (), ())
        self.units = [self._unit_sums(euler) for euler in self.fields]

    def _unit_sums(self, euler: EulerField) -> tuple[Numbers, Numbers, Numbers]:
        """Σ w ⊙ g, Σ w² and Σ g² of each slice."""
        total: list[Any] = [0.0, 0.0, 0.0]
        for name in self.names:
            partition = self.slices if name == self.names[0] else Partition.filters(tuple(euler.weights[name].shape))
            w, g = euler.weights[name], euler.gradients[name]
            for k, (x, y) in enumerate(((w, g), (w, w), (g, g))):
                total[k] = total[k] + partition.inner(x, y).flatten().cpu().numpy()
        return total[0], total[1], total[2]

    def unexplained(self, explained: _Explained) -> list[UnexplainedSymmetry]:
        """The invariant groups that nothing explains, from fine to coarse."""
        certified = [(partition, members, values) for partition, members, values in self._levels() if len(values)]
        if not certified:
            return []
        span = Span(explained.within(self.names, self.axis))
        for index in np.flatnonzero(~self._has_evidence()).tolist():
            span.add(self._direction([index]))
        found = []
        for partition, members, values in certified:
            new = [number for number, units in members if span.add(self._direction(units))]
            if new:
                found.append(
                    UnexplainedSymmetry("scale", self.names, partition, tuple(new), max(values[n] for n in new))
                )
        return found

    def _direction(self, units: Iterable[int]) -> Direction:
        places = [(self.names[0], self.axis), *((name, 0) for name in self.names[1:])]
        return {(name, axis, int(unit)): 1.0 for unit in units for name, axis in places}

    def _has_evidence(self) -> NDArray[np.bool_]:
        sizes = [np.sqrt(w * g) > floor for (_, w, g), floor in zip(self.units, self.floors, strict=True)]
        return np.asarray(sizes[0] & sizes[1])

    def _levels(self) -> Iterator[tuple[Partition, list[tuple[int, NDArray[np.int64]]], dict[int, float]]]:
        """Partitions from fine to coarse, with the groups that are invariant at both points and their values."""
        count = self.shape[self.axis] if self.shape else 1
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
        if self.axis == 0:
            yield self._judged(Partition.whole(self.shape), index[None, :])

    def _judged(
        self, partition: Partition, members: NDArray[np.int64]
    ) -> tuple[Partition, list[tuple[int, NDArray[np.int64]]], dict[int, float]]:
        worst = np.zeros(len(members))
        for (products, weights, gradients), floor in zip(self.units, self.floors, strict=True):
            size = np.sqrt(weights[members].sum(1) * gradients[members].sum(1))
            total = np.abs(products[members].sum(1))
            value = np.divide(total, size, out=np.full(len(members), np.inf), where=size > floor)
            worst = np.maximum(worst, value)
        numbers = np.flatnonzero(worst <= self.tolerance).tolist()
        return partition, [(n, members[n]) for n in numbers], {n: float(worst[n]) for n in numbers}
