"""Operations that replace entries of a tensor by others, or add to them, at places that an index or a mask names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch.fx import Node

from manifold_nets.symmetry.rules.use import Result, Use, aligned, rule, shape_of
from manifold_nets.symmetry.structure.scales import Ids, Label

__all__: list[str] = []

_OTHERS = "replaces entries by others that are not scaled with them"
_MIXED = "mixes entries that have different scales"


def _into(use: Use, values: Any, axes: Sequence[int], *, aligned_with: bool = False) -> Result:
    """Label of a tensor into which values are written, or to which they are added.

    Args:
        use: the operation.
        values: what is written: a tensor or a number.
        axes: the axes along which a place of the result may hold any of the values.
        aligned_with: whether the other axes of the values are those of the result.
    """
    own, new = use.label("self"), use.label_of(values)
    shape = shape_of(use.args["self"])
    if new is None:
        if own is not None and not use.is_zero(values):
            use.pin(_OTHERS)
            return None
        return own
    reach = list(axes) if aligned_with and new.ids.ndim == len(shape) else list(range(new.ids.ndim))
    source: Ids = use.merge(new.ids, reach, _MIXED)
    if any(n not in (1, m) for n, m in zip(source.shape, shape, strict=False)) or source.ndim != len(shape):
        source = use.merge(source, range(source.ndim), _MIXED).reshape((1,) * len(shape))
    if own is None:
        if not use.is_zero(use.args["self"]):
            use.pin(_OTHERS)
            return None
        return Label.compressed(source)
    target = use.merge(own.ids, axes, _MIXED)
    target, source = np.broadcast_arrays(target, source)
    use.scales.join(target, source, use.why(_OTHERS))
    return Label.compressed(use.scales.roots(target))


@rule("index_put")
def index_put(use: Use) -> Result:
    """Entries that masks or indices name are replaced, or added to."""
    everything = range(len(shape_of(use.args["self"])))
    return _into(use, use.args["values"], everything)


@rule("masked_scatter")
def masked_scatter(use: Use) -> Result:
    """Entries that a mask names are replaced by those of another tensor, one after the other."""
    return _into(use, use.args["source"], range(len(shape_of(use.args["self"]))))


@rule("index_fill.int_Scalar", "index_fill.int_Tensor", "scatter.value")
def filled(use: Use) -> Result:
    """Entries are replaced by one value."""
    return _into(use, use.args["value"], [use.args["dim"]])


@rule("scatter.src", "scatter_add", "scatter_reduce.two", "index_copy", "index_add", "index_reduce")
def scatter(use: Use) -> Result:
    """Entries are replaced, or added to, by others along one axis; a product of entries is not followed."""
    if use.args.get("reduce") == "prod":
        use.pin("multiplies entries", unknown=True)
        return None
    values = use.args["src" if "src" in use.args else "source"]
    return _into(use, values, [use.args["dim"]], aligned_with=True)


@rule("slice_scatter", "select_scatter")
def scatter_part(use: Use) -> Result:
    """A part of a tensor is replaced by another tensor."""
    source = use.args["src"]
    label = use.label_of(source)
    if label is not None and use.op == "select_scatter":
        dim = use.args["dim"] % len(use.out_shape)
        use.labels = {**use.labels, source: Label(np.expand_dims(label.ids, dim))}
    return _into(use, source, [use.args["dim"] or 0], aligned_with=True)


@rule("copy", "fill.Tensor")
def written(use: Use) -> Result:
    """What is written over a tensor brings its own scale."""
    value = use.args["src" if use.op == "copy" else "value"]
    label = use.label_of(value)
    if label is not None:
        return Label(aligned(label, len(use.out_shape)))
    return _zeros(use) if use.is_zero(value) else None


@rule("zero", "fill.Scalar")
def filled_whole(use: Use) -> Result:
    """A number is written over a tensor: what it held is lost, and any scale leaves zeros alone."""
    return _zeros(use) if use.op == "zero" or use.is_zero(use.args["value"]) else None


def _zeros(use: Use) -> Result:
    ids = use.any_scale(use.out_shape)
    return use.label("self") if ids is None else Label(ids)


@rule("index_select", "gather", "take_along_dim")
def gathered(use: Use) -> Result:
    """Entries of one axis, in the order of an index: any of them may stand anywhere."""
    name = "indices" if use.op == "take_along_dim" else "index"
    label, index = use.label("self"), use.args[name]
    if label is None:
        return None
    dim, rank = use.args["dim"], label.ids.ndim
    if dim is None or rank == 0:
        return Label.compressed(use.merge(label.ids, range(rank), _MIXED).reshape((1,) * len(use.out_shape)))
    ids = use.merge(label.ids, [dim], "picks entries that have different scales")
    if isinstance(index, Node) and use.op == "gather":
        sizes = zip(shape_of(index), ids.shape, strict=True)
        ids = ids[tuple(slice(n) if have > 1 else slice(None) for n, have in sizes)]
    return Label.compressed(ids)
