"""Operations that move entries, or write entries into a tensor: the label moves with them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.fx import Node

from manifold_nets.symmetry.equations import UNSCALED, Ids, Label
from manifold_nets.symmetry.rules.table import Rule, Table, both, of_first
from manifold_nets.symmetry.rules.use import Result, Use, aligned, as_list, shape_of

VIEWS = frozenset(
    "view reshape _unsafe_view flatten unflatten view_as permute transpose swapaxes swapdims t movedim moveaxis "
    "squeeze unsqueeze expand expand_as broadcast_to select slice narrow chunk split split_with_sizes unbind getitem "
    "alias detach".split()
)
_OTHERS = "replaces entries by others that are not scaled with them"
_MIXED = "mixes entries that have different scales"
_PICKS = "picks entries that have different scales"
_WINDOWS = "cuts windows of different scales"
_SUMS_WINDOWS = "sums windows that have different scales"
_VMAP = "torch._functorch.predispatch."


def table() -> Table:
    """Operation → what it does to a scale, and to a shift."""
    return {
        "view reshape _unsafe_view flatten.using_ints unflatten.int view_as reshape_as": both(reshape),
        # Views: they are taken of numbers that do not lie in memory where they do not vary.
        "permute transpose.int swapaxes swapdims t movedim.int movedim.intlist moveaxis.int moveaxis.intlist numpy_T "
        "mT mH matrix_H adjoint squeeze squeeze.dim squeeze.dims unsqueeze expand broadcast_to slice.Tensor narrow "
        "select.int chunk split split.Tensor split.sizes split_with_sizes unbind.int tensor_split.sections "
        "tensor_split.indices": both(moves()),
        "expand_as": both(expand_as),
        # Copies, axis by axis: an axis along which the numbers do not vary may have size 1.
        "flip repeat tile": both(moves(whole=False)),
        "roll": both(roll),
        "repeat_interleave.self_int repeat_interleave.self_Tensor": both(repeat_interleave),
        "pixel_shuffle pixel_unshuffle channel_shuffle": both(moves()),
        "cat concat concatenate stack": both(cat),
        "pad constant_pad_nd reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d "
        "replication_pad3d": both(pad),
        "operator.getitem": both(getitem),
        "broadcast_tensors": both(broadcast_tensors),
        "view_as_real": (view_as_real, None),
        "view_as_complex": (view_as_complex, None),
        "index.Tensor": both(index),
        "index_select gather take_along_dim": both(gathered),
        "unfold": both(unfold),
        "im2col": (im2col, None),
        "col2im": (col2im, None),
        _VMAP + "_add_batch_dim": (into_vmap, None),
        _VMAP + "_remove_batch_dim": (out_of_vmap, None),
        "copy fill.Tensor zero fill.Scalar": both(written),
        "index_put": (writes("values"), None),
        "masked_scatter": (writes("source"), None),
        "index_fill.int_Scalar index_fill.int_Tensor scatter.value": (writes("value", along="dim"), None),
        "scatter.src scatter_add scatter_reduce.two": (writes("src", along="dim", same_axes=True), None),
        "index_copy index_add index_reduce": (writes("source", along="dim", same_axes=True), None),
        "slice_scatter select_scatter": (writes("src", along="dim", same_axes=True), None),
    }


# ---- the operation itself, run on the numbers of the forms -----------------------------------------------------------


def moves(*, whole: bool = True) -> Rule:
    """A rule that runs the operation on the ids: at the tensor's full size, or with size 1 where they do not vary."""

    @of_first
    def rule(use: Use, label: Label) -> Result:
        ids = torch.from_numpy(label.ids.copy())
        if whole:
            ids = ids.expand(shape_of(next(iter(use.args.values()))))
        return run_on(use, ids)

    return rule


def run_on(use: Use, ids: Tensor) -> Result:
    """Labels of what the operation makes of the ids in the place of its first argument."""
    name, _, overload = use.key.partition(".")
    operation: Any = getattr(getattr(torch.ops.aten, name), overload or "default")
    declared = [argument.name for argument in operation._schema.arguments]
    given = dict(zip(declared, use.args.values(), strict=False))
    moved = operation(ids, **{name: given[name] for name in declared[1:]})
    return [_label(part) for part in moved] if isinstance(moved, (list, tuple)) else _label(moved)


