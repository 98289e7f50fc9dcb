"""What an in-place operation does to the labels of the tensor that it writes into, and of all views of it."""

from __future__ import annotations

import math
import operator
from typing import Any

import numpy as np
import torch
from torch.fx import Node

from manifold_nets.symmetry.equations import UNSCALED, Ids, Label
from manifold_nets.symmetry.graph import op_name, target_of
from manifold_nets.symmetry.rules import VIEWS, Result, Use, aligned, shape_of
from manifold_nets.symmetry.trace import TracedGraph

__all__ = ["write_back"]

# Up to this many entries the places that a view shows are worked out one by one.
_LARGEST = 2**22
_MAY_COPY = frozenset(["reshape", "flatten"])


def write_back(use: Use, result: Result) -> None:
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
