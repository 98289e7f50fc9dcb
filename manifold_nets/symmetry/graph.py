"""The operations of an aten graph: their names, exact overloads and arguments, and their dependencies.

An operation that writes into a tensor changes all views of it. So each node has a *root*, the tensor whose memory it
shows through any number of views; a node depends on everything that is written into its root.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch.fx import Graph, Node

__all__ = [
    "DataFlow",
    "bound_arguments",
    "is_in_place",
    "is_linear_map",
    "op_name",
    "operation_key",
    "overload_key",
    "target_of",
    "weight_uses",
]


def op_name(node: Node) -> str:
    """Name of the operation without its overload and without the underscore of the in-place form.

    Operations that are not torch's own carry their namespace.
    """
    if isinstance(node.target, torch._ops.OpOverload):
        namespace, _, name = node.target._schema.name.partition("::")
        name = name.rstrip("_") if not name.startswith("_") else name
        return name if namespace == "aten" else f"{namespace}::{name}"
    return str(getattr(node.target, "__name__", node.target))


def operation_key(node: Node) -> str:
    """The exact overload of an operation, by which its rules are looked up: ``max``, ``max.dim``, ``max.other``.

    In-place forms, and those with ``out=``, have the key of the form that returns a new tensor. Functions of Python
    carry their module: ``operator.getitem``.
    """
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return overload_key(target)
    if target is operator.getitem:
        return "operator.getitem"
    if isinstance(target, str):
        return node.op
    return f"{getattr(target, '__module__', '')}.{getattr(target, '__name__', target)}"


@functools.cache
def overload_key(overload: torch._ops.OpOverload) -> str:
    """The key of an overload; see `operation_key`.

    Example:
        >>> aten = torch.ops.aten
        >>> [overload_key(op) for op in (aten.max.default, aten.max.other, aten.pow_.Scalar, aten.div.out)]
        ['max', 'max.other', 'pow.Tensor_Scalar', 'div.Tensor']
    """
    namespace, _, name = overload._schema.name.partition("::")
    in_place = any(argument.alias_info is not None for argument in overload._schema.arguments[:1])
    plain = name[:-1] if name.endswith("_") and in_place else name
    suffix = overload._schema.overload_name
    if plain != name or _has_out(overload):
        packet = getattr(getattr(torch.ops, namespace), plain, None)
        forms = [getattr(packet, form) for form in (packet.overloads() if packet is not None else [])]
        same = (form for form in forms if _signature(form) == _signature(overload) and not _has_out(form))
        suffix = next((form._schema.overload_name for form in same), suffix)
    key = f"{plain}.{suffix}" if suffix else plain
    return key if namespace == "aten" else f"{namespace}::{key}"


def _signature(overload: torch._ops.OpOverload) -> list[tuple[str, str]]:
    """Names and types of the arguments without those that take the result; the first one goes by several names."""
    given = [argument for argument in overload._schema.arguments if not argument.is_out]
    return [(argument.name if place else "", str(argument.type)) for place, argument in enumerate(given)]


def _has_out(overload: torch._ops.OpOverload) -> bool:
    return any(argument.is_out for argument in overload._schema.arguments)


def is_in_place(node: Node) -> bool:
    """Whether the operation writes into its first argument."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    first = node.target._schema.arguments[:1]
    is_tensor = bool(first) and str(first[0].type) == "Tensor"  # and no list of them, as of `torch._foreach_mul_`
    return is_tensor and first[0].alias_info is not None and first[0].alias_info.is_write


def target_of(node: Node) -> Node | None:
    """The tensor that an operation writes its result into: its first argument, or what ``out=`` names."""
    if is_in_place(node):
        return node.all_input_nodes[0]
    declared = node.target._schema.arguments if isinstance(node.target, torch._ops.OpOverload) else []
    outs = [node.kwargs.get(argument.name) for argument in declared if argument.is_out]
    return outs[0] if len(outs) == 1 and isinstance(outs[0], Node) else None


def bound_arguments(node: Node) -> dict[str, Any]:
    """Arguments of an operation by their schema names, defaults filled in, without those that take the result."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return {str(i): argument for i, argument in enumerate(node.args)}
    bound: dict[str, Any] = {}
    for position, argument in enumerate(node.target._schema.arguments):
        if argument.is_out:
            continue
        if position < len(node.args) and not argument.kwarg_only:
            bound[argument.name] = node.args[position]
        elif argument.name in node.kwargs:
            bound[argument.name] = node.kwargs[argument.name]
        else:
            bound[argument.name] = argument.default_value if argument.has_default_value() else None
    return bound


def weight_uses(sources: Iterable[Node]) -> set[str]:
    """The operations that use a parameter as their weight; an empty name stands for all other uses."""
    users = [(node, user) for node in sources for user in node.users]
    return {op_name(user) if bound_arguments(user).get("weight") is node else "" for node, user in users}


def is_linear_map(op: str) -> bool:
    """Whether an operation is a linear layer or a convolution, by its name."""
    return op == "linear" or op.startswith("conv")


# ---- what depends on what ----
# In-place operations that change no entry.
_ONLY_VIEWS = frozenset("detach requires_grad squeeze unsqueeze t transpose swapaxes swapdims as_strided".split())


class DataFlow:
    """Dependencies of a graph; ``order`` numbers its nodes as they run."""

    def __init__(self, graph: Graph) -> None:
        self.order: dict[Node, int] = {node: place for place, node in enumerate(graph.nodes)}
        self._looks_at: dict[Node, Node] = {}
        self._writers: dict[Node, list[Node]] = {}
        self._written: dict[Node, list[Node]] = {}
        for node in graph.nodes:
            if isinstance(node.target, torch._ops.OpOverload):
                self._add_aliases(node, node.target._schema.arguments)
            elif operation_key(node) == "operator.getitem":
                self._looks_at[node] = node.args[0]
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
        """The arguments into which an operation writes."""
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
        waiting = list(nodes)
        while waiting:
            node = waiting.pop()
            if node not in found:
                found.add(node)
                waiting += node.all_input_nodes
                waiting += self.writers(node)
        return frozenset(found)

    def behind(self, nodes: Iterable[Node]) -> frozenset[Node]:
        """The nodes that depend on some nodes directly or through others, by their arguments."""
        found: set[Node] = set()
        waiting = list(nodes)
        while waiting:
            new = waiting.pop().users.keys() - found
            found |= new
            waiting += new
        return frozenset(found)

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
