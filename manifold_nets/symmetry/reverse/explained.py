"""What structure knows of scales, as a linear space: which directions of groups follow from it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np

from manifold_nets.groups import Partition
from manifold_nets.symmetry.joint import JointStructure
from manifold_nets.symmetry.report import ShiftSymmetry, SymmetryFamily, WeightFinding
from manifold_nets.symmetry.reverse.spans import Span

__all__ = ["Direction", "Explained", "explained_scales"]

# A parameter, a partition of it (the number of an axis where its groups are the slices along it), and a group.
Axis = int | tuple[tuple[int, ...], tuple[int, ...]]
Key = tuple[str, Axis, int]
Direction = dict[Key, float]


@dataclass
class Explained:
    """The directions that structure knows, with a coordinate for each group of each partition in use."""

    directions: list[Direction] = field(default_factory=list)
    counts: dict[str, dict[Axis, int]] = field(default_factory=dict)
    span: Span | None = None

    def add(self, direction: Direction) -> None:
        """Take in a direction."""
        self.directions.append(direction)

    def axis(self, name: str, partition: Partition) -> Axis:
        """The name of a partition among those in use."""
        plain = partition.view == partition.shape and len(partition.kept) == 1
        found: Axis = partition.kept[0] if plain else (partition.view, partition.kept)
        self.counts.setdefault(name, {})[found] = partition.n_groups
        return found

    def add_joint(self, joint: JointStructure) -> None:
        """Take in the symmetries of the solved equations of a network."""
        axes = {(name, part): self.axis(name, partition) for name, part, partition, _, _ in joint.parts()}
        for symmetry in joint.symmetries().values():
            self.add({(place[0], axes[place], k): c for place, part in symmetry.items() for k, c in part.items()})

    def covers(self, direction: Direction) -> bool:
        """Whether a direction is a combination of those that are known."""
        if self.span is None:
            # Whatever the partition, all its groups together are the whole parameter.
            wholes: list[Direction] = []
            for name, counts in self.counts.items():
                first, *others = [{(name, axis, k): 1.0 for k in range(n)} for axis, n in counts.items()]
                wholes += [{**first, **dict.fromkeys(other, -1.0)} for other in others]
                wholes += [same for axis in counts for same in _same_blocks(name, axis)]
            self.span = Span([*self.directions, *wholes])
        return not self.span.add(direction)


def _same_blocks(name: str, axis: Axis) -> Iterator[Direction]:
    """In a grouped convolution the slices of a group along axis 0 and its other channels are the same block."""
    if isinstance(axis, tuple) and axis[1] == (0, 2):
        groups, size, channels = axis[0][:3]
        for group in range(groups):
            same: Direction = {(name, 0, group * size + k): 1.0 for k in range(size)}
            same.update({(name, axis, group * channels + k): -1.0 for k in range(channels)})
            yield same


def explained_scales(
    findings: Iterable[WeightFinding],
    families: Iterable[SymmetryFamily],
    shifts: Iterable[ShiftSymmetry],
    joint: JointStructure | None = None,
) -> Explained:
    """Collect what structure knows and the certificate confirms, and the solved equations where they are given."""
    explained = Explained()
    if joint is not None:
        explained.add_joint(joint)
    for shift in shifts:
        if shift.kind == "dead bias" and shift.certificate.verdict == "invariant":
            for direction in shift.directions:
                for name, part in direction.items():
                    for index in part:
                        explained.add({(name, 0, index): 1.0})
    for family in families:
        if family.certificate.verdict != "invariant":
            continue
        axes = {place: explained.axis(place[0], partition) for place, partition in family.partitions.items()}
        for symmetry in family.symmetries:
            explained.add(
                {(place[0], axes[place], index): c for place, part in symmetry.items() for index, c in part.items()}
            )
    for finding in findings:
        if finding.partition is not None and finding.certificate.verdict == "invariant":
            _add_finding(explained, finding, finding.partition)
    return explained


def _add_finding(explained: Explained, finding: WeightFinding, partition: Partition) -> None:
    """Add the groups of a weight, as slices along each axis, with the biases that are scaled along."""
    along: dict[int, Direction] = {}
    for bias in finding.scaled_along:
        for index, group in enumerate(bias.groups):
            if group < 0:
                continue
            along.setdefault(group, {})[bias.name, 0, index] = 1.0
    if finding.finer_groups == finding.shape[0]:
        partition = Partition.filters(finding.shape)  # rows of a table of which one is zero
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
