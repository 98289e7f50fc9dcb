"""The numerical search: symmetries that the gradients show and that the structure does not explain.

At two independent points (weights, inputs and cotangents) ``w ⊙ ∂L/∂w`` is summed, for every parameter, over the slices
along each axis, over blocks of them and interleaved ones for every divisor (heads, groups of a normalization), and over
the whole, each alone and with the entries of a vector of the same module. The same is done with the gradient itself for
shifts. A group whose sum vanishes at both points is invariant. What follows from the symmetries that the structure
knows, or has no gradient that could tell, is subtracted; the second pass is run only where something then is left. What
remains holds near both points and may not hold far from them, as that of a ReLU6 whose bound no activation reaches;
`diagnose` puts it to the finite move.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from manifold_nets.groups import Partition
from manifold_nets.symmetry.explained import NOTHING, Explained
from manifold_nets.symmetry.families import joint_generators
from manifold_nets.symmetry.generators import Generators, single_entries
from manifold_nets.symmetry.gradients import GradientPass
from manifold_nets.symmetry.invariance import EVIDENCE_FLOOR, InvarianceTest
from manifold_nets.symmetry.joint import solve_jointly
from manifold_nets.symmetry.report import ShiftSymmetry, SymmetryFamily, UnexplainedSymmetry, WeightFinding
from manifold_nets.symmetry.seeds import without_last_axes
from manifold_nets.symmetry.trace import TracedGraph
from manifold_nets.symmetry.weight_findings import UNSUPPORTED

__all__ = ["NumericalSearch", "searched_partitions"]

# Blocks of filters that share a row: heads and groups of normalizations.
_MOST_BLOCKS = 64
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def searched_partitions(shape: Sequence[int]) -> tuple[Partition, ...]:
    """The partitions of a parameter whose sums the search reads: slices along two axes, and rows of blocks of filters.

    Example:
        >>> [p.n_groups for p in searched_partitions((6, 5))]
        [6, 5, 10]
    """
    return (*_slices(shape), *_blocks_of_rows(shape)[:1])


def _slices(shape: Sequence[int]) -> list[Partition]:
    return [Partition(tuple(shape), tuple(shape), (axis,)) for axis in range(min(len(shape), 2))]


def _blocks_of_rows(shape: Sequence[int]) -> list[Partition]:
    """Rows that are added to all filters of a block, for numbers of blocks from the finest one to one."""
    if len(shape) < 2:
        return []
    counts = [n for n in range(1, min(shape[0] // 2, _MOST_BLOCKS) + 1) if shape[0] % n == 0]
    finest = max(counts, key=lambda n: sum(n % d == 0 for d in counts), default=1)
    views = [(n, shape[0] // n, *shape[1:]) for n in sorted(counts or [1], reverse=True) if finest % n == 0]
    return [Partition(tuple(shape), view, (0, *range(2, len(view)))) for view in views]


class NumericalSearch:
    """Searches for invariant groups that structure does not explain.

    Args:
        graph: the network.
        test: tests at the first point.
        second: runs the pass at the second point; it is called once at most.
    """

    def __init__(self, graph: TracedGraph, test: InvarianceTest, second: Callable[[], GradientPass]) -> None:
        self.graph, self.first, self._second = graph, test.gradients, second
        self.tolerance = test.tolerance * UNSUPPORTED
        self.shapes = self.first.shapes
        # What was found for each parameter at this many points, and the shifts that were known then.
        self._searched: dict[tuple[str, int], tuple[list[ShiftSymmetry], list[UnexplainedSymmetry]]] = {}
        self.points = [_Point(self.first, test.floor(), test.floor(adds=True))]

    def both(self) -> list[_Point]:
        """The two points."""
        if len(self.points) < 2:
            for name, shape in self.shapes.items():
                for partition in _blocks_of_rows(shape):
                    self.first.forget(name, partition)
            second = InvarianceTest(self._second(), self.tolerance)
            self.points.append(_Point(second.gradients, second.floor(), second.floor(adds=True)))
        return self.points

    def unexplained(
        self,
        findings: Iterable[WeightFinding],
        families: Iterable[SymmetryFamily],
        shifts: Sequence[ShiftSymmetry],
    ) -> tuple[UnexplainedSymmetry, ...]:
        """The groups that no combination of what structure found and the certificate confirms accounts for."""
        found = self._scales(findings, families, shifts)
        # The second point is asked only where the first one shows something.
        return (*found, *(self._shifts(shifts, self.both()) if self.shown_shifts(shifts) else ()))

    def shown_shifts(self, shifts: Iterable[ShiftSymmetry]) -> list[UnexplainedSymmetry]:
        """The groups whose gradients sum to zero at the first point, without what the shifts explain."""
        return self._shifts(shifts, self.points[:1])

    # ---- scales ------------------------------------------------------------------------------------------------------

    def _scales(
        self, findings: Iterable[WeightFinding], families: Iterable[SymmetryFamily], shifts: Iterable[ShiftSymmetry]
    ) -> list[UnexplainedSymmetry]:
        known = _KnownScales(self.shapes)
        dead = [s.generators for s in shifts if s.kind == "dead bias" and s.certificate.verdict == "invariant"]
        for generators in (*dead, *(f.generators for f in families if f.certificate.verdict == "invariant")):
            known.add_generators(generators)
        for finding in findings:
            if finding.partition is not None and finding.certificate.verdict == "invariant":
                known.add_weight(finding)
        self._add_without_gradient(known, self.points[0])
        searches = [search for search in self._searches(known) if search.has_candidates(self.points[0])]
        counts = Counter(dict.fromkeys(self.shapes, 0))
        for part in (part for generators in dead for part in generators.parts):
            counts[part.parameter] += len(part.groups)
        wholly = {name for name, count in counts.items() if count and self.shapes[name] == (count,)}
        if searches and wholly:
            # Biases that are dead cannot tie scales either, as they do in the equations of the families.
            known.add_generators(joint_generators(solve_jointly(self.graph, wholly))[0])
            searches = [search for search in searches if search.has_candidates(self.points[0])]
        if not searches:
            return []
        self._add_without_gradient(known, self.both()[1])
        return [found for search in searches for found in search.found(self.points)]

    def _searches(self, known: _KnownScales) -> Iterator[_ScaleSearch]:
        for name, shape in self.shapes.items():
            for axis in range(min(len(shape), 2)):
                for names in [(name,), *((name, other) for other in self._companions(name, axis))]:
                    yield _ScaleSearch(known, names, shape, axis, self.tolerance)

    def _companions(self, name: str, axis: int) -> list[str]:
        """Vectors of the same module with one entry for each slice; of two vectors the second follows the first."""
        module = self._modules[name.rpartition(".")[0]]
        after = module[module.index(name) + 1 :] if len(self.shapes[name]) == 1 else module
        return [other for other in after if other != name and self.shapes[other] == (self.shapes[name][axis],)]

    @cached_property
    def _modules(self) -> dict[str, list[str]]:
        """The parameters of each module."""
        found: dict[str, list[str]] = {}
        for name in self.shapes:
            found.setdefault(name.rpartition(".")[0], []).append(name)
        return found

    def _add_without_gradient(self, known: _KnownScales, point: _Point) -> None:
        """Take the slices without a gradient out of the search: nothing can be found of them."""
        for name, shape in self.shapes.items():
            for axis, partition in enumerate(_slices(shape)):
                _, weights, gradients = point.slices(name, axis)
                (without_gradient,) = np.nonzero(~(np.sqrt(weights * gradients) > point.floor))
                places = known.places(name, partition)[without_gradient]
                known.add(np.arange(len(places)), places, np.ones(len(places)))

    # ---- shifts ------------------------------------------------------------------------------------------------------

    def _shifts(self, shifts: Iterable[ShiftSymmetry], points: Sequence[_Point]) -> list[UnexplainedSymmetry]:
        known: dict[str, list[ShiftSymmetry]] = {}
        for shift in shifts:
            if len(shift.parameters) == 1 and shift.certificate.verdict == "invariant":
                known.setdefault(shift.parameters[0], []).append(shift)
        found = []
        for name in self.shapes:
            own = known.get(name, [])
            before, result = self._searched.get((name, len(points)), (None, []))
            if before is None or list(map(id, before)) != list(map(id, own)):
                result = self._shifts_of(name, own, points)
                self._searched[name, len(points)] = own, result
            found += result
        return found

    def _shifts_of(
        self, name: str, known: Sequence[ShiftSymmetry], points: Sequence[_Point]
    ) -> list[UnexplainedSymmetry]:
        shape = self.shapes[name]
        if not shape or 0 in shape or not all(point.has_gradient(name) for point in points):
            return []
        return list((_vector_shifts if len(shape) == 1 else _tensor_shifts)(self, name, known, points))

    def beside(self, name: str, point: _Point) -> float:
        """The largest gradient of another parameter of the same module."""
        others = [other for other in self._modules[name.rpartition(".")[0]] if other != name]
        return max(map(point.gradients.slope, others), default=0.0)


@dataclass
class _Point:
    """The sums of one pass, and below which sizes of scales and of shifts they prove nothing."""

    gradients: GradientPass
    floor: float
    slope_floor: float
    _known: dict[tuple[str, int], Floats] = field(default_factory=dict)

    def slices(self, name: str, axis: int) -> Floats:
        """Σ w ⊙ g, Σ w² and Σ g² of each slice of a parameter along an axis."""
        if (name, axis) not in self._known:
            sums = self.gradients.sums(name, _slices(self.gradients.shapes[name])[axis])
            self._known[name, axis] = torch.stack([sums.products, sums.weights, sums.gradients]).cpu().numpy()
        return self._known[name, axis]

    def slopes(self, name: str, partition: Partition, finest: Partition) -> tuple[Floats, Floats]:
        """Σ g and Σ g² of each group of a tensor; those of blocks of rows are added up from the finest ones."""
        blocks = partition.kept == finest.kept and partition.view[0] < finest.view[0]
        sums = self.gradients.sums(name, finest if blocks else partition)
        slopes, squares = sums.slopes.cpu().numpy(), sums.gradients.cpu().numpy()
        if not blocks:
            return slopes, squares
        view = partition.view[0], finest.view[0] // partition.view[0], -1
        return slopes.reshape(view).sum(1).ravel(), squares.reshape(view).sum(1).ravel()

    def has_gradient(self, name: str) -> bool:
        return bool(self.slices(name, 0)[2].any())


# ---- scales ----------------------------------------------------------------------------------------------------------


class _KnownScales(Explained):
    """The span of what structure knows of scales, with a coordinate for each group of each partition in use."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        super().__init__()
        self.shapes, self._of = shapes, dict[tuple[str, Partition], Ints]()
        for name, shape in shapes.items():
            for partition in _slices(shape):
                self.places(name, partition)

    def places(self, name: str, partition: Partition) -> Ints:
        """The coordinates of the groups of a partition."""
        if (name, partition) in self._of:
            return self._of[name, partition]
        own = self._of[name, partition] = self.coordinates(partition.n_groups)
        slices = _slices(self.shapes[name])
        if slices and partition != slices[0]:
            # Whatever the partition, all its groups together are the whole parameter.
            rows = self._of[name, slices[0]]
            self._add_equal(rows, own)
            if partition.kept == (0, 2) and partition.view[1] * partition.view[0] == len(rows):
                # In a grouped convolution the slices of a group along axis 0 and its other channels are the same block.
                blocks = partition.view[0]
                for one, other in zip(np.split(rows, blocks), np.split(own, blocks), strict=True):
                    self._add_equal(one, other)
        return own

    def _add_equal(self, one: Ints, other: Ints) -> None:
        places = np.concatenate([one, other])
        self.add(np.zeros(len(places), dtype=np.int64), places, np.repeat([1.0, -1.0], [len(one), len(other)]))

    def add_generators(self, generators: Generators) -> None:
        """Take in scales."""
        for_each = [
            (part.numbers, self.places(part.parameter, part.partition)[part.groups], part.coefficients)
            for part in generators.parts
        ]
        if for_each:
            self.add(*(np.concatenate(columns) for columns in zip(*for_each, strict=True)))

    def add_weight(self, finding: WeightFinding) -> None:
        """Take in the groups of a weight, as slices along each axis, with the biases that are scaled along."""
        own, *biases = finding.generators.parts
        # Of a table of which one row is zero, the rows are its groups, though the partition is the whole.
        rows = finding.finer_groups == finding.shape[0]
        partition = Partition.filters(finding.shape) if rows else own.partition
        for slices in _slices(finding.shape):
            block, block_of_group = _slices_of_groups(partition, slices.kept[0])
            numbers, places = [block], [self.places(finding.name, slices)]
            for part in () if rows else biases:
                numbers.append(block_of_group[part.numbers])
                places.append(self.places(part.parameter, part.partition)[part.groups])
            _, number = np.unique(np.concatenate(numbers), return_inverse=True)
            self.add(number, np.concatenate(places), np.ones(len(number)))


