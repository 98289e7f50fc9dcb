"""Shift symmetries: constants that can be added to biases, rows and logits without a change of the function.

Every entry of every added parameter gets an unknown shift, and so does every block of filters (``W → W + 1vᵀ``). They
are followed through the graph by the rules of `manifold_nets.symmetry.rules.shift_use`; what its equations leave free
are symmetries. A direction d is one exactly where ``⟨∂L/∂w, d⟩ = 0`` on the whole orbit: the certificate.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import nn
from torch.fx import Node

from manifold_nets.groups import Partition
from manifold_nets.symmetry.certificate import EulerField
from manifold_nets.symmetry.graph import TracedGraph, bound_arguments, is_in_place, op_name
from manifold_nets.symmetry.rules import VIEWS, Absorption, Result, as_list, shift_absorbing, shifting
from manifold_nets.symmetry.rules.shift_use import Link, Shifts, ShiftUse, apply_rule
from manifold_nets.symmetry.scales import UNSCALED, Ids, Label, Scales
from manifold_nets.symmetry.shift_certificate import Direction, ShiftJudge
from manifold_nets.symmetry.shift_report import ShiftSymmetry

__all__ = ["follow_shifts", "shift_symmetries"]

_TABLES = (shifting, shift_absorbing)  # importing them fills the table of rules
# Larger parameters that are no biases get one shift a filter or a row instead of one an entry.
_LARGEST_BY_ENTRY = 1024
_DROPOUT_ATTRIBUTES = ("p", "drop_prob", "drop_rate", "dropout", "dropout_p")


@dataclass
class _Walk:
    """Shifts on their way through a graph, and what the network demands of them."""

    graph: TracedGraph
    scales: Scales
    rows: dict[Node, int]
    inactive: Callable[[str], bool]
    loss: bool
    first_link: int = 0
    labels: dict[Node, Result] = field(default_factory=dict)
    absorptions: list[Absorption] = field(default_factory=list)
    links: list[Link] = field(default_factory=list)

    def run(self, seeds: dict[Node, Label]) -> None:
        """Follow the labels of some placeholders in the order of the graph, then drop what is not free."""
        self.first_link = self.scales.count
        self.labels.update(seeds)
        order, queued = self.graph.order, set(seeds)
        queue: list[tuple[int, Node]] = []

        def visit_users(node: Node, after: int) -> None:
            for user in node.users:
                if order[user] > after and user not in queued:
                    queued.add(user)
                    heapq.heappush(queue, (order[user], user))

        for node in seeds:
            visit_users(node, -1)
        while queue and not self.scales.all_pinned:
            _, node = heapq.heappop(queue)
            result = self._visit(node, self.labels)
            if is_in_place(node):
                visit_users(node.all_input_nodes[0], order[node])
            if any(label is not None for label in as_list(result)):
                visit_users(node, -1)
        self._settle()

    def _visit(self, node: Node, labels: dict[Node, Result]) -> Result:
        use = ShiftUse(
            node, self.graph, self.scales, labels, self.absorptions, links=self.links, rows=self.rows,
            inactive=self.inactive, first_link=self.first_link,
        )  # fmt: skip
        result = None
        if node.op == "output":
            self._leave(use)
        elif any(label is not None for source in node.all_input_nodes for label in as_list(labels.get(source))):
            result = self._region(use) if use.op.startswith("wrap_with_") else apply_rule(use)
        labels[node] = result
        if node.op == "call_function" and is_in_place(node):
            target = node.all_input_nodes[0]
            if op_name(target) in VIEWS and target.op == "call_function":
                use.pin("writes into a view of another tensor", *as_list(result))
                use.pin("writes into a view of another tensor")
            labels[target] = result
        return result

    def _leave(self, use: ShiftUse) -> None:
        """A loss of logits does not see what is added to all of them; any other output is seen."""
        for node in use.node.all_input_nodes:
            label = use.label_of(node)
            if label is None:
                continue
            if self.loss and label.ids.ndim >= 2:
                ids = use.merge(label.ids, [1], "compares logits that are shifted differently")
                self.absorptions.append(Absorption(use.node, "loss", "loss", "", ids))
            else:
                use.pin("is reached without a normalization", label)

    def _region(self, use: ShiftUse) -> Result:
        """Follow the shifts through the graph of a region under autocast or another gradient mode."""
        region = next(a for a in use.node.args if isinstance(a, Node) and a.op == "get_attr")
        given = iter(use.node.args[use.node.args.index(region) + 1 :])
        labels: dict[Node, Result] = {}
        for node in getattr(use.node.graph.owning_module, str(region.target)).graph.nodes:
            if node.op == "placeholder":
                argument = next(given)
                labels[node] = use.labels.get(argument) if isinstance(argument, Node) else None
            elif node.op == "output":
                results = node.args[0] if isinstance(node.args[0], (tuple, list)) else [node.args[0]]
                return [found if isinstance(found := labels.get(r), Label) else None for r in results]
            else:
                self._visit(node, labels)
        return None

    def _settle(self) -> None:
        """Refuse the sources of links whose results are not free, until nothing changes."""
        open_links = list(self.links)
        while True:
            kept = []
            solved = np.ones(self.scales.count, dtype=bool)
            solved[self.scales.free] = False
            for link in open_links:
                if not solved[link.unknowns.start : link.unknowns.stop].any():
                    kept.append(link)
                else:
                    self.scales.pin(link.sources, link.because)
                    self.scales.pin(link.results, link.because)
            if len(kept) == len(open_links):
                return
            open_links = kept

    def absorbed(self) -> dict[int, list[Absorption]]:
        """For each scale of a parameter the operations that absorb it, directly or after linear maps."""
        origin: dict[int, set[int]] = {}

        def sources(ids: Ids) -> set[int]:
            found: set[int] = set()
            for number in np.unique(self.scales.roots(ids)).tolist():
                for k in self.scales.form(number):
                    found |= {k} if k < self.first_link else origin.get(k, set())
            return found

        for link in self.links:
            behind = sources(link.sources)
            origin.update(dict.fromkeys(link.unknowns, behind))
        result: dict[int, list[Absorption]] = {}
        for absorption in self.absorptions:
            for k in sources(absorption.ids):
                result.setdefault(k, []).append(absorption)
        return result


def follow_shifts(
    graph: TracedGraph, seeds: dict[str, Ids], scales: Scales, *, rows: dict[str, int] | None = None,
    inactive: Callable[[str], bool] = lambda module: False, loss: bool = False,
) -> dict[int, list[Absorption]]:  # fmt: skip
    """Follow the shifts of some parameters through a graph.

    Args:
        graph: the graph.
        seeds: for each parameter the number of the form of each entry; broadcasts to its shape.
        scales: the unknown shifts; takes the equations that the network puts on them.
        rows: the weights whose shift is ``W → W + 1vᵀ``, with their number of blocks of output channels.
        inactive: whether a module drops nothing at random.
        loss: whether the outputs are logits, compared along axis 1.

    Returns:
        For each unknown the operations that absorb it.
    """
    nodes = {name: graph.placeholders_of(name) for name in seeds}
    blocks = {node: count for name, count in (rows or {}).items() for node in nodes[name]}
    walk = _Walk(graph, scales, blocks, inactive, loss)
    walk.run({node: Label(ids) for name, ids in seeds.items() for node in nodes[name]})
    return walk.absorbed()


def shift_symmetries(
    graph: TracedGraph, model: nn.Module, euler: EulerField, tolerance: float, *, loss: bool = False
) -> tuple[ShiftSymmetry, ...]:
    """Find the shift symmetries of a network, each with its certificate.

    Args:
        graph: the graph of the model in training mode.
        model: the model as the user has it: its probabilities of dropout count.
        euler: gradients of the network for cotangents that sum to zero along axis 1 where ``loss`` is given.
        tolerance: largest certificate value of a symmetry.
        loss: whether the outputs are logits of a loss that compares them along axis 1.

    Returns:
        The symmetries of single parameters and of several, parameter by parameter.
    """
    judge = ShiftJudge(euler, tolerance, _drops_samples(model))
    inactive = _inactive(model)
    found = _added_parameters(graph, judge, inactive, loss)
    for name in dict.fromkeys(graph.parameters.values()):
        found += _row_shifts(graph, name, judge, inactive, loss)
    return tuple(found)


def _inactive(model: nn.Module) -> Callable[[str], bool]:
    modules = dict(model.named_modules())

    def inactive(name: str) -> bool:
        return not any(_drops(modules.get(name), attribute) for attribute in _DROPOUT_ATTRIBUTES)

    return inactive


def _drops(module: nn.Module | None, attribute: str) -> bool:
    value = getattr(module, attribute, 0.0)
    return isinstance(value, float) and value > 0


def _drops_samples(model: nn.Module) -> bool:
    """Whether branches are dropped at random, sample by sample, which leaves no trace in the graph."""
    names = ("StochasticDepth", "DropPath")
    return any(
        type(m).__name__ in names and any(_drops(m, a) for a in _DROPOUT_ATTRIBUTES) for m in model.modules()
    )  # fmt: skip


# ---- added parameters ------------------------------------------------------------------------------------------------


def _added_parameters(
    graph: TracedGraph, judge: ShiftJudge, inactive: Callable[[str], bool], loss: bool
) -> list[ShiftSymmetry]:
    """Shifts of biases, all at once, and of larger parameters that are added, one after the other."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name in dict.fromkeys(graph.parameters.values()):
        sources = [node for node in graph.placeholders_of(name) if node.users]
        if sources and (shape := _shape(sources[0])) and not _only_multiplies(sources):
            shapes[name] = shape
    together: list[dict[str, tuple[int, ...]]] = [{name: shape for name, shape in shapes.items() if len(shape) == 1}]
    # Positions times channels would be too many different sums.
    together += [{name: shape} for name, shape in shapes.items() if len(shape) > 1]
    return [found for part in together for found in _shifts_of(graph, part, judge, inactive, loss)]


