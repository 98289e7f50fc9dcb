"""The numerical search: symmetries that show in the gradients but are not explained by the structure.

At two independent points (weights, inputs and cotangents) ``w ⊙ ∂L/∂w`` is summed, for every parameter, over the slices
along each axis, over blocks and interleaved sets of slices for every divisor (heads, groups of a normalization), and
over the whole tensor, each alone and together with the entries of a vector of the same module. For shifts, the gradient
itself is summed. A group whose sum vanishes at both points is invariant. Symmetries that follow from the structure, and
groups without a gradient, are subtracted; the second pass runs only if something is left. What remains holds near both
points, but may not hold far away, as for a ReLU6 whose bound no activation reaches; `diagnose` tests it by a finite
move.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

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
# Slices of which all groups are looked at together; where there are more, their lists would take memory.
_FEW = 1 << 12
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def searched_partitions(shape: Sequence[int]) -> tuple[Partition, ...]:
    """The partitions of a parameter whose sums the search reads: slices along two axes, and rows of blocks of filters.

    Example:
        >>> [p.n_groups for p in searched_partitions((6, 5))]
        [6, 5, 10]
    """
    return (*_slices(tuple(shape)), *_blocks_of_rows(tuple(shape))[:1])


@functools.lru_cache(maxsize=1024)
def _slices(shape: tuple[int, ...]) -> list[Partition]:
    return [Partition(shape, shape, (axis,)) for axis in range(min(len(shape), 2))]


@functools.lru_cache(maxsize=1024)
def _blocks_of_rows(shape: tuple[int, ...]) -> list[Partition]:
    """Rows that are added to all filters of a block, for numbers of blocks from the finest one to one."""
    if len(shape) < 2:
        return []
    counts = [n for n in range(1, min(shape[0] // 2, _MOST_BLOCKS) + 1) if shape[0] % n == 0]
    finest = max(counts, key=lambda n: sum(n % d == 0 for d in counts), default=1)
    views = [(n, shape[0] // n, *shape[1:]) for n in sorted(counts or [1], reverse=True) if finest % n == 0]
    return [Partition(shape, view, (0, *range(2, len(view)))) for view in views]


class NumericalSearch:
    """Searches for invariant groups that the structure does not explain.

    Args:
        graph: the network.
        test: the gradient test at the first point.
        second: computes the gradients at the second point; called at most once.
    """

    def __init__(self, graph: TracedGraph, test: InvarianceTest, second: Callable[[], GradientPass]) -> None:
        self.graph, self._second = graph, second
        self.tolerance, self.shapes = test.tolerance * UNSUPPORTED, test.gradients.shapes
        self.tests = [InvarianceTest(test.gradients, self.tolerance)]
        self._names: Iterable[str] = self.shapes
        self._modules: dict[str, list[str]] = {}
        for name in self.shapes:
            self._modules.setdefault(name.rpartition(".")[0], []).append(name)

    def both(self) -> list[InvarianceTest]:
        """The tests at the two points."""
        if len(self.tests) < 2:
            for name, shape in self.shapes.items():
                for partition in _blocks_of_rows(shape):
                    self.tests[0].gradients.forget(name, partition)
            self.tests.append(InvarianceTest(self._second(), self.tolerance))
        return self.tests

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
        """The groups whose gradients sum to zero at the first point, without what the shifts explain.

        Asked again, with other shifts of the parameters for which it found some, it looks at these alone.
        """
        found = self._shifts(shifts, self.tests[:1])
        self._names = list(dict.fromkeys(one.parameters[0] for one in found))
        return found

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
        known.add_without_gradient(self.tests[0])
        first = self.tests[:1]
        searches = [search for search in self._searches(known) if search.has_candidates(first)]
        counts = Counter(dict.fromkeys(self.shapes, 0))
        for part in (part for generators in dead for part in generators.parts):
            counts[part.parameter] += len(part.groups)
        wholly = {name for name, count in counts.items() if count and self.shapes[name] == (count,)}
        if searches and wholly:
            # Biases that are dead cannot tie scales either, as they do in the equations of the families.
            known.add_generators(joint_generators(solve_jointly(self.graph, wholly))[0])
            searches = [search for search in searches if search.has_candidates(first)]
        if not searches:
            return []
        known.add_without_gradient(self.both()[1])
        return [found for search in searches for found in search.found(self.tests)]

    def _searches(self, known: _KnownScales) -> Iterator[_SliceSearch]:
        for name, shape in self.shapes.items():
            for axis in range(min(len(shape), 2)):
                for names in [(name,), *((name, other) for other in self._companions(name, axis))]:
                    vector = _slices((shape[axis],))[0]
                    places = [known.places(n, vector if k else _slices(shape)[axis]) for k, n in enumerate(names)]
                    # Single entries scale nothing; slices along any axis are finer than the whole.
                    finest = len(shape) > 1 or len(names) > 1
                    whole = len(names) > 1 or axis == min(len(shape), 2) - 1
                    yield _SliceSearch("scale", known, np.stack(places), names, shape, axis, finest, whole)

    def _companions(self, name: str, axis: int) -> list[str]:
        """Vectors of the same module with one entry for each slice; of two vectors the second follows the first."""
        module = self._modules[name.rpartition(".")[0]]
        after = module[module.index(name) + 1 :] if len(self.shapes[name]) == 1 else module
        return [other for other in after if other != name and self.shapes[other] == (self.shapes[name][axis],)]

    # ---- shifts ------------------------------------------------------------------------------------------------------

    def _shifts(self, shifts: Iterable[ShiftSymmetry], tests: Sequence[InvarianceTest]) -> list[UnexplainedSymmetry]:
        known: dict[str, list[Generators]] = {}
        for shift in shifts:
            if len(shift.parameters) == 1 and shift.certificate.verdict == "invariant":
                known.setdefault(shift.parameters[0], []).append(shift.generators)
        found: list[UnexplainedSymmetry] = []
        for name in self._names:
            shape, gradients = self.shapes[name], [test.gradients.gradients[name] for test in tests]
            if shape and 0 not in shape and all(test.gradients.slope(name) != 0 for test in tests):
                search = self._vector_shifts if len(shape) == 1 else self._tensor_shifts
                found += search(name, known.get(name, []), tests, gradients)
        return found

    def _vector_shifts(
        self, name: str, shifts: Iterable[Generators], tests: Sequence[InvarianceTest], gradients: Sequence[Tensor]
    ) -> Iterator[UnexplainedSymmetry]:
        """Entries that do nothing, then blocks of entries, interleaved ones, and all entries."""
        (count,) = self.shapes[name]
        known = Explained()
        index = known.coordinates(count)
        for part in (part for generators in shifts for part in generators.parts):
            known.add(part.numbers, part.groups, part.coefficients)
        sizes = np.stack([gradient.abs().cpu().numpy() for gradient in gradients])
        others = [other for other in self._modules[name.rpartition(".")[0]] if other != name]
        beside = np.array([max(map(test.gradients.slope, others), default=0.0) for test in tests])
        # Blocks of which every entry has no gradient but rounding, next to a parameter of the same module that has.
        # Single entries prove nothing: whether a channel is cut off often depends on the inputs. What is exactly zero
        # was not reached and proves nothing either.
        for blocks in (n for n in (3, 2, 1) if count % n == 0):
            cut = sizes.reshape(len(tests), blocks, -1)
            dead = ((cut <= EVIDENCE_FLOOR * beside[:, None, None]).all(2) & (cut > 0).any(2)).all(0)
            entries = index.reshape(blocks, -1)[dead].reshape(-1, 1)
            new = entries[known.take(entries), 0] if len(entries) else index[:0]
            if len(new):
                value = float((sizes[:, new].max(1) / beside).max())
                yield UnexplainedSymmetry("shift", (name,), single_entries((count,)), tuple(new.tolist()), value)
        floors = np.array([test.floor(adds=True) for test in tests])
        without_gradient = np.flatnonzero((sizes <= floors[:, None]).any(0))
        known.add(np.arange(len(without_gradient)), without_gradient, np.ones(len(without_gradient)))
        search = _SliceSearch("shift", known, index[None], (name,), (count,), 0, finest=False)
        yield from search.found(tests)

    def _tensor_shifts(
        self, name: str, shifts: Iterable[Generators], tests: Sequence[InvarianceTest], gradients: Sequence[Tensor]
    ) -> Iterator[UnexplainedSymmetry]:
        """Rows that are added to blocks of filters, constants that are added to filters, and one constant."""
        shape = self.shapes[name]
        partitions = [*_blocks_of_rows(shape)]
        if len(shape) > 2 and shape[1] > 1:
            partitions.append(Partition(shape, shape, (0, *range(2, len(shape)))))
        partitions += [p for p in (Partition.filters(shape), Partition.whole(shape)) if p.group_size > 1]
        known: list[Tensor] | None = None
        for partition in partitions:
            numbers, values = self._near(name, partition, partitions[0], tests)
            if not len(numbers):
                continue
            if known is None:
                # What was not reached at all, as rows that are not looked up, may be in a group or not.
                live = torch.stack([(gradient != 0).cpu() for gradient in gradients]).all(0)
                labels = [_label(generators) for generators in shifts]
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

    def _near(
        self, name: str, partition: Partition, finest: Partition, tests: Sequence[InvarianceTest]
    ) -> tuple[Ints, Floats]:
        """The groups of a partition that can be shifted at all points, and their values.

        The sums of blocks of rows are added up from the finest ones, and not kept.
        """
        numbers, values = np.zeros(0, dtype=np.int64), np.zeros(0)
        blocks = partition.kept == finest.kept and partition.view[0] < finest.view[0]
        for place, test in enumerate(tests):
            sums = test.gradients.sums(name, finest if blocks else partition)
            slopes, squares = sums.slopes, sums.gradients
            if blocks:
                view = partition.view[0], finest.view[0] // partition.view[0], -1
                slopes, squares = (x.reshape(view).sum(1).ravel() for x in (slopes, squares))
            if place == 0:  # nearly all groups are none
                numbers = np.flatnonzero(slopes * slopes <= (2 * self.tolerance) ** 2 * partition.group_size * squares)
                values = np.zeros(len(numbers))
            own = test.values(slopes[numbers], np.sqrt(squares[numbers]), adds=True) / partition.group_size**0.5
            values = np.maximum(values, own)
        kept = values <= self.tolerance
        return numbers[kept], values[kept]


# ---- what is known ---------------------------------------------------------------------------------------------------


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

    def add_without_gradient(self, test: InvarianceTest) -> None:
        """Take the slices without a gradient out of the search: nothing can be found of them."""
        for name, shape in self.shapes.items():
            for partition in _slices(shape):
                sums = test.gradients.sums(name, partition)
                places = self.places(name, partition)[~(np.sqrt(sums.weights * sums.gradients) > test.floor())]
                self.add(np.arange(len(places)), places, np.ones(len(places)))


def _slices_of_groups(partition: Partition, axis: int) -> tuple[Ints, Ints]:
    """The smallest sets of slices along an axis that consist of whole groups, by slice and by group."""
    (small,) = without_last_axes(partition, least=axis + 1)
    count = small.shape[axis]
    if small.view == small.shape and axis not in small.kept:
        return np.zeros(count, dtype=np.int64), np.zeros(small.n_groups, dtype=np.int64)  # each meets every group
    ids = small.group_ids().movedim(axis, 0).reshape(count, -1).numpy()
    label = np.arange(count)
    while True:
        order = np.argsort(-label)
        least = np.zeros(small.n_groups, dtype=np.int64)
        least[ids[order]] = label[order, None]  # the smallest label is written last
        joined = least[ids].min(1)
        if (joined == label).all():
            return label, least
        label = joined


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


# ---- groups of slices ------------------------------------------------------------------------------------------------


class _Cuts(NamedTuple):
    """Cuts of the slices along an axis into groups, from fine to coarse.

    Args:
        views: for each cut the two axes that the slices are viewed as, and which of these numbers the groups.
        members: for each cut the slices of each group.
        flat: all members, group after group.
        starts: where each group begins among these.
        ends: where each cut but the last one ends among the groups.
    """

    views: Sequence[tuple[tuple[int, int], int]]
    members: list[Ints]
    flat: Ints
    starts: Ints
    ends: Ints

    @classmethod
    def of_views(cls, views: Sequence[tuple[tuple[int, int], int]]) -> _Cuts:
        """The groups of such views."""
        members = [np.moveaxis(np.arange(math.prod(view)).reshape(view), axis, 0) for view, axis in views]
        sizes = np.concatenate([np.full(*groups.shape) for groups in members])
        ends = np.cumsum([len(groups) for groups in members])[:-1]
        return cls(views, members, np.concatenate([g.ravel() for g in members]), np.cumsum(sizes) - sizes, ends)


def _cuts(count: int) -> Iterable[_Cuts]:
    """Each slice, blocks of neighbours and interleaved ones for every divisor, and all slices."""
    return _all_cuts(count) if count <= _FEW else (_Cuts.of_views([view]) for view in _views(count))


@functools.lru_cache(maxsize=64)
def _all_cuts(count: int) -> Iterable[_Cuts]:
    return (_Cuts.of_views(list(_views(count))),)


def _views(count: int) -> Iterator[tuple[tuple[int, int], int]]:
    yield (count, 1), 0
    for blocks in (n for n in range(count - 1, 1, -1) if count % n == 0):
        yield (blocks, count // blocks), 0
        yield (count // blocks, blocks), 1
    yield (1, count), 0


@dataclass(frozen=True)
class _SliceSearch:
    """Looks for invariant groups of the slices of a parameter along an axis, with the entries of a companion.

    Args:
        kind: ``"scale"`` or ``"shift"``.
        known: what is known of these.
        places: the coordinates of the slices there: one row for the parameter and one for its companion.
        names: the parameter and its companion.
        shape: the shape of the parameter.
        axis: the axis.
        finest: whether single slices are groups.
        whole: whether all of them are one.
    """

    kind: str
    known: Explained
    places: Ints
    names: tuple[str, ...]
    shape: tuple[int, ...]
    axis: int
    finest: bool = True
    whole: bool = True

    def has_candidates(self, tests: Sequence[InvarianceTest]) -> bool:
        """Whether some group is invariant at all points and does not follow from what is known."""
        if not self.known.vector[self.places].any():
            return False  # every slice follows
        return any(not self.known.follows(groups).all() for *_, groups in self._candidates(tests))

    def found(self, tests: Sequence[InvarianceTest]) -> Iterator[UnexplainedSymmetry]:
        """The invariant groups that nothing explains, from fine to coarse; they are known from then on."""
        for partition, numbers, values, groups in self._candidates(tests):
            new = self.known.take(groups)
            if new.any():
                fresh, value = tuple(numbers[new].tolist()), float(values[new].max())
                yield UnexplainedSymmetry(self.kind, self.names, partition, fresh, value)

    def _candidates(self, tests: Sequence[InvarianceTest]) -> Iterator[tuple[Partition, Ints, Floats, Ints]]:
        """Partitions with the groups that are invariant at all points: numbers, values, and coordinates."""
        sums = [(test, *self._sums(test)) for test in tests]
        for cuts in _cuts(self.shape[self.axis]):
            values = np.max([self._values(*given, cuts) for given in sums], axis=0)
            if not (values <= tests[0].tolerance).any():
                continue
            for view, members, own in zip(cuts.views, cuts.members, np.split(values, cuts.ends), strict=True):
                count, size = members.shape
                numbers = np.flatnonzero(own <= tests[0].tolerance)
                if len(numbers) and (size > 1 or self.finest) and (count > 1 or self.whole):
                    groups = np.moveaxis(self.places[:, members[numbers]], 0, 1).reshape(len(numbers), -1)
                    yield self._partition(*view), numbers, own[numbers], groups

    def _sums(self, test: InvarianceTest) -> tuple[Floats, Floats]:
        """Σ ξ g, Σ ξ² and Σ g² of each slice of each parameter, and what no size is above."""
        if self.kind == "shift":
            g = test.gradients.gradients[self.names[0]].cpu().numpy()
            return np.stack([g, np.ones(len(g)), g * g])[None], np.array([np.inf])
        slices = [_slices(self.shape)[self.axis], *_slices((self.shape[self.axis],))]
        pairs = list(zip(self.names, slices, strict=False))
        sums = np.stack([np.stack(test.gradients.sums(*pair)[:3]) for pair in pairs])
        return sums, np.array([test.gradients.size(name) for name, _ in pairs])

    def _values(self, test: InvarianceTest, sums: Floats, most: Floats, cuts: _Cuts) -> Floats:
        """The value of each group; infinite where there is no evidence."""
        totals, squares, slopes = np.add.reduceat(sums[..., cuts.flat], cuts.starts, -1).swapaxes(0, 1)
        # No sum can be larger than the parameter; the product of the norms can where the scales differ.
        sizes = np.minimum(np.sqrt(squares) * np.sqrt(slopes), most[:, None]).sum(0)
        return test.values(totals.sum(0), sizes, adds=self.kind == "shift")

    def _partition(self, view: tuple[int, int], numbered: int) -> Partition:
        if view[1] == 1 or view[0] == 1:
            return Partition(self.shape, self.shape, (self.axis,) if view[1] == 1 else ())
        cut = (*self.shape[: self.axis], *view, *self.shape[self.axis + 1 :])
        return Partition(self.shape, cut, (self.axis + numbered,))
