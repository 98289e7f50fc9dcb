"""Structure: follow the scales of each weight through the graph and read off which are free."""

from __future__ import annotations

import heapq
import math
from dataclasses import replace

import numpy as np
from torch.fx import Node

from manifold_nets.groups import Partition
from manifold_nets.symmetry.network.graph import TracedGraph, bound_arguments, is_in_place, op_name
from manifold_nets.symmetry.structure.claims import Structure
from manifold_nets.symmetry.structure.partitions import (
    is_linear_map,
    only_looked_up,
    seed_label,
    seed_partition,
)
from manifold_nets.symmetry.structure.rules import RULES, VIEWS, Absorption, Adoption, Result, Use, as_list
from manifold_nets.symmetry.structure.scales import Ids, Label, Scales

__all__ = ["Structure", "follow_weight", "propagate"]

_REGIONS = ("wrap_with_autocast", "wrap_with_set_grad_enabled")
# Up to this many scales are followed one by one.
_MOST_SCALES = 8192


def follow_weight(graph: TracedGraph, name: str) -> Structure:
    """Follow the scales of one weight, scaling along the biases that the network asks to be scaled along.

    Filters first. Rows that are looked up are followed one by one, and a weight that is used otherwise than by linear
    maps and convolutions (transposed, multiplied as it stands, one matrix an expert) along its other axes as well.
    """
    sources = graph.placeholders_of(name)
    if only_looked_up(sources):
        rows = _follow_rows(graph, name, sources)
        if rows is not None:
            return rows
    found = _follow_groups(graph, name, sources, seed_partition(sources))
    # Matrices of experts, and weights behind a leading axis of size 1, are finer than one group for each of these.
    stacked = len(found.seed.shape) == 3 or found.seed.n_groups == 1
    if found.partition is None or is_linear_map(sources) or (found.partition == found.seed and not stacked):
        return found
    return max([found, *_along_other_axes(graph, name, sources, found)], key=lambda structure: structure.count)


def _follow_groups(graph: TracedGraph, name: str, sources: list[Node], seed: Partition) -> Structure:
    """Follow one scale for each group of a partition."""
    seeds: dict[Node, Label] = {node: Label(seed_label(seed) + 1) for node in sources}
    companions: dict[str, Ids] = {}
    while True:
        scales = Scales(seed.n_groups)  # the form of scale k has the number k + 1
        absorptions, adoptions = propagate(graph, seeds, scales)
        fresh = [adoption for adoption in adoptions if adoption.parameter not in companions]
        if not fresh or scales.all_pinned:
            break
        for adoption in fresh:
            companions[adoption.parameter] = adoption.ids
            seeds.update({node: Label(adoption.ids) for node in graph.placeholders_of(adoption.parameter)})
    return Structure(name, seed, scales, absorptions, companions, used=graph.is_used(name))


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


def propagate(
    graph: TracedGraph, seeds: dict[Node, Label], scales: Scales, columns: dict[str, Ids] | None = None
) -> tuple[list[Absorption], list[Adoption]]:
    """Follow the labels of some placeholders through the graph, in its order.

    Args:
        graph: the graph.
        seeds: labels to start from.
        scales: takes the conditions that the operations put on the scales.
        columns: where given, weights may undo the scales of their inputs; see `Use`.

    Returns:
        The normalizations that absorb scales, and the biases that have to be scaled along.
    """
    labels: dict[Node, Result] = dict(seeds)
    absorptions: list[Absorption] = []
    adoptions: list[Adoption] = []
    queue: list[tuple[int, Node]] = []
    queued: set[Node] = set()

    def visit_users(node: Node, after: int) -> None:
        for user in node.users:
            if graph.order[user] > after and user not in queued:
                queued.add(user)
                heapq.heappush(queue, (graph.order[user], user))

    for node in seeds:
        visit_users(node, -1)
    while queue and not scales.all_pinned:
        _, node = heapq.heappop(queue)
        use = Use(node, graph, scales, labels, absorptions, adoptions, columns)
        result = _apply(use)
        labels[node] = result
        if is_in_place(node):
            _write_back(use, result)
            visit_users(node.all_input_nodes[0], graph.order[node])
        if any(label is not None for label in as_list(result)):
            visit_users(node, -1)
    return absorptions, adoptions


def _apply(use: Use) -> Result:
    if use.node.op == "output":
        use.pin("is reached without a normalization")
        return None
    if not any(label is not None for node in use.node.all_input_nodes for label in as_list(use.labels.get(node))):
        return None
    if use.op in _REGIONS:
        return _enter_region(use)
    known = RULES.get(use.op)
    if known is None:
        use.pin("has no rule: what it does to a scale is unknown", unknown=True)
        return None
    return known(use)


def _enter_region(use: Use) -> Result:
    """Follow the labels through the graph of a region that is executed under autocast or another gradient mode."""
    region = next(a for a in use.node.args if isinstance(a, Node) and a.op == "get_attr")
    given = use.node.args[use.node.args.index(region) + 1 :]
    module = use.node.graph.owning_module
    inner = getattr(module, str(region.target)).graph
    labels: dict[Node, Result] = {}
    outer = iter(given)
    for node in inner.nodes:
        if node.op == "placeholder":
            argument = next(outer)
            labels[node] = use.labels.get(argument) if isinstance(argument, Node) else None
        elif node.op == "output":
            results = node.args[0] if isinstance(node.args[0], (tuple, list)) else [node.args[0]]
            return [found if isinstance(found := labels.get(r), Label) else None for r in results]
        else:
            inside = Use(node, use.graph, use.scales, labels, use.absorptions, use.adoptions, use.columns)
            labels[node] = _apply(inside)
            if is_in_place(node):
                _write_back(inside, labels[node])
    return None


def _write_slice(labels: dict[Node, Result], part: Node, result: Result) -> bool:
    """Give a slice of a tensor another label; False where the tensor has no label of its own, or is a view itself."""
    arguments = bound_arguments(part)
    whole = arguments["self"]
    label = labels.get(whole)
    if not isinstance(label, Label) or not isinstance(result, Label):
        return False
    if whole.op == "call_function" and op_name(whole) in VIEWS:
        return False
    shape = tuple(int(n) for n in whole.meta["val"].shape)
    dim = (arguments["dim"] or 0) % len(shape)
    ids = label.along(shape, range(len(shape))).copy()
    cut = slice(arguments["start"], arguments["end"], arguments["step"])
    ids[(slice(None),) * dim + (cut,)] = result.ids
    labels[whole], labels[part] = Label.compressed(ids), result
    return True


def _write_back(use: Use, result: Result) -> None:
    """An in-place operation changes the tensor that it reads; later readers of that tensor see the result."""
    target = use.node.all_input_nodes[0]
    if use.op == "zero" and op_name(target) == "slice" and _write_slice(use.labels, target, result):
        return
    if op_name(target) in VIEWS and target.op == "call_function":
        use.pin("writes into a view of another tensor", *as_list(result))
        use.pin("writes into a view of another tensor")
    use.labels[target] = result
