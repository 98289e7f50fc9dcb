"""What the results of a graph depend on: views, what is written into them, regions under autocast or without gradients.

An operation that writes into a tensor changes what every view of it shows. So each node has a *root*, the tensor that
it looks at through any number of views, and whoever needs a node needs all that is written into its root.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.fx import Graph, Node

from manifold_nets.symmetry.network.operations import is_region, operation_key

__all__ = ["DataFlow"]

# In-place operations that change no entry.
_ONLY_VIEWS = frozenset("detach requires_grad squeeze unsqueeze t transpose swapaxes swapdims as_strided".split())


class DataFlow:
    """Dependencies of a graph, the graphs of its regions included.

    ``order`` numbers all nodes as they run; the nodes of a region come before the node that runs the region.
    """

    def __init__(self, graph: Graph) -> None:
        self.order: dict[Node, int] = {}
        self._looks_at: dict[Node, Node] = {}
        self._needs: dict[Node, list[Node]] = {}
        self._writers: dict[Node, list[Node]] = {}
        self._written: dict[Node, list[Node]] = {}
        self._region_of: dict[Node, Node] = {}
        self._results: dict[Node, list[Any]] = {}
        for node in graph.nodes:
            self._add(node)
        self._output = next(iter(reversed(graph.nodes)))
        self._views: dict[Node, list[Node]] = {}
        for view in self._looks_at:
            self._views.setdefault(self.root(view), []).append(view)

    def root(self, node: Node) -> Node:
        """The tensor that a node looks at: the node itself where it is no view."""
        while node in self._looks_at:
            node = self._looks_at[node]
        return node

    def source(self, view: Node) -> Node | None:
        """What a view is a view of; None where the node has entries of its own."""
        return self._looks_at.get(view)

    def writers(self, node: Node) -> list[Node]:
        """The operations that write into the tensor that a node looks at."""
        return self._writers.get(self.root(node), [])

    def written(self, node: Node) -> list[Node]:
        """The arguments into which an operation, or something inside a region, writes."""
        return self._written.get(node, [])

    def views(self, node: Node) -> list[Node]:
        """All views of the tensor that a node looks at, in the order in which they are taken."""
        return self._views.get(self.root(node), [])

    def live(self, more: Iterable[Node] = ()) -> frozenset[Node]:
        """The nodes that the outputs depend on, or some further nodes, with all that is written into these."""
        return self.needed([self._output, *more])

    def needed(self, nodes: Iterable[Node]) -> frozenset[Node]:
        """The nodes that some nodes depend on, and themselves."""
        found: set[Node] = set()
        regions: set[Node] = set()
        waiting = list(nodes)
        while waiting:
            node = waiting.pop()
            if node in found:
                continue
            found.add(node)
            if node in self._region_of:
                regions.add(self._region_of[node])
            waiting += self._needs[node]
            waiting += self.writers(node)
        return frozenset(found | regions)

    def behind(self, nodes: Iterable[Node]) -> frozenset[Node]:
        """The nodes outside of regions that depend on some nodes directly or through others, by their arguments."""
        found: set[Node] = set()
        waiting = list(nodes)
        while waiting:
            new = waiting.pop().users.keys() - found
            found |= new
            waiting += new
        return frozenset(found)

    def _add(self, node: Node, region: Node | None = None) -> None:
        if is_region(node):
            self._enter(node)
        self.order[node] = len(self.order)
        if region is not None:
            self._region_of[node] = region
        source = node.args[0] if operation_key(node) == "operator.getitem" else None
        if isinstance(source, Node) and source in self._results:
            picked = self._results[source][node.args[1]]  # type: ignore[index]
            self._needs[node] = [picked] if isinstance(picked, Node) else []
            if isinstance(picked, Node):
                self._looks_at[node] = picked
            return
        self._needs.setdefault(node, list(node.all_input_nodes))
        if isinstance(source, Node):
            self._looks_at[node] = source
        if isinstance(node.target, torch._ops.OpOverload):
            self._add_aliases(node, node.target._schema.arguments)

    def _add_aliases(self, node: Node, declared: Any) -> None:
        given = [*node.args, *[node.kwargs.get(argument.name) for argument in declared[len(node.args) :]]]
        harmless = operation_key(node).partition(".")[0] in _ONLY_VIEWS
        for position, (argument, value) in enumerate(zip(declared, given, strict=False)):
            if argument.alias_info is None:
                continue
            for tensor in value if isinstance(value, (list, tuple)) else [value]:
                if not isinstance(tensor, Node):
                    continue
                if (position == 0 or argument.is_out) and value is tensor:
                    self._looks_at[node] = tensor
                if argument.alias_info.is_write and not harmless:
                    self._written.setdefault(node, []).append(tensor)
                    self._writers.setdefault(self.root(tensor), []).append(node)

    def _enter(self, region: Node) -> None:
        """Add the graph of a region: its arguments are views of those of the node, its results are needed by it."""
        inner, arguments = region_graph(region)
        values = iter(arguments)
        for node in inner.nodes:
            self._add(node, region)
            if node.op == "placeholder":
                argument = next(values)
                if isinstance(argument, Node):
                    self._needs[node] = [argument]
                    self._looks_at[node] = argument
            elif node.op == "output":
                results = node.args[0] if isinstance(node.args[0], (tuple, list)) else [node.args[0]]
                self._results[region] = list(results)
                if isinstance(node.args[0], Node):
                    self._looks_at[region] = node.args[0]
                self._needs[region] = [result for result in results if isinstance(result, Node)]
            for target in self.written(node):
                outside = next(
                    (a for a in arguments if isinstance(a, Node) and self.root(a) is self.root(target)), None
                )
                if outside is not None:
                    self._written.setdefault(region, []).append(outside)


def region_graph(region: Node) -> tuple[Graph, list[Any]]:
    """The graph that a region runs, and the arguments that it is given."""
    held = next(a for a in region.args if isinstance(a, Node) and a.op == "get_attr")
    inner: Graph = getattr(region.graph.owning_module, str(held.target)).graph
    return inner, list(region.args[region.args.index(held) + 1 :])