def _slices_of_groups(partition: Partition, axis: int) -> tuple[Ints, Ints]:
    """The smallest sets of slices along an axis that consist of whole groups, by slice and by group."""
    (small,) = without_last_axes(partition, least=axis + 1)
    count = small.shape[axis]
    ids = small.group_ids().movedim(axis, 0).reshape(count, -1).numpy()
    label = np.arange(count)
    while True:
        least = np.full(small.n_groups, count, dtype=np.int64)
        np.minimum.at(least, ids.ravel(), np.repeat(label, ids.shape[1]))
        joined = least[ids].min(1)
        if (joined == label).all():
            return label, least
        label = joined


@dataclass
class _Level:
    """The groups of a partition that are invariant: their numbers, the slices of each, and their values."""

    view: tuple[int, ...]
    kept: tuple[int, ...]
    numbers: Ints
    members: Ints
    values: Floats


@dataclass
class _ScaleSearch:
    """The slices of a parameter along an axis, with the entries of a companion."""

    known: _KnownScales
    names: tuple[str, ...]
    shape: tuple[int, ...]
    axis: int
    tolerance: float

    def has_candidates(self, point: _Point) -> bool:
        """Whether some group is invariant at a point and does not follow from what is known."""
        if not self.known.vector[self._places].any():
            return False  # every slice follows
        return any(
            not self.known.follows(self._groups(level)).all() for level in self._levels([point]) if len(level.numbers)
        )

    def found(self, points: Sequence[_Point]) -> Iterator[UnexplainedSymmetry]:
        """The invariant groups that nothing explains, from fine to coarse; they are known from then on."""
        for level in self._levels(points):
            new = self.known.take(self._groups(level)) if len(level.numbers) else np.zeros(0, dtype=bool)
            if new.any():
                numbers, value = tuple(level.numbers[new].tolist()), float(level.values[new].max())
                partition = Partition(self.shape, level.view, level.kept)
                yield UnexplainedSymmetry("scale", self.names, partition, numbers, value)

    @cached_property
    def _places(self) -> Ints:
        """The coordinates of the slices: one row for the parameter and one for its companion."""
        own = self.known.places(self.names[0], _slices(self.shape)[self.axis])
        vector = _slices((self.shape[self.axis],))[0]
        return np.stack([own, *(self.known.places(name, vector) for name in self.names[1:])])

    def _groups(self, level: _Level) -> Ints:
        return np.moveaxis(self._places[:, level.members], 0, 1).reshape(len(level.numbers), -1)

    def _levels(self, points: Sequence[_Point]) -> Iterator[_Level]:
        """Partitions from fine to coarse, with the groups that are invariant at all points."""
        count, shape = self.shape[self.axis], self.shape
        before, after = shape[: self.axis], shape[self.axis + 1 :]
        sized = []
        for p in points:
            sums = sum((p.slices(name, 0) for name in self.names[1:]), p.slices(self.names[0], self.axis))
            # No sum can be larger than the parameters; the product of the norms can where the scales differ.
            sized.append((sums, sum(p.gradients.size(name) for name in self.names), p.floor))
        if len(shape) > 1 or len(self.names) > 1:
            yield self._level(shape, (self.axis,), (count, 1), sized)
        for blocks in (n for n in range(count - 1, 1, -1) if count % n == 0):
            size = count // blocks
            consecutive = (*before, blocks, size, *after)
            yield self._level(consecutive, (self.axis,), (blocks, size), sized)
            interleaved = (*before, size, blocks, *after)
            yield self._level(interleaved, (self.axis + 1,), (size, blocks), sized, kept=1)
        # Slices along any axis are finer than the whole.
        if len(self.names) > 1 or self.axis == min(len(shape), 2) - 1:
            yield self._level(shape, (), (1, count), sized)

    def _level(
        self,
        view: tuple[int, ...],
        numbered: tuple[int, ...],
        cut: tuple[int, int],
        sized: Sequence[tuple[Floats, float, float]],
        kept: int = 0,
    ) -> _Level:
        """The invariant groups of a partition, numbered along one of the two axes into which the slices are cut."""
        numbers, worst = np.arange(cut[kept]), np.zeros(cut[kept])
        for sums, most, floor in sized:
            given = sums if cut[1 - kept] == 1 else sums.reshape(3, *cut).sum(2 - kept)
            products, weights, gradients = given[:, numbers]
            size = np.minimum(np.sqrt(weights) * np.sqrt(gradients), most)
            near = (np.abs(products) <= 2 * self.tolerance * size) & (size > floor)
            numbers, worst = numbers[near], np.maximum(worst[near], np.abs(products[near]) / size[near])
            if not len(numbers):
                break
        numbers, worst = numbers[worst <= self.tolerance], worst[worst <= self.tolerance]
        members = np.moveaxis(np.arange(cut[0] * cut[1]).reshape(cut), kept, 0)[numbers]
        return _Level(view, numbered, numbers, members, worst)


