"""Shifts on their way through the graph of a network, by the rules of `symmetry.rules`."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from torch.fx import Node

from manifold_nets.symmetry.graph import is_region, region_graph, target_of
from manifold_nets.symmetry.rules import Absorption, Link, Result, ShiftUse, apply_rule, as_list
from manifold_nets.symmetry.structure.scales import UNSCALED, Ids, Label, Scales
from manifold_nets.symmetry.structure.writing import write_back
from manifold_nets.symmetry.trace import TracedGraph

__all__ = ["follow_shifts"]


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
    # For each node a form of its labels that was not refused when it was last asked for.
    alive: dict[Node, int] = field(default_factory=dict)

    def run(self, seeds: dict[Node, Label]) -> None:
        """Follow the labels of some placeholders in the order of the graph, then drop what is not free."""
        self.first_link = self.scales.count
        self.labels.update(seeds)
        order, live, queued = self.graph.order, self.graph.live_or_stored, set(seeds)
        queue: list[tuple[int, Node]] = []

        def visit_users(node: Node, after: int) -> None:
            for user in node.users:
                if order[user] > after and user not in queued and user in live:
                    queued.add(user)
                    heapq.heappush(queue, (order[user], user))

        for node in seeds:
            visit_users(node, -1)
        while queue and not self.scales.all_pinned:
            _, node = heapq.heappop(queue)
            result = self._visit(node)
            for target in self.graph.flow.written(node):
                for view in (self.graph.flow.root(target), *self.graph.flow.views(target)):
                    if any(label is not None for label in as_list(self.labels.get(view))):
                        visit_users(view, order[node])
            if any(label is not None for label in as_list(result)):
                visit_users(node, -1)
        self._settle()

    def _visit(self, node: Node) -> Result:
        labels = self.labels
        use = ShiftUse(
            node, self.graph, self.scales, labels, self.absorptions, links=self.links, rows=self.rows,
            inactive=self.inactive, first_link=self.first_link,
        )  # fmt: skip
        for source in node.all_input_nodes:
            self._drop_refused(source, labels)
        result = None
        if node.op == "output":
            self._leave(use)
        elif any(label is not None for source in node.all_input_nodes for label in as_list(labels.get(source))):
            result = self._region(use) if is_region(node) else apply_rule(use)
        labels[node] = result
        write_back(use, result)
        if target_of(node) is not None:
            for view in (self.graph.flow.root(node), *self.graph.flow.views(node)):
                self.alive.pop(view, None)
        return result

    def _drop_refused(self, node: Node, labels: dict[Node, Result]) -> None:
        """Forget the shifts of a tensor where all have been refused: they would be carried through all that follows."""
        given = [label for label in as_list(labels.get(node)) if label is not None]
        if given and self.scales.is_pinned(self.alive.get(node, UNSCALED)):
            numbers = (number for label in given for number in np.unique(label.ids).tolist())
            found = next((number for number in numbers if not self.scales.is_pinned(number)), None)
            if found is None:
                labels[node] = None
            else:
                self.alive[node] = found

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
        inner, arguments = region_graph(use.node)
        given = iter(arguments)
        for node in inner.nodes:
            if node.op == "placeholder":
                argument = next(given)
                self.labels[node] = self.labels.get(argument) if isinstance(argument, Node) else None
            elif node.op == "output":
                results = node.args[0] if isinstance(node.args[0], (tuple, list)) else [node.args[0]]
                return [found if isinstance(found := self.labels.get(r), Label) else None for r in results]
            elif node in self.graph.live_or_stored:
                self._visit(node)
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
