"""Structure: follow the scales of each weight through the graph and determine which are free."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from torch.fx import Node

from manifold_nets.groups import Partition
from manifold_nets.symmetry.equations import UNSCALED, Break, Ids, Label, Scales
from manifold_nets.symmetry.graph import is_linear_map, weight_uses
from manifold_nets.symmetry.propagate import propagate
from manifold_nets.symmetry.rules import Absorption
from manifold_nets.symmetry.seeds import (
    joined_partition,
    seed_label,
    seed_partition,
    without_last_axes,
)
from manifold_nets.symmetry.trace import TracedGraph

__all__ = ["Structure", "follow_weight"]

# Up to this many scales are followed one by one.
_MOST_SCALES = 8192


@dataclass
class Structure:
    """What the graph says of one weight.

    Args:
        name: the weight.
        seed: the partition whose groups were given one scale each.
        scales: the equations that the network puts on these scales.
        absorptions: the normalizations that absorb some of them.
        companions: biases that are scaled along, with the scale of each entry.
        used: whether some output depends on it.
    """

    name: str
    seed: Partition
    scales: Scales
    absorptions: list[Absorption]
    companions: dict[str, Ids]
    used: bool = True

    @cached_property
    def absorbed(self) -> frozenset[int]:
        """The free scales that some normalization removes."""
        removed = (self.scales.scales_in(a.ids).tolist() for a in self.absorptions if a.kind != "buffer")
        return frozenset(scale for scales in removed for scale in scales)

    @cached_property
    def free(self) -> list[list[int]]:
        """Groups of scales that are free: joined with each other, pinned by nothing, absorbed by something."""
        return [members for number, members in self._classes.items() if self._is_free(number)]

    @cached_property
    def _classes(self) -> dict[int, list[int]]:
        """The scales of the weight, without those that zeros got on the way, by their common form."""
        return self.scales.classes(self.seed.n_groups)

    def _is_free(self, number: int) -> bool:
        """Whether a form is one scale that is free and absorbed: no product, no power."""
        return number - 1 in self.absorbed

    @property
    def breaks(self) -> list[Break]:
        """The distinct reasons why scales are not free, in the order of the scales."""
        found: dict[Break, None] = {}
        # Where a scale ends that nothing refuses and no normalization absorbs.
        nowhere = Break("scale" if self.used else "unused", "", "reaches neither a normalization nor the output")
        ends = self.scales.ends() if self.used else {}
        for number, members in self._classes.items():
            because, form = self.scales.break_of(members[0]), self.scales.form(number)
            if because is not None:
                found[because] = None
            elif len(form) > 1:
                found[Break("product", "", "its scale is tied to a product of other scales of the weight")] = None
            elif not self._is_free(number):
                found[ends.get(min(form), nowhere)] = None
        return list(found)

    @cached_property
    def partition(self) -> Partition | None:
        """The partition into free groups; None where some part of the weight is not free."""
        if self._is_covered:
            return joined_partition(self.seed, self.free)
        # Where scales are tied to products of others, the whole weight may still be free as one group.
        if self.absorbed and not self.scales.all_pinned and self.scales.allows(np.ones(self.seed.n_groups)):
            return Partition.whole(self.seed.shape)
        return None

    @property
    def _is_covered(self) -> bool:
        return sum(len(members) for members in self.free) == self.seed.n_groups

    @property
    def count(self) -> int:
        """How many groups the weight has, whether or not a view can express them; 0 where it has none."""
        if self.partition is None:
            return 0
        return len(self.free) if self._is_covered else 1

    def groups_of_forms(self, ids: Ids, groups: Ids) -> tuple[int, ...]:
        """Number of the group by whose scale each entry is multiplied: −1 for none, −2 for a product or a power."""
        roots = self.scales.roots(ids).reshape(-1)
        group_of = np.full(self.scales.count + 1, -1)
        group_of[1 : len(groups) + 1] = groups  # further scales are those of zeros
        found = group_of[np.maximum(roots, UNSCALED)]
        for number in np.unique(roots[roots < UNSCALED]).tolist():
            exponents: dict[int, float] = {}
            for scale, c in self.scales.form(number).items():
                group = int(group_of[scale + 1])
                if group >= 0:
                    exponents[group] = exponents.get(group, 0.0) + c
            plain = [group for group, c in exponents.items() if c == 1.0]
            found[roots == number] = (
                -1 if not any(exponents.values()) else plain[0] if len(exponents) == len(plain) == 1 else -2
            )
        return tuple(found.tolist())

    def group_of_scale(self, partition: Partition) -> Ids:
        """Number of the group of ``partition`` that each scale belongs to."""
        seed_ids, group_ids = (p.group_ids().flatten().numpy() for p in without_last_axes(self.seed, partition))
        result = np.zeros(self.seed.n_groups, dtype=np.int64)
        result[seed_ids] = group_ids
        return result


def follow_weight(graph: TracedGraph, name: str) -> Structure:
    """Follow the scales of one weight, scaling along the biases that the network asks to be scaled along.

    Filters first. Rows that are looked up are followed one by one, and a weight that is used otherwise than by linear
    maps and convolutions (transposed, multiplied as it stands, one matrix an expert) along its other axes as well.
    """
    sources = graph.placeholders_of(name)
    uses = weight_uses(sources)
    if uses == {"embedding"}:
        rows = _follow_rows(graph, name, sources)
        if rows is not None:
            return rows
    found = _follow_groups(graph, name, sources, seed_partition(sources))
    # Matrices of experts, and weights behind a leading axis of size 1, are finer than one group for each of these.
    stacked = len(found.seed.shape) == 3 or found.seed.n_groups == 1
    if found.partition is None or all(map(is_linear_map, uses)) or (found.partition == found.seed and not stacked):
        return found
    return max([found, *_along_other_axes(graph, name, sources, found)], key=lambda structure: structure.count)


def _follow_groups(graph: TracedGraph, name: str, sources: list[Node], seed: Partition) -> Structure:
    """Follow one scale for each group of a partition."""
    seeds: dict[Node, Label] = {node: Label(seed_label(seed) + 1) for node in sources}
    companions: dict[str, Ids] = {}
    while True:
        scales = Scales(seed.n_groups)  # the form of scale k has the number k + 1
        absorptions, adoptions = propagate(graph, seeds, scales, stored=False)
        fresh = [adoption for adoption in adoptions if adoption.parameter not in companions]
        if not fresh or scales.all_pinned:
            break
        for adoption in fresh:
            companions[adoption.parameter] = adoption.ids
            seeds.update({node: Label(adoption.ids) for node in graph.placeholders_of(adoption.parameter)})
    absorptions += _kept_in_buffers(graph, seeds, scales, seed.n_groups)
    return Structure(name, seed, scales, absorptions, companions, used=graph.is_used(name))


def _kept_in_buffers(graph: TracedGraph, seeds: dict[Node, Label], scales: Scales, count: int) -> list[Absorption]:
    """The buffers that keep statistics of what is scaled, by hand, for evaluation: they do not move along with it."""
    if not graph.stored or graph.flow.needed(graph.stored).isdisjoint(seeds):
        return []
    strict, ids = Scales(count), np.arange(1, count + 1, dtype=np.int64)
    propagate(graph, seeds, strict)
    kept = ids[(strict.roots(ids) == UNSCALED) & (scales.roots(ids) != UNSCALED)]
    if not len(kept):
        return []
    found = []
    for node in sorted(graph.stored, key=lambda node: graph.order[node]):
        module, _, leaf = graph.buffers[node].rpartition(".")
        found.append(Absorption(graph.flow.writers(node)[0], "buffer", f"buffer {leaf}", module, kept))
    return found


def _along_other_axes(graph: TracedGraph, name: str, sources: list[Node], found: Structure) -> list[Structure]:
    """Structures of a weight that is free as a whole, with scales along other axes, and along several at once."""
    shape = found.seed.shape
    single = {
        axis: _follow_groups(graph, name, sources, Partition(shape, shape, (axis,)))
        for axis in range(1, len(shape))
        if 1 < shape[axis] <= _MOST_SCALES
    }
    varying = tuple(axis for axis, structure in {0: found, **single}.items() if structure.count > 1)
    together = []
    if len(varying) > 1 and math.prod(shape[axis] for axis in varying) <= _MOST_SCALES:
        together.append(_follow_groups(graph, name, sources, Partition(shape, shape, varying)))
    return [*single.values(), *together]


def _follow_rows(graph: TracedGraph, name: str, sources: list[Node]) -> Structure | None:
    """Follow the rows of a table that is looked up; None where some of them are not free each by itself.

    Which row stands where depends on the data. So every place gets a scale of its own: where all of them are free,
    whatever rows stand there, each row is.
    """
    lookups = [user for node in sources for user in node.users]
    shapes = [tuple(int(n) for n in user.meta["val"].shape[:-1]) for user in lookups]
    table = Partition.filters(tuple(sources[0].meta["val"].shape))
    count = sum(math.prod(shape) for shape in shapes)
    if count > _MOST_SCALES:
        return None
    scales, labels, first = Scales(count), {}, 1
    for user, shape in zip(lookups, shapes, strict=True):
        labels[user] = Label(np.arange(first, first + math.prod(shape)).reshape(*shape, 1))
        first += math.prod(shape)
    absorptions, adoptions = propagate(graph, labels, scales)
    places = Structure(name, Partition.filters((count, 1)), scales, absorptions, {})
    if adoptions or len(places.free) < count:
        return None
    rows = np.arange(1, table.n_groups + 1, dtype=np.int64)
    reached = [replace(absorption, ids=rows) for absorption in absorptions]
    return Structure(name, table, Scales(table.n_groups), reached, {})