def _label(moved: Tensor) -> Label | None:
    ids = moved.numpy()
    # What does not lie in memory does not vary, and need not be compared.
    return Label.compressed(ids[tuple(slice(None) if stride else slice(1) for stride in ids.strides)])


@of_first
def reshape(use: Use, label: Label) -> Result:
    """Reshapes of every name."""
    return Label.compressed(reshape_ids(label.ids, use.shape("self"), use.out_shape))


def reshape_ids(ids: Ids, before: Sequence[int], after: Sequence[int]) -> Ids:
    """Reshape ids as their tensor is reshaped, expanding only the axes that are cut or joined and vary.

    Axes are matched in the smallest runs with equal products; a run along which the ids do not vary stays at size 1.
    """
    expand = [1] * len(before)
    result = [1] * len(after)
    i = j = 0
    while i < len(before) or j < len(after):
        start_i, start_j, left, right = i, j, 1, 1
        while True:
            if i < len(before) and (left <= right or j == len(after)):
                left *= before[i]
                i += 1
            elif j < len(after):
                right *= after[j]
                j += 1
            if left == right and (i > start_i or j > start_j):
                break
        if any(n > 1 for n in ids.shape[start_i:i]):
            expand[start_i:i] = before[start_i:i]
            result[start_j:j] = after[start_j:j]
    return np.broadcast_to(ids, expand).reshape(result)


@of_first
def expand_as(use: Use, label: Label) -> Result:
    """The label, which broadcasts, stays."""
    return Label(aligned(label, len(use.out_shape)))


@of_first
def roll(use: Use, label: Label) -> Result:
    """Entries that leave at one end come in at the other, along some axes or along all made one."""
    return moves(whole=not use.args["dims"])(use)


@of_first
def repeat_interleave(use: Use, label: Label) -> Result:
    """Repeat every entry along an axis, or along all axes made one."""
    if not isinstance(use.args.get("repeats"), int):
        use.refuse("repeats entries by counts that are computed", label, unknown=True)
        return label
    if use.args.get("dim") is None:
        return Label.compressed(np.repeat(np.broadcast_to(label.ids, use.shape("self")), use.args["repeats"]))
    return moves(whole=False)(use)


def getitem(use: Use) -> Result:
    """Take one of several results."""
    source, number = use.args["0"], use.args["1"]
    found = as_list(use.labels.get(source)) if isinstance(source, Node) else [None]
    return found[number] if len(found) > 1 else found[0]


def broadcast_tensors(use: Use) -> Result:
    """The labels, which broadcast, stay."""
    labels = [use.label_of(tensor) for tensor in use.args["tensors"]]
    return [None if label is None else Label(aligned(label, len(use.out_shape))) for label in labels]


@of_first
def view_as_real(use: Use, label: Label) -> Result:
    """The two parts of a complex number have its scale."""
    return Label(label.ids[..., None])


@of_first
def view_as_complex(use: Use, label: Label) -> Result:
    """A complex number has the scale of both of its parts."""
    return Label.compressed(use.merge(label.ids, [-1], "makes one number of parts that have different scales")[..., 0])


# ---- entries of several tensors, or beside those of one --------------------------------------------------------------


def cat(use: Use) -> Result:
    """Join tensors along an axis; parts that no scale reaches are marked so, zeros may have any scale."""
    dim, parts = (use.args.get("dim") or 0) % len(use.out_shape), []
    for node in use.args["tensors"]:
        label, shape = use.label_of(node), shape_of(node)
        ids = use.any_scale(shape) if label is None and use.is_zero(node) else None if label is None else label.ids
        if use.op == "stack":
            ids, shape = None if ids is None else np.expand_dims(ids, dim), (*shape[:dim], 1, *shape[dim:])
        if shape != (0,):
            parts.append((ids, shape[dim]))
    shapes = [tuple(1 if a == dim else n for a, n in enumerate(ids.shape)) for ids, _ in parts if ids is not None]
    full = [*np.broadcast_shapes((1,) * len(use.out_shape), *shapes)]
    full[dim] = use.out_shape[dim]
    result, start = np.full(full, UNSCALED), 0
    for ids, size in parts:
        if ids is not None:
            result[(slice(None),) * dim + (slice(start, start + size),)] = ids
        start += size
    return Label.compressed(result)


