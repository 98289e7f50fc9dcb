"""All continuous scale symmetries at once: groups that span several tensors, and rescalings between layers.

Every row of every weight, every bias and every affine parameter gets its own scale, and the columns of a weight may
compensate for the scales of its input. The solutions of the network's equations are its symmetries: multiplying each
member by ``α ** exponent`` does not change the function. If all exponents are positive, a normalization absorbs the
scale; if columns shrink as rows grow, it is a rescaling through positively homogeneous functions.

Source: the symmetries of Badrinarayanan, Mishra, Cipolla, arXiv:1511.01029, section 2, for arbitrary graphs.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from torch.fx import Node

from manifold_nets.groups import Partition
from manifold_nets.symmetry.equations import Ids, Label, Scales
from manifold_nets.symmetry.graph import bound_arguments, is_linear_map, op_name, weight_uses
from manifold_nets.symmetry.propagate import propagate
from manifold_nets.symmetry.rules import Absorption
from manifold_nets.symmetry.seeds import seed_label, seed_partition
from manifold_nets.symmetry.shifts import ShiftStructure
from manifold_nets.symmetry.trace import TracedGraph

__all__ = ["JointStructure", "required_partitions", "solve_jointly"]

# Larger parameters that are no linear maps get one scale along their last axis instead of one an entry.
_LARGEST_BY_ENTRY = 4096
Part = Literal["rows", "columns", "entries"]


@dataclass
class JointStructure:
    """The solved equations of a whole network.

    Args:
        scales: the scales of all parameters and what is left of them.
        seeds: every part of every parameter, with its partition, the forms of its indices, and their sign: columns
            undo the scales of the input.
        absorptions: the normalizations that absorb some of them.
    """

    scales: Scales
    seeds: list[tuple[str, Part, Partition, Ids, float]]
    absorptions: list[Absorption]

    @cached_property
    def absorbed(self) -> frozenset[int]:
        """The free scales that some normalization absorbs."""
        return frozenset(scale for a in self.absorptions for scale in self.scales.scales_in(a.ids).tolist())

    def parts(self) -> Iterator[tuple[str, Part, Partition, Ids, float]]:
        """Yield the seeds with what the equations make of their forms."""
        for name, part, partition, ids, sign in self.seeds:
            yield name, part, partition, self.scales.roots(ids), sign


def solve_jointly(graph: TracedGraph, without: Collection[str] = ()) -> JointStructure:
    """Give every parameter its scales, follow them all, and return the equations that the network puts on them.

    Args:
        graph: the network.
        without: parameters that take part in nothing: dead biases, whose scale never matters.
    """
    scales = Scales()
    seeds: list[tuple[str, Part, Partition, Ids, float]] = []
    labels: dict[Node, Label] = {}
    for name in dict.fromkeys(graph.parameters.values()):
        sources = [node for node in graph.placeholders_of(name) if node.users]
        if not sources or name in without or not graph.is_used(name) or not tuple(sources[0].meta["val"].shape):
            continue
        part, partition, label = _seed(sources)
        ids = scales.add(partition.n_groups)
        seeds.append((name, part, partition, ids, 1.0))
        labels.update({node: Label(ids[label]) for node in sources})
    columns: dict[str, Ids] = {}
    absorptions, _ = propagate(graph, labels, scales, columns)
    seeds += [(name, "columns", _column_partition(graph, name), ids, -1.0) for name, ids in columns.items()]
    return JointStructure(scales, seeds, absorptions)


def required_partitions(joint: JointStructure, shifts: ShiftStructure) -> dict[str, tuple[Partition, ...]]:
    """For each weight of a network the partitions whose sums serve all its certificates.

    Parameters that are added are missing: a shift may move any of their entries.
    """
    found: dict[str, dict[Partition, None]] = {}
    for name, shape in shifts.shapes.items():
        if len(shape) >= 2 and shifts.only_multiplies(name):
            found[name] = {seed_partition(shifts.sources(name)): None}
    for name, _, partition, _, _ in joint.parts():
        found.get(name, {})[partition] = None
    for row in shifts.rows:
        found.get(row.name, {})[row.partition] = None
    return {name: tuple(partitions) for name, partitions in found.items()}


def _seed(sources: list[Node]) -> tuple[Part, Partition, Ids]:
    """Which part of a parameter gets scales of its own, and the index of the scale of each entry."""
    shape = tuple(int(n) for n in sources[0].meta["val"].shape)
    uses = weight_uses(sources)
    if any(map(is_linear_map, uses)):
        partition = seed_partition(sources)
        return "rows", partition, seed_label(partition)
    if "embedding" in uses:
        return "columns", Partition(shape, shape, (1,)), np.arange(shape[1], dtype=np.int64)[None, :]
    entries = int(np.prod(shape))
    if len(shape) == 1 or entries <= _LARGEST_BY_ENTRY:
        partition = Partition(shape, shape, tuple(range(len(shape))))
        return "entries", partition, np.arange(entries, dtype=np.int64).reshape(shape)
    partition = Partition(shape, shape, (len(shape) - 1,))
    return "columns", partition, np.arange(shape[-1], dtype=np.int64).reshape((1,) * (len(shape) - 1) + (-1,))


def _column_partition(graph: TracedGraph, name: str) -> Partition:
    """Partition of a weight into the entries that one input channel meets."""
    sources = graph.placeholders_of(name)
    shape = tuple(int(n) for n in sources[0].meta["val"].shape)
    user = next(user for node in sources for user in node.users)  # a linear map, as all others
    arguments = bound_arguments(user)
    if "transpose" in op_name(user) or arguments.get("transposed"):
        return Partition.filters(shape)
    groups = int(arguments.get("groups", 1) or 1)
    return Partition(shape, (groups, shape[0] // groups, *shape[1:]), (0, 2))
