"""Operations that move entries: the label moves with them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.fx import Node

from manifold_nets.symmetry.rules.use import Result, Use, aligned, as_list, rule, shape_of, unscaled
from manifold_nets.symmetry.structure.scales import UNSCALED, Ids, Label

__all__ = ["VIEWS", "reshape_ids"]

VIEWS = frozenset(
    "view reshape _unsafe_view flatten unflatten view_as permute transpose swapaxes swapdims t movedim moveaxis "
    "squeeze unsqueeze expand expand_as broadcast_to select slice narrow chunk split split_with_sizes unbind getitem "
    "alias detach".split()
)


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
            if left <= right and i < len(before):
                left *= before[i]
                i += 1
            elif j < len(after):
                right *= after[j]
                j += 1
            elif i < len(before):
                left *= before[i]
                i += 1
            if left == right and (i > start_i or j > start_j):
                break
        if any(n > 1 for n in ids.shape[start_i:i]):
            expand[start_i:i] = before[start_i:i]
            result[start_j:j] = after[start_j:j]
    return np.broadcast_to(ids, expand).reshape(result)


@rule("view", "reshape", "_unsafe_view", "flatten.using_ints", "unflatten.int", "view_as", "reshape_as")
def reshape(use: Use) -> Result:
    """Reshapes of every name."""
    label = use.label("self")
    if label is None:
        return None
    return Label.compressed(reshape_ids(label.ids, use.shape("self"), use.out_shape))


@rule("permute", "transpose.int", "swapaxes", "swapdims", "t", "movedim.int", "movedim.intlist", "moveaxis.int",
      "moveaxis.intlist", "numpy_T", "matrix_H", "mT", "mH", "adjoint")  # fmt: skip
def permute(use: Use) -> Result:
    """Permutations of the axes."""
    label = use.label("self")
    if label is None:
        return None
    ids, args = label.ids, use.args
    if "dims" in args:
        moved = ids.transpose([d % ids.ndim for d in args["dims"]])
    elif "source" in args:
        moved = np.moveaxis(ids, args["source"], args["destination"])
    elif "dim0" in args or "axis0" in args:
        pair = (args["dim0"], args["dim1"]) if "dim0" in args else (args["axis0"], args["axis1"])
        moved = np.swapaxes(ids, *pair)
    elif use.op in ("matrix_H", "mT", "mH", "adjoint"):
        moved = np.swapaxes(ids, -1, -2)
    else:
        moved = ids.T
    return Label(moved)


@rule("squeeze", "squeeze.dim", "squeeze.dims")
def squeeze(use: Use) -> Result:
    """Remove axes of size 1 of the tensor, not of its compressed label."""
    label = use.label("self")
    if label is None:
        return None
    shape, dim = use.shape("self"), use.args.get("dim")
    wanted = range(len(shape)) if dim is None else [d % len(shape) for d in (dim if isinstance(dim, list) else [dim])]
    return Label(np.squeeze(label.ids, tuple(d for d in wanted if shape[d] == 1)))


@rule("unsqueeze")
def unsqueeze(use: Use) -> Result:
    """Insert an axis of size 1."""
    label = use.label("self")
    if label is None:
        return None
    return Label(np.expand_dims(label.ids, use.args["dim"] % (label.ids.ndim + 1)))


@rule("expand", "expand_as", "broadcast_to")
def expand(use: Use) -> Result:
    """Repeat along axes of size 1: the label, which broadcasts, stays."""
    label = use.label("self")
    return None if label is None else Label(aligned(label, len(use.out_shape)))


@rule("repeat", "tile")
def repeat(use: Use) -> Result:
    """Tile a tensor."""
    label = use.label("self")
    if label is None:
        return None
    counts = list(use.args["repeats" if "repeats" in use.args else "dims"])
    ids = aligned(label, len(use.out_shape))
    counts = [1] * (ids.ndim - len(counts)) + counts
    return Label(np.tile(ids, [c if n > 1 else 1 for n, c in zip(ids.shape, counts, strict=True)]))


@rule("repeat_interleave.self_int", "repeat_interleave.self_Tensor")
def repeat_interleave(use: Use) -> Result:
    """Repeat every entry along an axis, or along all axes made one."""
    label, count, dim = use.label("self"), use.args.get("repeats"), use.args.get("dim")
    if label is None:
        return None
    if not isinstance(count, int):
        use.pin("repeats entries by counts that are computed", label, unknown=True)
        return label
    ids = label.ids if dim is not None else reshape_ids(label.ids, use.shape("self"), [math.prod(use.shape("self"))])
    axis = 0 if dim is None else dim % ids.ndim
    return Label(ids if ids.shape[axis] == 1 else np.repeat(ids, count, axis))


@rule("slice.Tensor", "narrow", "select.int", "flip", "roll")
def pick(use: Use) -> Result:
    """Keep or reorder entries along one axis; nothing to do along an axis on which the label does not vary."""
    label = use.label("self")
    if label is None:
        return None
    ids, args = label.ids, use.args
    if use.op == "select":
        dim = args["dim"] % ids.ndim
        return Label.compressed(_taken(ids, args["index"] if ids.shape[dim] > 1 else 0, dim))
    if use.op in ("flip", "roll"):
        dims = tuple(d % ids.ndim for d in args["dims"])
        moved = np.flip(ids, dims) if use.op == "flip" else _rolled(use, label, dims)
        return Label(moved)
    dim = (args["dim"] or 0) % ids.ndim
    if ids.shape[dim] == 1:
        return label
    if use.op == "narrow":
        cut = slice(args["start"], args["start"] + args["length"])
    else:
        cut = slice(args["start"], args["end"], args["step"])
    return Label.compressed(ids[(slice(None),) * dim + (cut,)])


def _taken(ids: Ids, index: int, dim: int) -> Ids:
    return np.squeeze(ids.take([index], dim), dim)


def _rolled(use: Use, label: Label, dims: Sequence[int]) -> Ids:
    if not dims:
        use.pin("rolls the flattened tensor", label, unknown=True)
        return label.ids
    shifts = use.args["shifts"]
    return np.roll(label.ids, [s % label.ids.shape[d] for s, d in zip(shifts, dims, strict=True)], dims)


@rule("chunk", "split", "split.Tensor", "split.sizes", "split_with_sizes", "unbind.int", "tensor_split.sections",
      "tensor_split.indices")  # fmt: skip
def split(use: Use) -> Result:
    """Cut a tensor into parts along one axis."""
    label = use.label("self")
    if label is None:
        return None
    parts = [shape_of(fake) for fake in use.node.meta["val"]]
    dim = use.args.get("dim", 0) % label.ids.ndim
    whole = label.ids.shape[dim] == 1
    if use.op == "unbind":
        return [Label.compressed(_taken(label.ids, 0 if whole else k, dim)) for k in range(len(parts))]
    if whole:
        return [label] * len(parts)
    cuts = np.cumsum([part[dim] for part in parts])[:-1]
    return [Label.compressed(ids) for ids in np.split(label.ids, cuts, dim)]


_VMAP = "torch._functorch.predispatch."


@rule(_VMAP + "_add_batch_dim")
def into_vmap(use: Use) -> Result:
    """Inside of `torch.vmap` a tensor lacks the axis that is mapped over: one scale along it."""
    label = use.label("0")
    if label is None:
        return None
    axis = use.args["1"] % label.ids.ndim
    return Label.compressed(use.merge(label.ids, [axis], "maps over entries that have different scales").squeeze(axis))


@rule(_VMAP + "_remove_batch_dim")
def out_of_vmap(use: Use) -> Result:
    """The axis that was mapped over is put back."""
    label = use.label("0")
    return None if label is None else Label(np.expand_dims(label.ids, use.args["3"] % (label.ids.ndim + 1)))


@rule("operator.getitem")
def getitem(use: Use) -> Result:
    """Take one of several results."""
    source, index = use.args["0"], use.args["1"]
    found = as_list(use.labels.get(source)) if isinstance(source, Node) else [None]
    return found[index] if len(found) > 1 else found[0]


@rule("cat", "concat", "concatenate", "stack")
def cat(use: Use) -> Result:
    """Join tensors along an axis; parts that no scale reaches are marked so, zeros may have any scale."""
    nodes: list[Any] = [node for node in use.args["tensors"] if shape_of(node) != (0,)]
    labels = [use.label_of(node) for node in nodes]
    rank = len(use.out_shape)
    dim = (use.args.get("dim") or 0) % rank
    parts = []
    for node, label in zip(nodes, labels, strict=True):
        shape = shape_of(node)
        zeros = use.any_scale(shape) if label is None and use.is_zero(node) else None
        ids = unscaled(len(shape)) if label is None else label.ids
        ids = ids if zeros is None else zeros
        if use.op == "stack":
            parts.append(np.expand_dims(ids, dim))
        else:
            parts.append(np.broadcast_to(ids, [shape[a] if a == dim else n for a, n in enumerate(ids.shape)]))
    common = np.broadcast_shapes(*[tuple(1 if a == dim else n for a, n in enumerate(p.shape)) for p in parts])
    full = [np.broadcast_to(p, [p.shape[a] if a == dim else n for a, n in enumerate(common)]) for p in parts]
    return Label.compressed(np.concatenate(full, dim))


# Where the entries that are added come from, in numpy's terms; zeros may have any label.
_PADDED = {"reflect": "reflect", "reflection": "reflect", "circular": "wrap"}


@rule("pad", "constant_pad_nd", "reflection_pad1d", "reflection_pad2d", "reflection_pad3d",
      "replication_pad1d", "replication_pad2d", "replication_pad3d")  # fmt: skip
def pad(use: Use) -> Result:
    """Padding with zeros, which any scale leaves alone, with entries of the tensor itself, or with other constants.

    A constant that is not zero is an entry that no scale reaches, as the ones are that linear attention appends to its
    values to find the sum of its weights in the last column of the product.
    """
    label = use.label("self")
    if label is None:
        return None
    ids = label.ids
    constant = use.args.get("mode", "constant") == "constant" and (use.args.get("value") or 0) != 0
    amounts = list(use.args["pad" if "pad" in use.args else "padding"])
    pairs = [(0, 0)] * (ids.ndim - len(amounts) // 2) + list(zip(amounts[::2], amounts[1::2], strict=True))[::-1]
    if constant:
        ids = label.along(use.shape("self"), [axis for axis, pair in enumerate(pairs) if any(pair)])
    widths = [pair if n > 1 or (constant and any(pair)) else (0, 0) for n, pair in zip(ids.shape, pairs, strict=True)]
    if any(amount < 0 for pair in widths for amount in pair):
        use.pin("crops a tensor along an axis on which its scale varies", label, unknown=True)
        return None
    if constant:
        return Label.compressed(np.pad(ids, widths, constant_values=UNSCALED))
    if not any(map(any, widths)):
        return label
    return Label(np.pad(ids, widths, mode=_PADDED.get(use.args.get("mode") or use.op.partition("_pad")[0], "edge")))  # type: ignore[call-overload]


@rule("index.Tensor")
def index(use: Use) -> Result:
    """Advanced indexing along axes on which the label does not vary."""
    label = use.label("self")
    if label is None:
        if any(use.label_of(i) for i in use.args["indices"]):
            use.pin("indexes with a scaled tensor")
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
    if any(label.ids.shape[axis] > 1 for axis in indexed):
        merged = use.merge(label.ids, indexed, "picks entries that have different scales")
        label = Label(merged)
    contiguous = indexed == list(range(indexed[0], indexed[-1] + 1))
    at = indexed[0] if contiguous else 0
    rest = np.squeeze(label.ids, tuple(indexed))
    return Label(np.expand_dims(rest, tuple(range(at, at + inserted))))


@rule("unfold", "im2col")
def unfold(use: Use) -> Result:
    """Sliding windows: each window of a channel has the scale of the channel."""
    label = use.label("self")
    if label is None:
        return None
    if use.op == "unfold":
        dim = use.args["dimension"] % label.ids.ndim
        return Label(use.merge(label.ids, [dim], "cuts windows of different scales")[..., None])
    ids = use.merge(label.ids, [-2, -1], "cuts windows of different scales")
    window = int(np.prod(use.args["kernel_size"]))
    channels = ids.reshape(*ids.shape[:-2], 1)
    return Label(np.repeat(channels, window, -2) if channels.shape[-2] > 1 else channels)


@rule("col2im")
def fold(use: Use) -> Result:
    """Sums of overlapping windows: the entries of the windows of a channel need one scale."""
    label = use.label("self")
    if label is None:
        return None
    window = int(np.prod(use.args["kernel_size"]))
    ids = use.merge(label.ids, [-1], "sums windows that have different scales")
    if ids.shape[-2] > 1:
        ids = use.merge(ids.reshape(*ids.shape[:-2], -1, window, 1), [-2], "sums windows that have different scales")
        ids = ids.squeeze(-2)
    return Label.compressed(ids[..., None])


@rule("pixel_shuffle", "pixel_unshuffle", "channel_shuffle")
def shuffle(use: Use) -> Result:
    """Fixed permutations of channels and pixels, followed on the full label."""
    label = use.label("self")
    if label is None:
        return None
    full = label.along(use.shape("self"), range(1, label.ids.ndim)).copy()
    moved = use.node.target(torch.from_numpy(full), *use.node.args[1:])  # type: ignore[operator]
    return Label.compressed(moved.numpy())
