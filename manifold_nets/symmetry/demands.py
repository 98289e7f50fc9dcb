"""Which sums the certificates of a network will ask for: known from its structure, before any number is computed."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from manifold_nets.groups import Partition
from manifold_nets.symmetry.joint import JointStructure
from manifold_nets.symmetry.shifts import RowShift, only_multiplies
from manifold_nets.symmetry.structure.partitions import seed_partition
from manifold_nets.symmetry.trace import TracedGraph
from manifold_nets.symmetry.weight_findings import natural_partitions, owner_of

__all__ = ["demanded_partitions", "natural_demands"]

Demands = dict[str, tuple[Partition, ...]]


def demanded_partitions(graph: TracedGraph, joint: JointStructure, rows: Sequence[RowShift]) -> Demands:
    """For each weight of a network the partitions whose sums serve all its certificates.

    Parameters that are added are missing: a shift may move any of their entries.

    Args:
        graph: the network.
        joint: what `solve_jointly` found for it.
        rows: what `row_shifts` found for it.
    """
    found: dict[str, dict[Partition, None]] = {}
    for name in dict.fromkeys(graph.parameters.values()):
        sources = [node for node in graph.placeholders_of(name) if node.users]
        if sources and sources[0].meta["val"].ndim >= 2 and only_multiplies(sources):
            found[name] = {seed_partition(sources): None}
    for name, _, partition, _, _ in joint.parts():
        found.get(name, {})[partition] = None
    for row in rows:
        found.get(row.name, {})[row.partition] = None
    return {name: tuple(partitions) for name, partitions in found.items()}


def natural_demands(twin: nn.Module) -> Demands:
    """The same for a network without a graph: the partitions that each layer suggests, without sums of these."""
    found = {}
    for name, parameter in twin.named_parameters():
        if parameter.ndim >= 2:
            first, *others = natural_partitions(owner_of(twin, name), parameter.shape)
            found[name] = (first, *(p for p in others if p.kept == (1,)))
    return found