# ---- shifts ----------------------------------------------------------------------------------------------------------


def _invariant(sums: Iterable[tuple[Floats, Floats, _Point]], size: int, tolerance: float) -> tuple[Ints, Floats]:
    """The groups that are invariant at all points, by the sums of their gradients and of the squares, and their values.

    Args:
        sums: the sums of each group at each point.
        size: how many entries a group has.
        tolerance: the largest value.
    """
    numbers, worst = np.zeros(0, dtype=np.int64), np.zeros(0)
    for place, (slopes, squares, point) in enumerate(sums):
        if place == 0:  # nearly all groups are none
            numbers = np.flatnonzero(np.abs(slopes) <= 2 * tolerance * size**0.5 * np.sqrt(squares))
            worst = np.zeros(len(numbers))
        if not len(numbers):
            break
        norms = np.sqrt(squares.ravel()[numbers])
        values = np.full(len(norms), np.inf)
        np.divide(np.abs(slopes.ravel()[numbers]), norms * size**0.5, out=values, where=norms > point.slope_floor)
        worst = np.maximum(values, worst)
    kept = worst <= tolerance
    return numbers[kept], worst[kept]


def _vector_shifts(
    search: NumericalSearch, name: str, shifts: Iterable[ShiftSymmetry], points: Sequence[_Point]
) -> Iterator[UnexplainedSymmetry]:
    """Entries that do nothing, then blocks of entries, interleaved ones, and all entries."""
    (count,) = search.shapes[name]
    known = Explained()
    index = known.coordinates(count)
    for shift in shifts:
        for part in shift.generators.parts:
            known.add(part.numbers, part.groups, part.coefficients)
    gradients = [point.gradients.gradients[name].cpu().numpy() for point in points]
    sizes = [np.abs(gradient) for gradient in gradients]
    beside = [search.beside(name, point) for point in points]
    for blocks in (n for n in (3, 2, 1) if count % n == 0):
        entries = index.reshape(blocks, -1)[_dead_blocks(sizes, beside, blocks)].reshape(-1, 1)
        new = entries[known.take(entries), 0] if len(entries) else index[:0]
        if len(new):
            value = max(float(s[new].max()) / b for s, b in zip(sizes, beside, strict=True))
            yield UnexplainedSymmetry("shift", (name,), single_entries((count,)), tuple(new.tolist()), value)
    (without_gradient,) = np.nonzero(
        np.any([s <= point.slope_floor for s, point in zip(sizes, points, strict=True)], axis=0)
    )
    known.add(np.arange(len(without_gradient)), without_gradient, np.ones(len(without_gradient)))
    for blocks in (n for n in range(count - 1, 0, -1) if count % n == 0):
        size = count // blocks
        for view, axis in (((blocks, size), 0), ((size, blocks), 1)):
            viewed = [gradient.reshape(view) for gradient in gradients]
            terms = ((g.sum(1 - axis), (g * g).sum(1 - axis)) for g in viewed)
            sums = ((*pair, point) for pair, point in zip(terms, points, strict=True))
            numbers, values = _invariant(sums, size, search.tolerance)
            members = index.reshape(view) if axis == 0 else index.reshape(view).T
            new = known.take(members[numbers]) if len(numbers) else np.zeros(0, dtype=bool)
            if new.any():
                partition, value = Partition((count,), view, (axis,)), float(values[new].max())
                yield UnexplainedSymmetry("shift", (name,), partition, tuple(numbers[new].tolist()), value)


