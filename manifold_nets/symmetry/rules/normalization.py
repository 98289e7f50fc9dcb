"""Normalizations: they absorb the scale, and mostly the shift, of everything that shares one statistic."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from manifold_nets.symmetry.equations import Ids, Label
from manifold_nets.symmetry.rules.table import Table
from manifold_nets.symmetry.rules.use import Result, Use, unscaled


def table() -> Table:
    """Operation → what it does to a scale, and to a shift."""
    return {
        "batch_norm instance_norm": (per_channel, per_channel),
        "group_norm": (group_norm, group_norm),
        "layer_norm": (per_row, per_row),
        "rms_norm": (per_row, subtracts_no_mean),
        "_weight_norm": (weight_norm, None),
    }


def per_channel(use: Use) -> Result:
    """Batch and instance normalization: one scale per channel; one shift per channel (and sample)."""
    label, kind = use.label("input"), use.op.removesuffix("_norm")
    if label is not None and not use.args.get("training", use.args.get("use_input_stats")):
        does = "subtracts a stored mean, which does" if use.shifts else "normalizes by stored statistics, which do"
        use.refuse(f"{does} not follow the {'shift' if use.shifts else 'scale'} (it is frozen)", label)
    elif label is not None:
        by_sample = use.shifts and kind == "instance"
        ids = _merged(use, label.ids, [axis for axis in range(0 if not by_sample else 1, label.ids.ndim) if axis != 1])
        if not use.shifts:
            ids = np.broadcast_to(ids, (1, use.shape("input")[1], *(1,) * (label.ids.ndim - 2)))
        variance = None if use.shifts else use.args["running_var"]
        use.absorb(kind, ids, running_mean=use.args["running_mean"], running_var=variance)
    return _affine(use, [1])


def group_norm(use: Use) -> Result:
    """Group normalization: one scale, or shift, for all channels of a group."""
    label = use.label("input")
    if label is not None:
        channels, groups = use.shape("input")[1], int(use.args["num_groups"])
        ids = label.along(use.shape("input"), (1,))
        merged = ids.reshape(ids.shape[0], groups, channels // groups, *ids.shape[2:])
        merged = _merged(use, merged, range(2, merged.ndim))
        use.absorb("group", merged if use.shifts else _merged(use, merged, [0]))
    return _affine(use, [1])


def per_row(use: Use) -> Result:
    """Layer and root-mean-square normalization: one scale, or shift, over the normalized axes."""
    label = use.label("input")
    axes = list(range(-len(use.args["normalized_shape"]), 0))
    if label is not None:
        use.absorb("layer" if use.op == "layer_norm" else "rms", _merged(use, label.ids, axes))
    return _affine(use, axes)


def subtracts_no_mean(use: Use) -> Result:
    """Root-mean-square normalization sees a shift."""
    return use.refuse("subtracts no mean")


def weight_norm(use: Use) -> Result:
    """``g v/‖v‖``: the scale of the direction is absorbed, that of the length passes."""
    direction = use.label("v")
    if direction is not None:
        dim = use.args.get("dim", 0) % direction.ids.ndim
        axes = [axis for axis in range(direction.ids.ndim) if axis != dim]
        use.absorb("weight", _merged(use, direction.ids, axes))
    return use.label("g")


def _merged(use: Use, ids: Ids, axes: Sequence[int]) -> Ids:
    """Ids of the statistics."""
    if use.shifts:
        return use.merge(ids, axes, "takes one mean over entries that are shifted differently")
    return use.merge(ids, axes, "normalizes by one statistic entries that have different scales")


def _affine(use: Use, axes: Sequence[int]) -> Result:
    """Label of the result: that of the affine scale and shift, which have to agree; none where they are not scaled."""
    does = "multiplies or divides by what is shifted" if use.shifts else "is scaled as part of the stored statistics"
    for name in ("running_mean", "running_var", *(["weight"] if use.shifts else [])):
        if use.label(name) is not None:
            use.refuse(does, use.label(name))
    weight, bias = None if use.shifts else use.label("weight"), use.label("bias")
    if weight is None and bias is None:
        return None
    rank = max(label.ids.ndim for label in (weight, bias) if label is not None)
    ids, other = (unscaled(rank) if label is None else label.ids for label in (weight, bias))
    if use.shifts:
        ids = other
    elif use.args.get("bias") is not None:
        use.scales.join(ids, other, use.why("adds a shift to channels that are scaled otherwise"))
    ids, shape = use.scales.roots(ids), [1] * len(use.out_shape)
    for axis, n in zip(axes, ids.shape, strict=True):
        shape[axis] = n
    return Label.compressed(ids.reshape(shape))