@of_first
def pad(use: Use, label: Label) -> Result:
    """Padding with entries of the tensor itself, with constants, or with zeros, which any scale leaves alone.

    A constant that is not zero is an entry that no scale reaches, as the ones are that linear attention appends to its
    values to find the sum of its weights in the last column of the product. No constant is shifted.
    """
    ids, rank = label.ids, label.ids.ndim
    mode = use.op.partition("_pad")[0] if "_pad" in use.op else use.args.get("mode") or "constant"
    constant = mode == "constant" and (use.shifts or (use.args.get("value") or 0) != 0)
    amounts = list(use.args["pad" if "pad" in use.args else "padding"])
    for k, (low, high) in enumerate(zip(amounts[::2], amounts[1::2], strict=True)):  # the last axis comes first
        axis = rank - 1 - k
        n = use.shape("self")[axis]
        if not (low or high) or (ids.shape[axis] == 1 and not constant):
            continue
        places = np.arange(-low, n + high)
        outside = (places < 0) | (places >= n)
        if mode.startswith("reflect"):
            places = np.where(places < n, np.abs(places), 2 * (n - 1) - places)
        elif mode == "circular":
            places = places % n
        ids = ids.take(np.clip(places, 0, ids.shape[axis] - 1), axis)
        if constant:
            ids[(slice(None),) * axis + (outside,)] = UNSCALED
    return Label.compressed(ids)


# ---- entries that an index names: any of them may stand anywhere, unless the index is known --------------------------


def index(use: Use) -> Result:
    """Advanced indexing along axes on which the label does not vary."""
    label = use.label("self")
    if label is None:
        if any(use.label_of(i) for i in use.args["indices"]):
            use.refuse("indexes with a scaled tensor")
        return None
    indexed: list[int] = []
    inserted = axis = 0
    for i in use.args["indices"]:
        # A mask takes as many axes as it has, and puts one in their place.
        mask = i is not None and i.meta["val"].dtype == torch.bool
        count = i.meta["val"].ndim if mask else 1
        if i is not None:
            indexed += range(axis, axis + count)
            inserted = max(inserted, 1 if mask else i.meta["val"].ndim)
        axis += count
    first = next(i for i in use.args["indices"] if i is not None)
    known = use.graph.whole_numbers(first) if len(indexed) == 1 else None
    if known is not None and known.ndim == 1:
        return Label(_taken(label.ids, known, indexed[0]))
    ids = use.merge(label.ids, [axis for axis in indexed if label.ids.shape[axis] > 1], _PICKS)
    at = indexed[0] if indexed == list(range(indexed[0], indexed[-1] + 1)) else 0
    return Label(np.expand_dims(np.squeeze(ids, tuple(indexed)), tuple(range(at, at + inserted))))


@of_first
def gathered(use: Use, label: Label) -> Result:
    """Entries of one axis, in the order of an index."""
    index, dim, rank = use.args["indices" if use.op == "take_along_dim" else "index"], use.args["dim"], label.ids.ndim
    if dim is None or rank == 0:
        return Label.compressed(use.merge(label.ids, range(rank), _MIXED).reshape((1,) * len(use.out_shape)))
    known = use.graph.whole_numbers(index) if use.op == "index_select" else None
    if known is not None:
        return Label(_taken(label.ids, known.reshape(-1), dim))
    ids = use.merge(label.ids, [dim], _PICKS)
    if isinstance(index, Node) and use.op == "gather":
        sizes = zip(shape_of(index), ids.shape, strict=True)
        ids = ids[tuple(slice(n) if have > 1 else slice(None) for n, have in sizes)]
    return Label.compressed(ids)


