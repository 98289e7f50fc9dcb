"""Structure: follow the scales of each weight through the graph and read off which are free."""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field

import numpy as np
from torch.fx import Node

from manifold_nets.groups import Partition
from manifold_nets.symmetry.graph import TracedGraph, bound_arguments, is_in_place, op_name
from manifold_nets.symmetry.rules import RULES, VIEWS, Absorption, Adoption, Result, Use, as_list
from manifold_nets.symmetry.scales import Break, Ids, Label, Scales

_REGIONS = ("wrap_with_autocast", "wrap_with_set_grad_enabled")

__all__ = ["Structure", "follow_weight", "propagate", "seed_label", "seed_partition"]


@dataclass
class Structure:
    """What the graph says of one weight.

    Args:
        name: the weight.
        seed: the partition whose groups were given one scale each.
        scales: what the network demands of these scales.
        absorptions: the normalizations that absorb some of them.
        companions: biases that are scaled along, with the scale of each entry.
    """

    name: str
    seed: Partition
    scales: Scales
    absorptions: list[Absorption]
    companions: dict[str, Ids]
    absorbed: set[int] = field(init=False)

    def __post_init__(self) -> None:
        numbers = {n for a in self.absorptions for n in np.unique(self.scales.roots(a.ids)).tolist()}
        self.absorbed = {scale for n in numbers for scale in self.scales.form(n)}

    @property
    def free(self) -> list[list[int]]:
        """Groups of scales that are free: joined with each other, pinned by nothing, absorbed by something."""
        return [members for number, members in self.scales.classes().items() if self._is_free(number)]

    def _is_free(self, number: int) -> bool:
        """Whether a form is one scale that is free and absorbed: no product, no power."""
        form = self.scales.form(number)
        return list(form.values()) == [1.0] and not form.keys().isdisjoint(self.absorbed)

    @property
    def breaks(self) -> list[Break]:
        """The distinct reasons why scales are not free, in the order of the scales."""
        found: dict[Break, None] = {}
        for number, members in self.scales.classes().items():
            because = self.scales.break_of(members[0])
            if because is not None:
                found[because] = None
            elif len(self.scales.form(number)) > 1:
                found[Break("product", "", "its scale is tied to a product of other scales of the weight")] = None
            elif not self._is_free(number):
                found[Break("unused", "", "reaches neither a normalization nor the output")] = None
        return list(found)

    @property
    def partition(self) -> Partition | None:
        """The partition into free groups; None where some part of the weight is not free."""
        free = self.free
        if sum(len(members) for members in free) == self.scales.count:
            return joined_partition(self.seed, free)
        # Where scales are tied to products of others, the whole weight may still be free as one group.
        if self.absorbed and not self.scales.all_pinned and self.scales.allows(np.ones(self.scales.count)):
            return Partition.whole(self.seed.shape)
        return None

    def groups_of_forms(self, ids: Ids, groups: Ids) -> tuple[int, ...]:
        """Number of the group by whose scale each entry is multiplied: −1 for none, −2 for a product or a power."""
        numbers, inverse = np.unique(self.scales.roots(ids), return_inverse=True)
        found = []
        for number in numbers.tolist():
            exponents: dict[int, float] = {}
            for scale, c in self.scales.form(number).items():
                exponents[int(groups[scale])] = exponents.get(int(groups[scale]), 0.0) + c
            plain = [group for group, c in exponents.items() if c == 1.0]
            found.append(-1 if not any(exponents.values()) else plain[0] if len(exponents) == len(plain) == 1 else -2)
        return tuple(np.array(found)[inverse.reshape(-1)].tolist())

    def group_of_scale(self, partition: Partition) -> Ids:
        """Number of the group of ``partition`` that each scale belongs to."""
        seed_ids = self.seed.group_ids().reshape(-1).numpy()
        group_ids = partition.group_ids().reshape(-1).numpy()
        result = np.zeros(self.scales.count, dtype=np.int64)
        result[seed_ids] = group_ids
        return result


def joined_partition(seed: Partition, classes: list[list[int]]) -> Partition:
    """Write classes of seed groups as a partition: the finest one that a view can express.

    Single groups, blocks of consecutive groups and strided sets have views; any other joins fall back to the whole
    tensor, which is a union of free groups and so free as well.
    """
    count, total = len(classes), seed.n_groups
    if count == total:
        return seed
    size = total // count
    if count > 1 and all(len(members) == size for members in classes):
        if all(members == list(range(k * size, (k + 1) * size)) for k, members in enumerate(sorted(classes))):
            blocks = _consecutive_blocks(seed, count, size)
            if blocks is not None:
                return blocks
        if seed.kept == (0,) and all(
            members == list(range(k, total, count)) for k, members in enumerate(sorted(classes))
        ):
            return Partition(seed.shape, (size, count, *seed.shape[1:]), (1,))
    return Partition.whole(seed.shape)


def _consecutive_blocks(seed: Partition, count: int, size: int) -> Partition | None:
    if seed.kept == (0,):
        return Partition.blocks(seed.shape, count)
    groups, fan_in, per_group, *kernel = seed.view
    if per_group % size == 0:
        return Partition(seed.shape, (groups, fan_in, per_group // size, size, *kernel), (0, 2))
    if size % per_group == 0:
        return Partition(seed.shape, (count, groups // count, fan_in, per_group, *kernel), (0,))
    return None


def follow_weight(graph: TracedGraph, name: str) -> Structure:
    """Follow the scales of one weight, scaling along the biases that the network asks to be scaled along."""
    sources = graph.placeholders_of(name)
    seed = seed_partition(sources)
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
    return Structure(name, seed, scales, absorptions, companions)


def seed_partition(sources: list[Node]) -> Partition:
    """Filters of the weight's first use: output channels of a transposed convolution are not its rows."""
    shape = tuple(sources[0].meta["val"].shape)
    for node in sources:
        for user in node.users:
            if "transpose" in op_name(user) and op_name(user).startswith("conv"):
                return Partition.transposed_filters(shape, int(bound_arguments(user)["groups"]))
    return Partition.filters(shape)


def seed_label(seed: Partition) -> Ids:
    """Number of the group of each entry of a weight, with size 1 along the axes where it does not vary."""
    if seed.view == seed.shape:
        return np.arange(seed.n_groups, dtype=np.int64).reshape(seed.spread_shape)
    groups, fan_in, per_group, *kernel = seed.view
    ids = np.arange(seed.n_groups, dtype=np.int64).reshape(groups, 1, per_group)
    spread = np.broadcast_to(ids, (groups, fan_in, per_group))
    return spread.reshape(groups * fan_in, per_group, *(1 for _ in kernel))


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


def _write_back(use: Use, result: Result) -> None:
    """An in-place operation changes the tensor that it reads; later readers of that tensor see the result."""
    target = use.node.all_input_nodes[0]
    if op_name(target) in VIEWS and target.op == "call_function":
        use.pin("writes into a view of another tensor", *as_list(result))
        use.pin("writes into a view of another tensor")
    use.labels[target] = result
