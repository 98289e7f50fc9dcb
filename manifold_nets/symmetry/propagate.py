"""The single walk over a graph: labels of scales or shifts, from the parameters to the operations that absorb them."""

from __future__ import annotations

import heapq
import math
import operator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.fx import Node

from manifold_nets.symmetry.equations import UNSCALED, Ids, Label, Scales
from manifold_nets.symmetry.graph import op_name, target_of
from manifold_nets.symmetry.rules import (
    VIEWS,
    Absorption,
    Coscaled,
    Result,
    Use,
    Walk,
    aligned,
    apply_rule,
    as_list,
    shape_of,
)
from manifold_nets.symmetry.trace import TracedGraph

__all__ = ["follow_shifts", "propagate"]

# Up to this many entries the places that a view shows are worked out one by one.
_LARGEST = 2**22
_MAY_COPY = frozenset(["reshape", "flatten"])


def propagate(
    graph: TracedGraph,
    seeds: dict[Node, Label],
    scales: Scales,
    columns: dict[str, Ids] | None = None,
    *,
    stored: bool = True,
) -> tuple[list[Absorption], list[Coscaled]]:
    """Follow the scales of some placeholders through the graph, in its order, as far as outputs depend on them.

    Args:
        graph: the graph.
        seeds: labels to start from.
        scales: takes the conditions that the operations put on the scales.
        columns: where given, weights may undo the scales of their inputs; see `Use`.
        stored: whether the buffers count as outputs that training mode writes and only evaluation reads.

    Returns:
        The normalizations that absorb scales, and the biases that have to be scaled along.
    """
    live = graph.live_or_stored if stored else graph.live
    if live.isdisjoint(seeds):
        live = frozenset(graph.order)  # no output depends on them: what does depend on them is asked
    walk = _Walk(graph, scales, live, columns)
    walk.run(seeds)
    return walk.absorptions, walk.coscaled


def follow_shifts(
    graph: TracedGraph, seeds: dict[str, Ids], scales: Scales, **options: Any
) -> dict[int, list[Absorption]]:
    """Follow the shifts of some parameters through a graph.

    Args:
        graph: the graph.
        seeds: for each parameter the number of the form of each entry; broadcasts to its shape.
        scales: the unknown shifts; takes the equations that the network puts on them.
        options: those of the walk: ``rows``, ``inactive`` and ``loss``.

    Returns:
        For each unknown that is free the operations that absorb it, directly or after linear maps.
    """
    walk = _ShiftWalk(graph, scales, graph.live_or_stored, shifts=True, **options)
    walk.run({node: Label(ids) for name, ids in seeds.items() for node in graph.placeholders_of(name)})
    return walk.absorbed()


class _Walk(Walk):
    """Labels of scales on their way through a graph, and the equations that the network puts on them."""

    def run(self, seeds: dict[Node, Label]) -> None:
        """Visit everything that a label reaches, in the order of the graph."""
        self.labels.update(seeds)
        order, flow, queued = self.graph.order, self.graph.flow, set(seeds)
        queue: list[tuple[int, Node]] = []

        def visit_users(node: Node, after: int = -1) -> None:
            for user in node.users:
                if order[user] > after and user not in queued and user in self.live:
                    queued.add(user)
                    heapq.heappush(queue, (order[user], user))

        for node in seeds:
            visit_users(node)
        while queue and not self.scales.all_pinned:
            _, node = heapq.heappop(queue)
            self._visit(node)
            for target in flow.written(node):
                for view in (flow.root(target), *flow.views(target)):
                    if self._is_labelled(view):
                        visit_users(view, order[node])
            if self._is_labelled(node):
                visit_users(node)

    def _is_labelled(self, node: Node) -> bool:
        return any(label is not None for label in as_list(self.labels.get(node)))

    def _visit(self, node: Node) -> None:
        use = Use(node, self)
        if node.op == "output":
            self._leave(use)
            self.labels[node] = None
        elif any(self._is_labelled(source) for source in node.all_input_nodes):
            self.labels[node] = apply_rule(use)
        else:
            self.labels[node] = None
        _write_back(use, self.labels[node])

    def _leave(self, use: Use) -> None:
        use.refuse("is reached without a normalization", certainty="smooth")


