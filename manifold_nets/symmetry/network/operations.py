"""The operations of a graph: their names, their exact overloads, and their arguments."""

from __future__ import annotations

import functools
import operator
from typing import Any

import torch
from torch.fx import Node

__all__ = ["bound_arguments", "is_in_place", "is_region", "op_name", "operation_key", "overload_key", "target_of"]

_REGIONS = ("wrap_with_autocast", "wrap_with_set_grad_enabled")


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
    writes = [argument for argument in overload._schema.arguments if argument.alias_info is not None]
    plain = name[:-1] if name.endswith("_") and writes[:1] == overload._schema.arguments[:1] else name
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


def is_region(node: Node) -> bool:
    """Whether a node runs a graph of its own, under autocast or in another gradient mode."""
    return node.op == "call_function" and op_name(node) in _REGIONS


def is_in_place(node: Node) -> bool:
    """Whether the operation writes into its first argument."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    first = node.target._schema.arguments[:1]
    return bool(first and first[0].alias_info is not None and first[0].alias_info.is_write)


def target_of(node: Node) -> Node | None:
    """The tensor that an operation writes its result into: its first argument, or what ``out=`` names."""
    if is_in_place(node):
        return node.all_input_nodes[0]
    declared = node.target._schema.arguments if isinstance(node.target, torch._ops.OpOverload) else []
    outs = [node.kwargs.get(argument.name) for argument in declared if argument.is_out]
    return outs[0] if len(outs) == 1 and isinstance(outs[0], Node) else None


def bound_arguments(node: Node) -> dict[str, Any]:
    """Arguments of an operation by their schema names, defaults filled in."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return {str(i): argument for i, argument in enumerate(node.args)}
    bound: dict[str, Any] = {}
    for position, argument in enumerate(node.target._schema.arguments):
        if position < len(node.args) and not argument.kwarg_only:
            bound[argument.name] = node.args[position]
        elif argument.name in node.kwargs:
            bound[argument.name] = node.kwargs[argument.name]
        else:
            bound[argument.name] = argument.default_value if argument.has_default_value() else None
    return bound
