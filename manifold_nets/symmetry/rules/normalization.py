"""Normalizations: they absorb the scale of everything that shares one statistic."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from manifold_nets.symmetry.rules.use import Result, Use, rule, unscaled
from manifold_nets.symmetry.structure.scales import Label

__all__: list[str] = []

_SHARED = "normalizes by one statistic entries that have different scales"


def _affine(use: Use, axes: Sequence[int]) -> Result:
    """Label of the result: that of the affine scale and shift, which have to agree; none where they are not scaled."""
    weight, bias = use.label("weight"), use.label("bias")
    for name in ("running_mean", "running_var"):
        if use.label(name) is not None:
            use.pin("is scaled as part of the stored statistics", use.label(name))
    if weight is None and bias is None:
        return None
    rank = max(len(label.ids.shape) for label in (weight, bias) if label is not None)
    a, b = (unscaled(rank) if label is None else label.ids for label in (weight, bias))
    if use.args.get("bias") is not None:
        use.scales.join(a, b, use.why("adds a shift to channels that are scaled otherwise"))
    ids = use.scales.roots(a)
    shape = [1] * len(use.out_shape)
    for axis, n in zip(axes, ids.shape, strict=True):
        shape[axis] = n
    return Label.compressed(ids.reshape(shape))


@rule("batch_norm", "instance_norm")
def per_channel(use: Use) -> Result:
    """Batch and instance normalization: one scale a channel."""
    label = use.label("input")
    if label is not None:
        if not use.args.get("training", use.args.get("use_input_stats")):
            use.pin("normalizes by stored statistics, which do not follow the scale (it is frozen)", label)
            return _affine(use, [1])
        ids = use.merge(label.ids, [axis for axis in range(label.ids.ndim) if axis != 1], _SHARED)
        channels = (1, use.shape("input")[1], *(1,) * (label.ids.ndim - 2))
        use.absorb(
            "batch" if use.op == "batch_norm" else "instance",
            np.broadcast_to(ids, channels),
            running_mean=use.args["running_mean"],
            running_var=use.args["running_var"],
        )
    return _affine(use, [1])


@rule("group_norm")
def group_norm(use: Use) -> Result:
    """Group normalization: one scale for all channels of a group."""
    label = use.label("input")
    if label is not None:
        batch, channels, *spatial = use.shape("input")
        groups = int(use.args["num_groups"])
        ids = label.along((batch, channels, *spatial), (1,))
        grouped = ids.reshape(ids.shape[0], groups, channels // groups, *ids.shape[2:])
        merged = use.merge(grouped, range(2, grouped.ndim), _SHARED)
        use.absorb("group", use.merge(merged, [0], _SHARED))
    return _affine(use, [1])


@rule("layer_norm", "rms_norm")
def per_row(use: Use) -> Result:
    """Layer and root-mean-square normalization: one scale over the normalized axes."""
    label = use.label("input")
    axes = list(range(-len(use.args["normalized_shape"]), 0))
    if label is not None:
        use.absorb("layer" if use.op == "layer_norm" else "rms", use.merge(label.ids, axes, _SHARED))
    return _affine(use, axes)


@rule("_weight_norm")
def weight_norm(use: Use) -> Result:
    """``g v/‖v‖``: the scale of the direction is absorbed, that of the length passes."""
    direction, length = use.label("v"), use.label("g")
    dim = use.args.get("dim", 0)
    if direction is not None:
        axes = [axis for axis in range(direction.ids.ndim) if axis != dim % direction.ids.ndim]
        use.absorb("weight", use.merge(direction.ids, axes, _SHARED))
    return length
