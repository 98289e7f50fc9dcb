"""Linear maps: convolutions, matrix products, embeddings, attention."""

from __future__ import annotations

from typing import Any

import numpy as np

from manifold_nets.symmetry.structure.rules.use import Result, Use, aligned, rule, unscaled
from manifold_nets.symmetry.structure.scales import UNSCALED, Ids, Label

__all__: list[str] = []

_WINDOW = "sums over a window whose entries have different scales"
_CHANNELS = "sums input channels that have different scales"
# Up to this many pairs of contracted entries are compared one by one; beyond, each factor needs one scale.
_LARGEST_PRODUCT = 200_000


def _row_forms(use: Use, groups: int, *, transposed: bool = False) -> Ids | None:
    """Form of each output channel that the weight causes: one for all entries of its filter."""
    weight = use.label("weight")
    if weight is None:
        return None
    shape = use.shape("weight")
    if not transposed:
        ids = weight.along(shape, (0,))
        return use.merge(ids, range(1, ids.ndim)).reshape(-1)
    channels_in, per_group = shape[:2]
    ids = weight.along(shape, (0, 1)).reshape(groups, channels_in // groups, per_group, *weight.ids.shape[2:])
    return use.merge(ids, [1, *range(3, ids.ndim)]).reshape(-1)


def _input_forms(use: Use, label: Label, channel_axis: int, groups: int) -> Ids:
    """Label that a scaled input causes: its columns undo it where they may; else each group of channels is summed."""
    channels = use.shape("input")[channel_axis]
    others = [axis for axis in range(label.ids.ndim) if axis != channel_axis]
    varying = [axis for axis in others if label.ids.shape[axis] > 1]
    if use.columns is not None and not varying:
        per_channel = np.broadcast_to(label.ids.reshape(-1), (channels,))
        left = use.compensate(use.args["weight"], per_channel)
        if left is not None:
            return left.reshape((1,) * label.ids.ndim)
    ids = label.ids
    if ids.shape[channel_axis] == 1:
        return ids
    before, after = ids.shape[:channel_axis], ids.shape[channel_axis + 1 :]
    mixed = use.merge(ids.reshape(*before, groups, channels // groups, *after), [channel_axis + 1], _CHANNELS)
    out_channels = use.out_shape[channel_axis]
    return np.repeat(mixed.reshape(*before, groups, *after), out_channels // groups, channel_axis)


def _linear_map(use: Use, channel_axis: int, groups: int, rows: Ids | None) -> Result:
    """Combine the forms of the weight's output channels with that of the input, then scale the bias along."""
    rank = len(use.out_shape)
    source = use.label("input")
    ids = unscaled(rank)
    if source is None and use.is_shared(use.args["weight"]):
        source = Label(ids)
    if source is not None:
        spatial = list(range(channel_axis + 1, rank))
        merged = Label(use.merge(source.ids, spatial, _WINDOW))
        ids = _input_forms(use, merged, channel_axis, groups)
    if rows is not None:
        shape = [1] * rank
        shape[channel_axis] = len(rows)
        ids = use.scales.sum(ids, rows.reshape(shape))
    return _with_bias(use, channel_axis, ids)


def _with_bias(use: Use, channel_axis: int, ids: Ids) -> Result:
    """Require or ask that the bias of a linear map has the form of the channel that it is added to."""
    if use.args.get("bias") is None:
        return Label.compressed(ids)
    channels = use.out_shape[channel_axis]
    bias = use.label("bias")
    if bias is None and (ids == UNSCALED).all():
        return None
    others = [axis for axis in range(ids.ndim) if axis != channel_axis]
    merged = use.merge(ids, others, "adds one bias to entries that have different scales")
    per_channel = np.broadcast_to(merged.reshape(-1), (channels,))
    if bias is not None:
        use.scales.join(per_channel, np.broadcast_to(bias.ids, (channels,)), use.why("adds a bias of another scale"))
    elif not use.adopt(use.args["bias"], per_channel):
        use.pin("adds a bias that cannot be scaled along", Label(ids))
        return None
    return Label.compressed(use.scales.roots(ids))


@rule("conv1d", "conv2d", "conv3d", "convolution", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def convolution(use: Use) -> Result:
    """Convolutions, plain and transposed, grouped and depthwise."""
    groups = int(use.args["groups"])
    spatial = len(use.shape("weight")) - 2
    transposed = "transpose" in use.op or bool(use.args.get("transposed"))
    rows = _row_forms(use, groups, transposed=transposed)
    return _linear_map(use, len(use.out_shape) - spatial - 1, groups, rows)


@rule("linear")
def linear(use: Use) -> Result:
    """``x Wᵀ + b`` along the last axis."""
    return _linear_map(use, len(use.out_shape) - 1, 1, _row_forms(use, 1))


@rule("addmm", "baddbmm")
def addmm(use: Use) -> Result:
    """``b + x W``: a matrix product to which a bias is added, scaled along where it is a parameter."""
    first, second = ("mat1", "mat2") if use.op == "addmm" else ("batch1", "batch2")
    rank = len(use.out_shape)
    if any(float(use.args.get(factor, 1)) != 1 for factor in ("alpha", "beta")):
        use.pin("is followed for factors of 1 only", unknown=True)
        return None
    product = _matrix_product(use, use.label(first), use.label(second), rank)
    bias = use.label("self")
    if bias is None and (product == UNSCALED).all():
        return None
    if len(use.shape("self")) > 1:
        ids = unscaled(rank) if bias is None else aligned(bias, rank)
        use.scales.join(product, ids, use.why("adds tensors that have different scales"))
        return Label.compressed(use.scales.roots(product))
    use.args["bias"] = use.args["self"]
    return _with_bias(use, rank - 1, product)


@rule("mv", "dot", "vdot")
def vector_product(use: Use) -> Result:
    """Products with a vector: the products of the entries that are summed need one scale."""
    left, right = list(use.args.values())[:2]
    labels = [use.label_of(value) for value in (left, right)]
    rank = 2 if use.op == "mv" else 1
    a, b = (unscaled(n) if label is None else label.ids for label, n in zip(labels, (rank, 1), strict=True))
    return Label.compressed(use.merge(use.scales.sum(a, b), [-1]).squeeze(-1))


@rule("matmul", "mm", "bmm")
def matmul(use: Use) -> Result:
    """Matrix products: the products of the entries that are summed need one scale."""
    first, second = ("self", "mat2") if "mat2" in use.args else ("self", "other")
    if len(use.shape(first)) < 2 or len(use.shape(second)) < 2:
        use.pin("is followed for matrices only", unknown=True)
        return None
    return Label.compressed(_matrix_product(use, use.label(first), use.label(second), len(use.out_shape)))


def _matrix_product(use: Use, left: Label | None, right: Label | None, rank: int) -> Ids:
    a = unscaled(rank) if left is None else aligned(left, rank)
    b = unscaled(rank) if right is None else aligned(right, rank)
    size = np.prod(np.broadcast_shapes((*a.shape, 1), (*b.shape[:-2], 1, *b.shape[-2:])))
    if size > _LARGEST_PRODUCT:
        a, b = use.merge(a, [-1]), use.merge(b, [-2])
    terms = use.scales.sum(a[..., None], b[..., None, :, :])
    return use.merge(terms, [-2]).squeeze(-2)


@rule("einsum")
def einsum(use: Use) -> Result:
    """Einstein sums in which one factor is scaled: one scale along the indices that are summed over."""
    terms, _, result = str(use.args["equation"]).replace(" ", "").partition("->")
    indices = terms.split(",")
    labels = [use.label_of(tensor) for tensor in use.args["tensors"]]
    scaled = [(names, label) for names, label in zip(indices, labels, strict=True) if label is not None]
    if len(scaled) > 1:
        use.pin("multiplies scaled tensors")
        return None
    (names, label), explicit = scaled[0], "->" in use.args["equation"]
    if "." in terms or not explicit or len(set(names)) < len(names):
        use.pin("is followed for explicit equations without repeated indices only", unknown=True)
        return None
    ids = use.merge(label.ids, [axis for axis, name in enumerate(names) if name not in result])
    kept = [name for name in names if name in result]
    ids = ids.reshape([n for n, name in zip(ids.shape, names, strict=True) if name in result])
    order = sorted(range(len(kept)), key=lambda axis: result.index(kept[axis]))
    sizes = dict(zip([kept[axis] for axis in order], ids.transpose(order).shape, strict=True))
    return Label.compressed(ids.transpose(order).reshape([sizes.get(name, 1) for name in result]))


@rule("embedding")
def embedding(use: Use) -> Result:
    """Look up rows: any row may be picked, so all rows need one scale."""
    weight: Any = use.label("weight")
    if weight is None:
        return None
    ids = use.merge(weight.ids, [0], "looks up rows that have different scales")
    return Label.compressed(ids.reshape((1,) * (len(use.out_shape) - 1) + ids.shape[1:]))


@rule("scaled_dot_product_attention")
def attention(use: Use) -> Result:
    """Attention is linear in the values; the products of queries and keys pass a softmax."""
    query, key, value = use.label("query"), use.label("key"), use.label("value")
    rank = len(use.out_shape)
    if use.label("attn_mask") is not None:
        use.pin("adds it to what a softmax reads", use.label("attn_mask"))
    if query is not None or key is not None:
        swapped = None if key is None else Label(aligned(key, rank).swapaxes(-1, -2))
        scores = _matrix_product(use, query, swapped, rank)
        use.pin("feeds products of queries and keys to a softmax", Label(scores))
    if value is None:
        return None
    return Label.compressed(use.merge(value.ids, [-2], "averages values that have different scales"))