def _shifts_of(
    graph: TracedGraph,
    shapes: dict[str, tuple[int, ...]],
    judge: ShiftJudge,
    inactive: Callable[[str], bool],
    loss: bool,
) -> list[ShiftSymmetry]:
    scales, seeds = Shifts(), {}
    for name, shape in shapes.items():
        where = _seed_shape(shape)
        seeds[name] = scales.add(int(np.prod(where))).reshape(where)
    count = scales.count
    absorbed = follow_shifts(graph, seeds, scales, inactive=inactive, loss=loss)
    directions: dict[int, Direction] = {}
    for name, ids in seeds.items():
        _collect(directions, name, np.broadcast_to(scales.roots(ids), shapes[name]).reshape(-1), scales)
    families: dict[Any, list[int]] = {}
    for k in (k for k in directions if k < count):
        absorbers = tuple(dict.fromkeys(a.node for a in absorbed.get(k, [])))
        if absorbers or len(directions[k]) > 1:
            single = sum(len(entries) for entries in directions[k].values()) == 1
            families.setdefault((tuple(directions[k]), single, absorbers), []).append(k)
    return [
        judge.added([directions[k] for k in members], absorbed.get(members[0], []), len(shapes[names[0]]))
        for (names, _, _), members in families.items()
    ]