def _dead_blocks(sizes: Sequence[Floats], beside: Sequence[float], blocks: int) -> Ints:
    """Blocks of which every entry has no gradient but rounding, next to one of the same module that has.

    Single entries prove nothing: whether a channel is cut off often depends on the inputs. What is exactly zero was
    not reached and proves nothing either.
    """
    found = np.ones(blocks, dtype=bool)
    for size, other in zip(sizes, beside, strict=True):
        block = size.reshape(blocks, -1)
        found &= (block <= EVIDENCE_FLOOR * other).all(1) & (block > 0).any(1)
    return np.flatnonzero(found)


def _tensor_shifts(
    search: NumericalSearch, name: str, shifts: Iterable[ShiftSymmetry], points: Sequence[_Point]
) -> Iterator[UnexplainedSymmetry]:
    """Rows that are added to blocks of filters, constants that are added to filters, and one constant."""
    shape = search.shapes[name]
    partitions = _blocks_of_rows(shape)
    if len(shape) > 2 and shape[1] > 1:
        partitions.append(Partition(shape, shape, (0, *range(2, len(shape)))))
    partitions += [p for p in (Partition.filters(shape), Partition.whole(shape)) if p.group_size > 1]
    known: list[Tensor] | None = None
    for partition in partitions:
        sums = ((*point.slopes(name, partition, partitions[0]), point) for point in points)
        numbers, values = _invariant(sums, partition.group_size, search.tolerance)
        if not len(numbers):
            continue
        if known is None:
            # What was not reached at all, as rows that are not looked up, may be in a group or not.
            live = torch.stack([(point.gradients.gradients[name] != 0).cpu() for point in points]).all(0)
            labels = [_label(shift.generators) for shift in shifts]
            known = [_orthogonal(label, live) for label in (*labels, *_joined(labels))]
        follow = np.zeros(partition.n_groups, dtype=bool)
        for vector in known:
            totals, sizes = partition.sum(vector).flatten(), partition.sum(vector.abs()).flatten()
            follow |= (totals.abs() <= NOTHING * sizes).numpy()
        new = ~follow[numbers]
        if new.any():
            fresh = numbers[new].tolist()
            known.append(_orthogonal(_label(Generators.of_groups(name, partition, fresh)), live))
            yield UnexplainedSymmetry("shift", (name,), partition, tuple(fresh), float(values[new].max()))


