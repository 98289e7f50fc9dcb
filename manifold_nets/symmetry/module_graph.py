"""The network as shown in the report: calls of modules, and the operations that join their results."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby

from torch.fx import Node

from manifold_nets.documents import JsonForm
from manifold_nets.symmetry.graph import is_in_place, op_name
from manifold_nets.symmetry.trace import TracedGraph

__all__ = ["GraphNode", "module_graph"]

_NORMALIZATIONS = {"batch_norm", "instance_norm", "group_norm", "layer_norm", "rms_norm", "linalg_vector_norm"}


@dataclass(frozen=True)
class GraphNode(JsonForm):
    """One step of the network: the call of an innermost module, or an operation that joins several results.

    Args:
        name: unique name; calls after the first one and repeated operations carry a number.
        module: qualified name of the module; empty for the model itself, its inputs and its output.
        kind: ``"input"``, ``"weight"`` (reads a weight of at least two dimensions), ``"normalization"``,
            ``"operation"`` or ``"output"``.
        label: class of the module, or the aten operation.
        inputs: names of the nodes whose results it reads, all of them earlier ones.
        weights: names of the parameters with at least two dimensions that it reads.
    """

    name: str
    module: str
    kind: str
    label: str
    inputs: tuple[str, ...]
    weights: tuple[str, ...]


def module_graph(graph: TracedGraph) -> tuple[GraphNode, ...]:
    """Fold the aten graph into one node for each call of an innermost module, in the order of execution.

    An operation outside of the innermost modules is a node of its own where it joins several results, reads a
    parameter or normalizes; one that only passes a result on (a reshape, an activation) is folded into its source.
    """
    return _Folding(graph).nodes()


class _Folding:
    """Sources and names of the nodes found so far."""

    def __init__(self, graph: TracedGraph) -> None:
        self.graph = graph
        self.found: dict[str, GraphNode] = {}
        self.source: dict[Node, str | None] = {}
        stacks = [
            list(node.meta.get("nn_module_stack") or {})
            for node in graph.program.graph.nodes
            if node.op == "call_function"
        ]
        # The model itself is unfolded even where it calls no modules.
        self.containers = {key for stack in stacks for key in (*stack[:1], *stack[:-1])}

    def nodes(self) -> tuple[GraphNode, ...]:
        for (op, key), run in groupby(list(self.graph.program.graph.nodes), key=_call):
            run_nodes = list(run)
            if op == "call_function" and key and key not in self.containers:
                self._add_call(run_nodes)
                continue
            for node in run_nodes:
                if node.op == "call_function":
                    self._add_operation(node)
                elif node.op == "output":
                    self._add(node.name, "", "output", "output", [node])
                elif node not in self.graph.parameters and node not in self.graph.buffers and _feeds(node):
                    self._add(node.name, "", "input", "input", [node])
        return tuple(self.found.values())

    def _add_call(self, run: list[Node]) -> None:
        """One call of an innermost module."""
        module, kind = next(reversed(run[0].meta["nn_module_stack"].values()))
        label = (kind if isinstance(kind, str) else kind.__name__).rpartition(".")[2]
        normalizes = any(op_name(node) in _NORMALIZATIONS for node in run) or "norm" in label.lower()
        if self._sources(run) or self._weights(run):
            self._add(module.split("@")[0], module.split("@")[0], _kind(normalizes), label, run)
        else:
            self.source.update(dict.fromkeys(run))

    def _add_operation(self, node: Node) -> None:
        """One operation between the modules."""
        sources, weights, op = self._sources([node]), self._weights([node]), op_name(node)
        if len(sources) > 1 or weights or (sources and op in _NORMALIZATIONS):
            module = self.graph.module_of(node)
            self._add(f"{module}:{op}" if module else op, module, _kind(op in _NORMALIZATIONS), op, [node])
        else:
            self.source[node] = sources[0] if sources else None
            self._write(node, self.source[node])

    def _add(self, name: str, module: str, kind: str, label: str, run: list[Node]) -> None:
        unique, count = name, 1
        while unique in self.found:
            count += 1
            unique = f"{name} #{count}"
        weights = self._weights(run)
        self.found[unique] = GraphNode(
            unique, module, "weight" if weights else kind, label, tuple(self._sources(run)), tuple(weights)
        )
        for node in run:
            self.source[node] = unique
            self._write(node, unique)

    def _write(self, node: Node, name: str | None) -> None:
        """What is written in place is read from the writer from now on."""
        if node.op == "call_function" and is_in_place(node) and node.all_input_nodes:
            written = node.all_input_nodes[0]
            if written in self.source and name is not None:
                self.source[written] = name

    def _sources(self, run: list[Node]) -> list[str]:
        inside = set(run)
        read = (self.source.get(source) for node in run for source in node.all_input_nodes if source not in inside)
        return list(dict.fromkeys(name for name in read if name is not None))

    def _weights(self, run: Iterable[Node]) -> list[str]:
        read = (source for node in run for source in node.all_input_nodes if source in self.graph.parameters)
        matrices = (source for source in read if getattr(source.meta.get("val"), "ndim", 0) >= 2)
        return list(dict.fromkeys(self.graph.parameters[source] for source in matrices))


def _call(node: Node) -> tuple[str, str]:
    stack = list(node.meta.get("nn_module_stack") or {})
    return node.op, stack[-1] if stack else ""


def _feeds(node: Node) -> bool:
    return bool(node.users) and getattr(node.meta.get("val"), "ndim", 0) > 0


def _kind(normalizes: bool) -> str:
    return "normalization" if normalizes else "operation"
