"""The operations of a graph: their names, their exact overloads, and their arguments."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Node

__all__ = ["bound_arguments", "is_in_place", "is_region", "op_name", "operation_key"]

_REGIONS = ("wrap_with_autocast", "wrap_with_set_grad_enabled")
# The in-place forms whose overload is not called like that of the form which returns a new tensor.
_FUNCTIONAL = {
    "pow_.Scalar": "pow.Tensor_Scalar",
    "pow_.Tensor": "pow.Tensor_Tensor",
    "bernoulli_.float": "bernoulli.p",
    "transpose_": "transpose.int",
    "floor_divide_.Tensor": "floor_divide",
}


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

    An in-place form has the key of the form that returns a new tensor. Functions of Python carry their module:
    ``operator.getitem``.
    """
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return overload_key(target)
    if target is operator.getitem:
        return "operator.getitem"
    if isinstance(target, str):
        return node.op
    return f"{getattr(target, '__module__', '')}.{getattr(target, '__name__', target)}"


def overload_key(overload: torch._ops.OpOverload) -> str:
    """The key of an overload; see `operation_key`.

    Example:
        >>> [overload_key(op) for op in (torch.ops.aten.max.default, torch.ops.aten.pow_.Scalar)]
        ['max', 'pow.Tensor_Scalar']
    """
    schema = overload._schema
    namespace, _, name = schema.name.partition("::")
    suffix = f".{schema.overload_name}" if schema.overload_name else ""
    if name + suffix in _FUNCTIONAL:
        return _FUNCTIONAL[name + suffix]
    writes = bool(schema.arguments) and schema.arguments[0].alias_info is not None and name.endswith("_")
    key = (name[:-1] if writes else name) + suffix
    return key if namespace == "aten" else f"{namespace}::{key}"


def is_region(node: Node) -> bool:
    """Whether a node runs a graph of its own, under autocast or in another gradient mode."""
    return node.op == "call_function" and op_name(node) in _REGIONS


def is_in_place(node: Node) -> bool:
    """Whether the operation writes into its first argument."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    first = node.target._schema.arguments[:1]
    return bool(first and first[0].alias_info is not None and first[0].alias_info.is_write)


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