def _label(shifts: Generators) -> Tensor:
    """For each entry of a parameter the number of the shift that moves it, −1 where none does."""
    (part,) = shifts.parts
    number = torch.full((part.partition.n_groups,), -1, dtype=torch.int64)
    number[torch.from_numpy(part.groups)] = torch.from_numpy(part.numbers)
    return number[part.partition.group_ids()]


def _joined(labels: Sequence[Tensor]) -> list[Tensor]:
    """One label in place of several that move different entries: together they explain what none does alone."""
    joined = torch.full_like(labels[0], -1) if len(labels) > 1 else None
    for label in labels:
        if joined is None or bool(((joined >= 0) & (label >= 0)).any()):
            return []
        joined = torch.where(label >= 0, label + joined.max() + 1, joined)
    return [] if joined is None else [joined]


def _orthogonal(label: Tensor, live: Tensor) -> Tensor:
    """Random numbers for the entries of a tensor that sum to zero over the live ones of each shift of a label."""
    drawn = (
        torch.rand(label.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).sub_(0.5).mul_(live)
    )
    moved = (label.flatten() + 1) * live.flatten()
    means = torch.bincount(moved, drawn.flatten()) / torch.bincount(moved).clamp_min(1)
    means[0] = 0.0
    return drawn - means[moved].reshape(label.shape)