def _collect(directions: dict[int, Direction], name: str, numbers: Ids, scales: Scales) -> None:
    """Add the coefficients of a parameter's entries to the directions of the free shifts."""
    for index in np.flatnonzero(numbers != UNSCALED).tolist():
        for k, c in scales.form(int(numbers[index])).items():
            directions.setdefault(k, {}).setdefault(name, {})[index] = c


def _shape(node: Node) -> tuple[int, ...]:
    return tuple(int(n) for n in node.meta["val"].shape)


def _seed_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Along which axes a parameter gets shifts of its own."""
    if len(shape) == 1 or np.prod(shape) <= _LARGEST_BY_ENTRY:
        return shape
    return (shape[0], *(1 for _ in shape[1:])) if shape[0] > 1 else (*shape[:-1], 1)


def _only_multiplies(sources: list[Node]) -> bool:
    """Whether a parameter is used as the weight of linear maps and normalizations only."""
    return all(bound_arguments(user).get("weight") is node for node in sources for user in node.users)


# ---- rows ------------------------------------------------------------------------------------------------------------


def _row_shifts(
    graph: TracedGraph, name: str, judge: ShiftJudge, inactive: Callable[[str], bool], loss: bool
) -> list[ShiftSymmetry]:
    """``W → W + 1vᵀ``, one row for each block of filters: the finest blocks that cover the most."""
    sources = [node for node in graph.placeholders_of(name) if node.users]
    users = [user for node in sources for user in node.users]
    if not sources or len(_shape(sources[0])) < 2 or not _only_multiplies(sources):
        return []
    best: tuple[float, Partition, list[int], list[Absorption]] | None = None
    for blocks, partition in _row_partitions(graph, users, _shape(sources[0])):
        scales = Shifts(blocks)
        ids = np.arange(1, blocks + 1).reshape(blocks, *(1 for _ in _shape(sources[0])[1:]))
        absorbed = follow_shifts(graph, {name: ids}, scales, rows={name: blocks}, inactive=inactive, loss=loss)
        free = [k for k in scales.free if k in absorbed]
        if free and (best is None or len(free) / blocks > best[0]):
            reached = list({a.node: a for k in free for a in absorbed[k]}.values())
            best = len(free) / blocks, partition, free, reached
    return [] if best is None else [judge.rows(name, *best[1:])]


def _row_partitions(graph: TracedGraph, users: list[Node], shape: tuple[int, ...]) -> Iterable[tuple[int, Partition]]:
    """Numbers of blocks to try, finest first, with the entries of the weight that are shifted together."""
    ops = {op_name(user) for user in users}
    if ops == {"embedding"}:
        return [(1, Partition(shape, shape, tuple(range(len(shape) - 1))))]
    if not all(op == "linear" or op.startswith("conv") for op in ops):
        return []
    arguments = bound_arguments(users[0])
    groups = int(arguments.get("groups", 1) or 1)
    transposed = "transpose" in op_name(users[0]) or bool(arguments.get("transposed"))
    channels = shape[1] * groups if transposed else shape[0]
    counts = {1, groups}
    for node in graph.order:
        if op_name(node) == "group_norm":
            counts.add(int(bound_arguments(node)["num_groups"]))
        elif op_name(node) == "layer_norm":
            counts.add(channels // int(np.prod(bound_arguments(node)["normalized_shape"])) or 1)
    fitting = [n for n in sorted(counts, reverse=True) if n < channels and channels % n == 0 and n % groups == 0]
    return [(n, _row_partition(shape, n, groups if transposed else 0)) for n in fitting]


def _row_partition(shape: tuple[int, ...], blocks: int, transposed_groups: int) -> Partition:
    if not transposed_groups:
        view = (blocks, shape[0] // blocks, *shape[1:])
        return Partition(shape, view, (0, *range(2, len(view))))
    channels_in, per_group, *kernel = shape
    groups, each = transposed_groups, blocks // transposed_groups
    view = (groups, channels_in // groups, each, per_group // each, *kernel)
    return Partition(shape, view, (0, 1, 2, *range(4, len(view))))
