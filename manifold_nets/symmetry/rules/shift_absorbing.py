"""What absorbs a shift, and what linear maps make of it.

See `manifold_nets.symmetry.rules` for what the labels mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from manifold_nets.symmetry.rules.contraction import einsum_indices
from manifold_nets.symmetry.rules.shift_use import (
    LARGEST_LINK,
    ShiftUse,
    first_label,
    reduced_axes,
    shift_rule,
)
from manifold_nets.symmetry.rules.use import Result, aligned, shape_of, unscaled
from manifold_nets.symmetry.structure.scales import Ids, Label

__all__: list[str] = []

_SHARED = "takes one mean over entries that are shifted differently"


@shift_rule("var", "var.dim", "var.correction", "std", "std.dim", "std.correction")
def spread(use: ShiftUse) -> Result:
    """Variances do not see a shift of everything that they run over."""
    label = first_label(use)
    if label is not None:
        use.merge(label.ids, reduced_axes(use, label.ids.ndim), _SHARED)
    return None


@shift_rule("var_mean", "var_mean.dim", "var_mean.correction", "std_mean", "std_mean.dim", "std_mean.correction")
def spread_and_mean(use: ShiftUse) -> Result:
    """The mean moves with a shift of everything that it runs over, the variance does not see it."""
    label = first_label(use)
    if label is None:
        return None
    axes = reduced_axes(use, label.ids.ndim)
    ids = use.merge(label.ids, axes, _SHARED)
    return [None, Label.compressed(ids if use.args.get("keepdim") else np.squeeze(ids, tuple(axes)))]


@shift_rule("softmax.int", "log_softmax.int", "_softmax", "_log_softmax")
def softmax(use: ShiftUse) -> Result:
    """A softmax does not see a shift that is constant along its axis."""
    label = first_label(use)
    if label is not None:
        merged = use.merge(label.ids, [int(use.args["dim"])], "compares entries that are shifted differently")
        use.absorb("softmax", merged)
    return None


def _affine(use: ShiftUse, axes: Sequence[int]) -> Result:
    """Label of the result of a normalization: that of its own shift."""
    for name in ("weight", "running_mean", "running_var"):
        if use.label(name) is not None:
            use.pin("multiplies or divides by what is shifted", use.label(name))
    bias = use.label("bias")
    if bias is None:
        return None
    shape = [1] * len(use.out_shape)
    for axis, n in zip(axes, bias.ids.shape, strict=True):
        shape[axis] = n
    return Label.compressed(bias.ids.reshape(shape))


@shift_rule("batch_norm", "instance_norm")
def per_channel(use: ShiftUse) -> Result:
    """Batch and instance normalization: one shift a channel (and a sample)."""
    label = use.label("input")
    if label is not None and not use.args.get("training", use.args.get("use_input_stats")):
        use.pin("subtracts a stored mean, which does not follow the shift (it is frozen)", label)
    elif label is not None:
        batch = use.op == "batch_norm"
        axes = [axis for axis in range(label.ids.ndim) if axis > 1 or (axis == 0 and batch)]
        ids = use.merge(label.ids, axes, _SHARED)
        use.absorb("batch" if batch else "instance", ids, running_mean=use.args["running_mean"])
    return _affine(use, [1])


@shift_rule("group_norm")
def group_norm(use: ShiftUse) -> Result:
    """Group normalization: one shift for the channels and positions of a group."""
    label = use.label("input")
    if label is not None:
        channels, groups = use.shape("input")[1], int(use.args["num_groups"])
        ids = label.along(use.shape("input"), (1,))
        grouped = ids.reshape(ids.shape[0], groups, channels // groups, *ids.shape[2:])
        use.absorb("group", use.merge(grouped, range(2, grouped.ndim), _SHARED))
    return _affine(use, [1])


@shift_rule("layer_norm")
def layer_norm(use: ShiftUse) -> Result:
    """Layer normalization: one shift over the normalized axes, which may differ from row to row."""
    label = use.label("input")
    axes = list(range(-len(use.args["normalized_shape"]), 0))
    if label is not None:
        use.absorb("layer", use.merge(label.ids, axes, _SHARED))
    return _affine(use, axes)


@shift_rule("rms_norm")
def rms_norm(use: ShiftUse) -> Result:
    """Root-mean-square normalization subtracts no mean."""
    use.pin("subtracts no mean")
    return None


# ---- linear maps -------------------------------------------------------------------------------------------------


@shift_rule("conv1d", "conv1d.padding", "conv2d", "conv2d.padding", "conv3d", "conv3d.padding", "convolution",
            "conv_transpose1d", "conv_transpose2d.input", "conv_transpose3d.input", "linear")  # fmt: skip
def linear_map(use: ShiftUse) -> Result:
    """Convolutions and linear layers: the bias shifts its channel; a shift of the input or of the rows is linked."""
    rank = len(use.out_shape)
    spatial = 0 if use.op == "linear" else len(use.shape("weight")) - 2
    channel = rank - spatial - 1
    source, weight, blocks = use.label("input"), use.label("weight"), use.rows.get(use.args["weight"])
    ids = unscaled(rank)
    if weight is not None and (source is not None or blocks is None):
        use.pin("multiplies with what is shifted", weight, source)
        return None
    made: Result = None
    if weight is not None and blocks is not None:
        made = _rows(use, weight, blocks, channel)
    elif source is not None:
        lead = list(source.ids.shape[:channel])
        # What is constant along an axis stays so, but at borders that are padded.
        tail = [
            1 if have == 1 and not padded else n
            for have, n, padded in zip(
                source.ids.shape[channel + 1 :], use.out_shape[channel + 1 :], _pads(use, spatial), strict=True
            )
        ]
        made = use.fresh(source.ids, [*lead, use.out_shape[channel], *tail], "maps the shift linearly")
    if isinstance(made, Label):
        ids = made.ids
    bias = use.label("bias")
    if bias is not None:
        shape = [1] * rank
        shape[channel] = bias.ids.shape[0]
        ids = use.scales.sum(ids, bias.ids.reshape(shape))
    return Label.compressed(ids)


def _rows(use: ShiftUse, weight: Label, blocks: int, channel: int) -> Label:
    """Every channel of a block gets v·x, which differs from position to position and from block to block."""
    shape = [1 if axis == channel else n for axis, n in enumerate(use.out_shape)]
    numbers = np.broadcast_to(weight.ids.reshape(-1), (blocks,))
    parts = []
    for number in numbers.tolist():
        made = use.fresh(np.array(number), shape, "makes one shift a position of a row that is added to filters")
        parts.append(made.ids if isinstance(made, Label) else np.zeros(shape, dtype=np.int64))
    ids = np.concatenate(parts, channel)
    return Label(ids if blocks == 1 else np.repeat(ids, use.out_shape[channel] // blocks, channel))


def _pads(use: ShiftUse, spatial: int) -> list[bool]:
    """For each axis of space whether positions at its border see fewer shifted entries than those inside."""
    if "transpose" in use.op or use.args.get("transposed"):
        return [True] * spatial
    padding = use.args.get("padding", 0)
    if isinstance(padding, str):
        return [padding == "same" and size > 1 for size in use.shape("weight")[2:]]
    each = padding if isinstance(padding, (list, tuple)) else [padding] * spatial
    return [bool(amount) for amount in (each if len(each) == spatial else list(each) * spatial)]


@shift_rule("embedding")
def embedding(use: ShiftUse) -> Result:
    """Looked-up rows: a constant added to all of a row shifts the result at every place where it is looked up."""
    weight = use.label("weight")
    if weight is None:
        return None
    if use.args["weight"] in use.rows:
        return use.fresh(weight.ids, (*use.out_shape[:-1], 1), "looks up shifted rows")
    ids = use.merge(weight.ids, [0], "looks up rows that are shifted differently")
    return Label.compressed(ids.reshape((1,) * (len(use.out_shape) - 1) + ids.shape[1:]))


@shift_rule("matmul", "mm", "bmm")
def matmul(use: ShiftUse) -> Result:
    """Matrix products: a shift of one factor that is the same in all rows (columns) is so in the product."""
    other = "mat2" if "mat2" in use.args else "other"
    left, right = use.label("self"), use.label(other)
    if min(len(use.shape("self")), len(use.shape(other))) < 2:
        use.pin("multiplies shifted tensors")
        return None
    if left is not None and right is not None and int(np.prod(use.out_shape)) > LARGEST_LINK:
        use.pin("makes too many different shifts to follow", left, unknown=True)
        left = None
    # The product of both shifts has the pattern of each of the other terms, whose unknowns are arbitrary.
    total = unscaled(len(use.out_shape))
    for label, axis in ((left, -2), (right, -1)):
        if label is not None:
            shape = list(use.out_shape)
            shape[axis] = label.ids.shape[axis]
            made = use.fresh(label.ids, shape, "multiplies with a tensor")
            total = total if made is None else use.scales.sum(total, made.ids)  # type: ignore[union-attr]
    return Label.compressed(total)


@shift_rule("einsum")
def einsum(use: ShiftUse) -> Result:
    """Einstein sums: a shift stays constant along the indices that only its own factor has."""
    indices, result = einsum_indices(str(use.args["equation"]), [len(shape_of(t)) for t in use.args["tensors"]])
    labels = [use.label_of(tensor) for tensor in use.args["tensors"]]
    if any(len(set(names)) < len(names) for names in indices):
        use.pin("is followed for equations without repeated indices only", unknown=True)
        return None
    rank, total = len(result), unscaled(len(result))
    for place, (names, label) in enumerate(zip(indices, labels, strict=True)):
        if label is None:
            continue
        others = [name for factor in (indices[:place] + indices[place + 1 :]) for name in factor]
        have = dict(zip(names, label.ids.shape, strict=True))
        shape = [
            have[name] if name in have and name not in others else n
            for name, n in zip(result, use.out_shape, strict=True)
        ]
        # The product of several shifts has the pattern of these, whose unknowns are arbitrary.
        made = use.fresh(label.ids, shape, "multiplies with a tensor")
        if isinstance(made, Label):
            total = use.scales.sum(total, aligned(made, rank))
    return Label.compressed(total)


@shift_rule("addmm", "baddbmm")
def addmm(use: ShiftUse) -> Result:
    """A matrix product that is added to a bias."""
    first, second = ("mat1", "mat2") if use.op == "addmm" else ("batch1", "batch2")
    factors = [float(use.args.get(factor, 1)) for factor in ("alpha", "beta")]
    rank = len(use.out_shape)
    start = use.label("self")
    ids = unscaled(rank) if start is None else use.scales.times(aligned(start, rank), factors[1])
    for name, axis in ((first, -2), (second, -1)):
        label = use.label(name)
        if label is not None and factors[0]:
            shape = list(use.out_shape)
            shape[axis] = label.ids.shape[axis]
            made = use.fresh(label.ids, shape, "multiplies with a tensor")
            ids = ids if made is None else use.scales.sum(ids, made.ids)  # type: ignore[union-attr]
    return Label.compressed(ids)


@shift_rule("scaled_dot_product_attention")
def attention(use: ShiftUse) -> Result:
    """Softmax attention: a shift of all keys is not seen, one of all values passes, one of the queries matters."""
    query, key, value = use.label("query"), use.label("key"), use.label("value")
    if query is not None and use.shape("key")[-2] == 1:
        use.absorb("softmax", query.ids)  # of one key, whose weight is 1
    elif query is not None:
        use.pin("multiplies queries with keys", query)
    if key is not None:
        use.absorb("softmax", use.merge(key.ids, [-2], "compares keys that are shifted differently"))
    if use.label("attn_mask") is not None:
        use.absorb("softmax", use.merge(_mask(use), [-1], "compares keys that are shifted differently"))
    if value is None:
        return None
    if float(use.args.get("dropout_p") or 0.0) > 0 or not use.inactive(use.graph.module_of(use.node)):
        use.pin("drops attention weights at random, which then do not sum to 1", value)
        return None
    ids = value.ids
    if use.args.get("enable_gqa") and ids.shape[-3] > 1:
        ids = np.repeat(ids, use.out_shape[-3] // ids.shape[-3], -3)
    if ids.shape[-2] == 1:
        return Label.compressed(ids)
    return use.fresh(value.ids, (*ids.shape[:-2], use.out_shape[-2], ids.shape[-1]), "averages values")


def _mask(use: ShiftUse) -> Ids:
    label: Any = use.label("attn_mask")
    return aligned(label, len(use.out_shape))


@shift_rule("cross_entropy_loss")
def cross_entropy(use: ShiftUse) -> Result:
    """The loss does not see a constant added to all logits of an example."""
    label = use.label("self")
    if label is not None:
        use.absorb("loss", use.merge(label.ids, [min(1, label.ids.ndim - 1)], "compares logits shifted differently"))
    if use.label("target") is not None:
        use.pin("has shifted targets", use.label("target"))
    return None
