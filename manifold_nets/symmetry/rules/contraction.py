"""Linear maps: convolutions, matrix products, embeddings, attention."""

from __future__ import annotations

from typing import Any

import numpy as np

from manifold_nets.symmetry.rules.use import Result, Use, rule
from manifold_nets.symmetry.scales import Ids, Label

__all__: list[str] = []


def _linear_map(use: Use, channel_axis: int, weight_ids: Ids | None, input_ids: Ids | None) -> Result:
    """Combine the scales of the weight's output channels or of the input, then let the bias be scaled along.

    ``weight_ids`` has one id an output channel; ``input_ids`` is the label of the result that the input causes.
    """
    rank = len(use.out_shape)
    source, weight, bias = use.label("input"), use.label("weight"), use.label("bias")
    if source is not None and weight is not None:
        use.pin("multiplies a scaled input by a scaled weight")
        return None
    if weight_ids is not None and weight is not None:
        shape = [1] * rank
        shape[channel_axis] = len(weight_ids)
        result = Label(weight_ids.reshape(shape), weight.degree)
    elif input_ids is not None and source is not None:
        result = Label(input_ids, source.degree)
    else:
        use.pin("adds a scaled bias to something that is not scaled", bias)
        return None
    return _with_bias(use, channel_axis, result)


def _with_bias(use: Use, channel_axis: int, result: Label) -> Result:
    """Require or ask that the bias of a linear map has the scale of the channel that it is added to."""
    if use.args.get("bias") is None:
        return Label.compressed(result.ids, result.degree)
    channels = use.out_shape[channel_axis]
    others = [axis for axis in range(result.ids.ndim) if axis != channel_axis]
    ids = use.merge(result.ids, others, "adds one bias to entries that have different scales")
    per_channel = np.broadcast_to(ids.reshape(-1), (channels,))
    bias = use.label("bias")
    if bias is not None and bias.degree == result.degree:
        use.scales.join(per_channel, np.broadcast_to(bias.ids, (channels,)), use.why("adds a bias of another scale"))
    elif not use.adopt(use.args["bias"], per_channel, result.degree):
        use.pin("adds a bias that cannot be scaled along", result)
        return None
    return Label.compressed(result.ids, result.degree)


def _grouped_input(use: Use, label: Label, channel_axis: int, groups: int) -> Ids:
    """Label that a scaled input gives to the result of a convolution: each group mixes its input channels."""
    spatial = range(channel_axis + 1, label.ids.ndim)
    ids = use.merge(label.ids, list(spatial), "sums over a window whose entries have different scales")
    if ids.shape[channel_axis] == 1:
        return ids
    channels = ids.shape[channel_axis]
    before, after = ids.shape[:channel_axis], ids.shape[channel_axis + 1 :]
    grouped = ids.reshape(*before, groups, channels // groups, *after)
    mixed = use.merge(grouped, [channel_axis + 1], "sums input channels that have different scales")
    per_group = mixed.reshape(*before, groups, *after)
    return np.repeat(per_group, use.out_shape[channel_axis] // groups, channel_axis)


@rule("conv1d", "conv2d", "conv3d", "convolution", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def convolution(use: Use) -> Result:
    """Convolutions, plain and transposed, grouped and depthwise."""
    weight, source, groups = use.label("weight"), use.label("input"), int(use.args["groups"])
    spatial = len(use.shape("weight")) - 2
    channel_axis = len(use.out_shape) - spatial - 1
    transposed = "transpose" in use.op or bool(use.args.get("transposed"))
    weight_ids = None
    if weight is not None and transposed:
        channels_in, per_group, *_ = use.shape("weight")
        ids = weight.along(use.shape("weight"), (0, 1)).reshape(
            groups, channels_in // groups, per_group, *weight.ids.shape[2:]
        )
        weight_ids = use.merge(ids, [1, *range(3, ids.ndim)]).reshape(-1)
    elif weight is not None:
        ids = weight.along(use.shape("weight"), (0,))
        weight_ids = use.merge(ids, range(1, ids.ndim)).reshape(-1)
    input_ids = _grouped_input(use, source, channel_axis, groups) if source is not None and weight is None else None
    return _linear_map(use, channel_axis, weight_ids, input_ids)


@rule("linear")
def linear(use: Use) -> Result:
    """``x Wᵀ + b`` along the last axis."""
    weight, source = use.label("weight"), use.label("input")
    weight_ids = None
    if weight is not None:
        weight_ids = use.merge(weight.along(use.shape("weight"), (0,)), [1]).reshape(-1)
    input_ids = use.merge(source.ids, [-1]) if source is not None and weight is None else None
    return _linear_map(use, len(use.out_shape) - 1, weight_ids, input_ids)


@rule("matmul", "mm", "bmm")
def matmul(use: Use) -> Result:
    """Matrix products in which one factor is scaled."""
    first, second = ("self", "mat2") if "mat2" in use.args else ("self", "other")
    left, right = use.label(first), use.label(second)
    if left is not None and right is not None:
        use.pin("multiplies two scaled tensors")
        return None
    label = left if left is not None else right
    if label is None or len(use.shape(first)) < 2 or len(use.shape(second)) < 2:
        use.pin("is followed for matrices only", unknown=True)
        return None
    ids = use.merge(label.ids, [-1 if left is not None else -2])
    return Label(ids.reshape((1,) * (len(use.out_shape) - ids.ndim) + ids.shape), label.degree)


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
    return Label.compressed(ids.transpose(order).reshape([sizes.get(name, 1) for name in result]), label.degree)


@rule("embedding")
def embedding(use: Use) -> Result:
    """Look up rows: any row may be picked, so all rows need one scale."""
    weight: Any = use.label("weight")
    if weight is None:
        return None
    ids = use.merge(weight.ids, [0], "looks up rows that have different scales")
    return Label(ids.reshape((1,) * (len(use.out_shape) - 1) + ids.shape[1:]), weight.degree)


@rule("scaled_dot_product_attention")
def attention(use: Use) -> Result:
    """Attention is linear in the values; queries and keys pass a softmax."""
    if use.label("query") is not None or use.label("key") is not None:
        use.pin("feeds queries or keys to a softmax", use.label("query"), use.label("key"))
    value = use.label("value")
    if value is None:
        return None
    ids = use.merge(value.ids, [-2], "averages values that have different scales")
    return Label(ids, value.degree)
