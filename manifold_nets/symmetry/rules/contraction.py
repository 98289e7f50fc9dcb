"""Linear maps: convolutions, matrix products, embeddings, attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from manifold_nets.symmetry.rules.elementwise import add_to
from manifold_nets.symmetry.rules.use import Result, Use, aligned, rule, shape_of, unscaled
from manifold_nets.symmetry.structure.scales import UNSCALED, Ids, Label

__all__ = ["einsum_indices"]

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


@rule("conv1d", "conv1d.padding", "conv2d", "conv2d.padding", "conv3d", "conv3d.padding", "convolution",
      "conv_transpose1d", "conv_transpose2d.input", "conv_transpose3d.input")  # fmt: skip
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


@rule("addmm", "baddbmm", "addbmm", "addmv")
def addmm(use: Use) -> Result:
    """``β b + α x W``: a matrix product to which a tensor is added, scaled along where it is a parameter."""
    first, second = {"addmm": ("mat1", "mat2"), "addmv": ("mat", "vec")}.get(use.op, ("batch1", "batch2"))
    rank = len(use.out_shape)
    alpha, beta = (float(use.args.get(factor, 1)) for factor in ("alpha", "beta"))
    product = _product(use, first, second) if alpha else unscaled(rank)
    if use.op == "addbmm":
        product = use.merge(product, [0]).squeeze(0)
    start = use.label("self")
    if not beta:
        return Label.compressed(product)
    if not alpha:
        return start
    return add_to(use, product, unscaled(rank) if start is None else aligned(start, rank))


@rule("matmul", "mm", "_sparse_mm", "bmm", "mv", "dot", "vdot", "inner")
def matmul(use: Use) -> Result:
    """Products of matrices and vectors: the products of the entries that are summed need one scale."""
    first, second = list(use.args)[:2]
    if use.op == "inner" and len(use.shape(second)) > 1:
        use.pin("is followed for vectors only", unknown=True)
        return None
    return Label.compressed(_product(use, first, second))


def _product(use: Use, first: str, second: str) -> Ids:
    """Ids of the product of two arguments, of which each may be a vector."""
    left, right = use.label(first), use.label(second)
    vectors = [len(use.shape(name)) == 1 for name in (first, second)]
    rank = max(2, len(use.shape(first)), len(use.shape(second)))
    if left is not None and vectors[0]:
        left = Label(left.ids[None])
    if right is not None and vectors[1]:
        right = Label(right.ids[:, None])
    product = _matrix_product(use, left, right, rank)
    return product.squeeze(tuple(axis for axis, vector in zip((-2, -1), vectors, strict=True) if vector))


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
    """Einstein sums: the products of the entries that are summed need one scale."""
    ranks = [len(shape_of(tensor)) for tensor in use.args["tensors"]]
    indices, result = einsum_indices(str(use.args["equation"]), ranks)
    if any(len(set(names)) < len(names) for names in indices):
        use.pin("is followed for equations without repeated indices only", unknown=True)
        return None
    labels = [use.label_of(tensor) for tensor in use.args["tensors"]]
    factors = [(names, label.ids) for names, label in zip(indices, labels, strict=True) if label is not None]
    every = list(dict.fromkeys(name for names, _ in factors for name in names))
    summed = [name for name in every if name not in result]
    spread = [_spread(ids, names, every) for names, ids in factors]
    if np.prod(np.broadcast_shapes(*(ids.shape for ids in spread))) > _LARGEST_PRODUCT:
        spread = [use.merge(ids, [every.index(name) for name in summed]) for ids in spread]
    total = unscaled(len(every))
    for ids in spread:
        total = use.scales.sum(total, ids)
    kept = use.merge(total, [every.index(name) for name in summed])
    kept = kept.squeeze(tuple(every.index(name) for name in summed))
    return Label.compressed(_spread(kept, [name for name in every if name in result], result))


def _spread(ids: Ids, names: Sequence[str], every: Sequence[str]) -> Ids:
    """Ids with one axis for each index of a list, of size 1 where the tensor does not have it."""
    order = sorted(range(len(names)), key=lambda axis: every.index(names[axis]))
    sizes = {names[axis]: ids.shape[axis] for axis in order}
    return ids.transpose(order).reshape([sizes.get(name, 1) for name in every])


def einsum_indices(equation: str, ranks: Sequence[int]) -> tuple[list[list[str]], list[str]]:
    """The indices of the factors and of the result of an equation, those of an ellipsis numbered from the last.

    Example:
        >>> einsum_indices("...i,ij", [2, 2])
        ([['-1', 'i'], ['i', 'j']], ['-1', 'j'])
    """
    terms, arrow, result = equation.replace(" ", "").partition("->")
    factors = []
    for term, rank in zip(terms.split(","), ranks, strict=True):
        before, dots, after = term.partition("...")
        more = rank - len(before) - len(after) if dots else 0
        factors.append([*before, *(str(-n) for n in range(more, 0, -1)), *after])
    most = max((names for names in factors), key=lambda names: sum(name[0] == "-" for name in names))
    dotted = [name for name in most if name[0] == "-"]
    if not arrow:
        letters = terms.replace(",", "").replace("...", "")
        return factors, dotted + sorted(letter for letter in set(letters) if letters.count(letter) == 1)
    before, dots, after = result.partition("...")
    return factors, [*before, *(dotted if dots else []), *after]


@rule("embedding_bag", "embedding_bag.padding_idx")
def embedding_bag(use: Use) -> Result:
    """Sums, means or maxima of rows: any row may be picked, so all rows need one scale."""
    weight, factors = use.label("weight"), use.label("per_sample_weights")
    if factors is not None:
        use.pin("multiplies rows by what is scaled", factors, unknown=True)
    if weight is None:
        return None
    ids = use.merge(weight.ids, [0], "looks up rows that have different scales")
    return [Label.compressed(ids), *[None] * (len(use.node.meta["val"]) - 1)]


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
        use.pin("feeds products of queries and keys to a softmax", Label(scores), certainty="smooth")
    if value is None:
        return None
    return Label.compressed(use.merge(value.ids, [-2], "averages values that have different scales"))