@dataclass
class _ShiftWalk(_Walk):
    """Labels of shifts on their way through a graph.

    Args:
        loss: whether the outputs are logits, compared along axis 1.
    """

    loss: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._refused: set[int] = set()  # numbers of links
        self._checked = 0  # how many unknowns were solved when links were last checked
        self.scales.on_solved = self._refuse_sources
        self.scales.on_pinned = self._refuse_links

    def _visit(self, node: Node) -> None:
        """Forget the shifts of a tensor where all have been refused: they would be carried through all that follows."""
        for source in node.all_input_nodes:
            given = [label for label in as_list(self.labels.get(source)) if label is not None]
            alive = any(not self.scales.is_pinned(int(label.ids.flat[0])) for label in given)
            if given and not alive and not any(self.scales.roots(label.ids).any() for label in given):
                self.labels[source] = None
        super()._visit(node)

    def _leave(self, use: Use) -> None:
        """A loss of logits does not see what is added to all of them; any other output is seen."""
        for label in map(use.label_of, use.node.all_input_nodes):
            if label is not None and self.loss and label.ids.ndim >= 2:
                ids = use.merge(label.ids, [1], "compares logits that are shifted differently")
                self.absorptions.append(Absorption(use.node, "loss", "loss", "", ids))
            elif label is not None:
                use.refuse("is reached without a normalization", label)

    def _refuse_sources(self) -> None:
        """Refuse the sources of links whose results are not free, until nothing changes."""
        self.scales.on_solved = lambda: None
        while self.links and self._checked != self.scales.solved:
            self._checked = self.scales.solved
            self._refuse(self.first_link + np.flatnonzero(~self.scales.is_free(slice(self.first_link, None))))
        self.scales.on_solved = self._refuse_sources

    def _refuse_links(self, ids: Ids) -> None:
        """Refuse all links in sums that have to vanish: solved one by one, each of the sums would refuse them as well.

        The unknowns of links are newer than those of parameters, so a sum is solved for that of a link.
        """
        if len(ids) and self.links:
            unknowns = self.scales.scales_in(ids)
            self._refuse(unknowns[unknowns >= self.first_link])

    def _refuse(self, unknowns: Ids) -> None:
        """Refuse the sources and the results of the links that made some unknowns."""
        starts = [link.unknowns.start for link in self.links]
        of_links = np.bincount(np.searchsorted(starts, unknowns, "right") - 1)
        refused = set(np.flatnonzero(of_links).tolist()) - self._refused
        self._refused |= refused
        for link in (self.links[number] for number in sorted(refused)):
            self.scales.pin(link.sources, link.because)
            self.scales.pin(link.results, link.because)

    def absorbed(self) -> dict[int, list[Absorption]]:
        """For each unknown of a parameter the operations that absorb it, directly or after linear maps."""
        link_of = np.full(self.scales.count, UNSCALED)
        behind: list[Ids] = []

        def sources(ids: Ids) -> Ids:
            found = self.scales.scales_in(ids)
            links = np.unique(link_of[found[found >= self.first_link]])
            return np.unique(np.concatenate([found[found < self.first_link], *(behind[n] for n in links.tolist())]))

        for number, link in enumerate(self.links):
            link_of[link.unknowns.start : link.unknowns.stop] = number
            behind.append(sources(link.sources))
        result: dict[int, list[Absorption]] = {}
        for absorption in self.absorptions:
            for k in sources(absorption.ids).tolist():
                result.setdefault(k, []).append(absorption)
        return result


def _write_back(use: Use, result: Result) -> None:
    """Give a tensor, and all views of it, the labels that they have after an operation wrote into one of them.

    Args:
        use: the operation; one that returns a new tensor changes nothing.
        result: the label of its result.
    """
    flow = use.graph.flow
    target = target_of(use.node)
    if target is None:
        return
    if target not in flow.written(use.node):  # another shape, the same entries
        use.labels[target] = result
        return
    before = use.labels.get(target)
    new = result if isinstance(result, Label) else None
    if _is_same(use, before if isinstance(before, Label) else None, new, target):
        return
    root = flow.root(target)
    if use.graph.buffer_of(root) or use.graph.parameter_of(root):
        use.refuse("is kept in a buffer that evaluation or a later step reads", new)
        return
    views = [v for v in flow.views(root) if use.graph.order[v] < use.graph.order[use.node]]
    later = [v for v in views if _is_read_after(use, v)]
    if target is root and not later:
        use.labels[root] = new
        return
    try:
        _scatter(use, root, [target, *later], new)
    except (_NotFollowedError, RuntimeError, TypeError, ValueError) as error:
        given = [label for node in (root, *views) if isinstance(label := use.labels.get(node), Label)]
        use.refuse(f"writes into a view of another tensor ({error})", new, *given, unknown=True)
        use.labels.update(dict.fromkeys([root, *views]))


class _NotFollowedError(Exception):
    """A view of which the places are not known."""


def _is_same(use: Use, before: Label | None, after: Label | None, target: Node) -> bool:
    """Whether the labels say the same of every entry."""
    rank = len(shape_of(target))
    old, new = (np.zeros((1,) * rank, np.int64) if x is None else aligned(x, rank) for x in (before, after))
    return bool((use.scales.roots(old) == use.scales.roots(new)).all())


def _is_read_after(use: Use, node: Node) -> bool:
    order = use.graph.order
    return any(order[user] > order[use.node] for user in node.users)


def _scatter(use: Use, root: Node, views: list[Node], written: Label | None) -> None:
    """Write the label of the first view into that of its root, then read the labels of the others."""
    shape = shape_of(root)
    if math.prod(shape) > _LARGEST:
        raise _NotFollowedError("it is too large to follow")
    label = use.labels.get(root)
    if isinstance(label, Label):
        ids: Ids = np.broadcast_to(label.ids, shape).copy()
    else:
        free = use.any_scale(shape) if use.graph.is_zero(root, use.node) else None
        ids = np.full(shape, UNSCALED) if free is None else free.copy()
    flat = ids.reshape(-1)
    places = {root: torch.arange(flat.size).reshape(shape)}
    for view in views:
        _places(use.graph, view, places)
    target = places[views[0]].numpy()
    new = np.zeros((1,) * target.ndim, np.int64) if written is None else aligned(written, target.ndim)
    flat[target.reshape(-1)] = np.broadcast_to(new, target.shape).reshape(-1)
    for view in [root, *views]:
        use.labels[view] = Label.compressed(flat[places[view].numpy()])


def _places(graph: TracedGraph, view: Node, known: dict[Node, Any]) -> Any:
    """Which entries of its root a view shows: the view, taken of their numbers."""
    if view not in known:
        source = graph.flow.source(view)
        if source is None or view.op not in ("call_function", "placeholder"):
            raise _NotFollowedError(f"{view.name} is not followed")
        behind = _places(graph, source, known)
        if view.op == "placeholder" or view.args[0] is not source or target_of(view) is source:
            known[view] = behind
        elif op_name(view) in VIEWS - _MAY_COPY or view.target is operator.getitem:
            known[view] = view.target(behind, *view.args[1:], **view.kwargs)  # type: ignore[operator]
        else:
            raise _NotFollowedError(f"{op_name(view)} may be a view or a copy")
    return known[view]