def _taken(ids: Ids, index: Tensor, axis: int) -> Ids:
    """The labels of the entries that a known index takes along an axis."""
    return ids if ids.shape[axis] == 1 else ids.take(index.cpu().numpy(), axis)


# ---- windows, and axes that are mapped over --------------------------------------------------------------------------


@of_first
def unfold(use: Use, label: Label) -> Result:
    """Sliding windows along one axis, which become an axis behind the others."""
    return Label(use.merge(label.ids, [use.args["dimension"]], _WINDOWS)[..., None])


@of_first
def im2col(use: Use, label: Label) -> Result:
    """Sliding windows in space: each window of a channel has the scale of the channel."""
    ids = use.merge(label.ids, [-2, -1], _WINDOWS)
    channels = ids.reshape(*ids.shape[:-2], 1)
    return Label(np.repeat(channels, int(np.prod(use.args["kernel_size"])), -2) if ids.shape[-3] > 1 else channels)


@of_first
def col2im(use: Use, label: Label) -> Result:
    """Sums of overlapping windows: the entries of the windows of a channel need one scale."""
    window = int(np.prod(use.args["kernel_size"]))
    ids = use.merge(label.ids, [-1], _SUMS_WINDOWS)
    if ids.shape[-2] > 1:
        ids = use.merge(ids.reshape(*ids.shape[:-2], -1, window, 1), [-2], _SUMS_WINDOWS).squeeze(-2)
    return Label.compressed(ids[..., None])


@of_first
def into_vmap(use: Use, label: Label) -> Result:
    """Inside of `torch.vmap` a tensor lacks the axis that is mapped over: one scale along it."""
    axis = use.args["1"] % label.ids.ndim
    return Label.compressed(use.merge(label.ids, [axis], "maps over entries that have different scales").squeeze(axis))


@of_first
def out_of_vmap(use: Use, label: Label) -> Result:
    """The axis that was mapped over is put back."""
    return Label(np.expand_dims(label.ids, use.args["3"] % (label.ids.ndim + 1)))


# ---- entries that are written into a tensor --------------------------------------------------------------------------


def written(use: Use) -> Result:
    """What is written over a whole tensor brings its own label; any scale leaves zeros alone."""
    value = 0 if use.op == "zero" else use.args["src" if use.op == "copy" else "value"]
    label = use.label_of(value)
    if label is not None:
        return Label(aligned(label, len(use.out_shape)))
    if use.shifts or not use.is_zero(value):
        return None
    ids = use.any_scale(use.out_shape)
    return use.label("self") if ids is None else Label(ids)


def writes(name: str, *, along: str = "", same_axes: bool = False) -> Rule:
    """A rule of operations that replace entries by others, or add others to them.

    Args:
        name: the argument that is written: a tensor or a number.
        along: the argument that names the axis along which a place of the result may hold any of the values; all axes
            without it.
        same_axes: whether the other axes of the values are those of the result.
    """

    def rule(use: Use) -> Result:
        if use.args.get("reduce") == "prod":
            return use.refuse("multiplies entries", unknown=True)
        own, values, shape = use.label("self"), use.args[name], use.shape("self")
        axes = [use.args[along] or 0] if along else list(range(len(shape)))
        new = use.label_of(values)
        if new is None:
            if own is not None and not use.is_zero(values):
                return use.refuse(_OTHERS)
            return own
        if use.op == "select_scatter":
            new = Label(np.expand_dims(new.ids, axes[0] % len(shape)))
        source = use.merge(new.ids, axes if same_axes and new.ids.ndim == len(shape) else range(new.ids.ndim), _MIXED)
        if any(n not in (1, m) for n, m in zip(source.shape, shape, strict=False)) or source.ndim != len(shape):
            source = use.merge(source, range(source.ndim), _MIXED).reshape((1,) * len(shape))
        if own is None and not use.is_zero(use.args["self"]):
            return use.refuse(_OTHERS)
        target = source if own is None else use.merge(own.ids, axes, _MIXED)
        return Label.compressed(use.join(target, source, _OTHERS))

    return rule
