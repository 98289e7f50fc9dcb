"""Normalizations: they absorb the scale of everything that shares one statistic."""

from __future__ import annotations

import numpy as np

from manifold_nets.symmetry.rules.use import Result, Use, rule
from manifold_nets.symmetry.scales import Label

__all__: list[str] = []

_SHARED = "normalizes by one statistic entries that have different scales"


def _absorbable(use: Use) -> Label | None:
    """Label of the normalized tensor; scaled affine parameters or statistics are refused."""
    for name in ("weight", "bias", "running_mean", "running_var"):
        use.pin("is scaled as part of the normalization itself", use.label(name)) if use.label(name) else None
    return use.label("input")


@rule("batch_norm", "instance_norm")
def per_channel(use: Use) -> Result:
    """Batch and instance normalization: one scale a channel."""
    label = _absorbable(use)
    if label is None:
        return None
    if not use.args.get("training", use.args.get("use_input_stats")):
        use.pin("normalizes by stored statistics, which do not follow the scale (it is frozen)", label)
        return None
    axes = [axis for axis in range(label.ids.ndim) if axis != 1]
    ids = use.merge(label.ids, axes, _SHARED)
    kind = "batch" if use.op == "batch_norm" else "instance"
    channels = (1, use.shape("input")[1], *(1,) * (label.ids.ndim - 2))
    use.absorb(
        kind, label, np.broadcast_to(ids, channels),
        running_mean=use.args["running_mean"], running_var=use.args["running_var"],
    )  # fmt: skip
    return None


@rule("group_norm")
def group_norm(use: Use) -> Result:
    """Group normalization: one scale for all channels of a group."""
    label = _absorbable(use)
    if label is None:
        return None
    batch, channels, *spatial = use.shape("input")
    groups = int(use.args["num_groups"])
    ids = label.along((batch, channels, *spatial), (1,))
    grouped = ids.reshape(ids.shape[0], groups, channels // groups, *ids.shape[2:])
    merged = use.merge(grouped, range(2, grouped.ndim), _SHARED)
    use.absorb("group", label, use.merge(merged, [0], _SHARED))
    return None


@rule("layer_norm", "rms_norm")
def per_row(use: Use) -> Result:
    """Layer and root-mean-square normalization: one scale over the normalized axes."""
    label = _absorbable(use)
    if label is None:
        return None
    axes = range(-len(use.args["normalized_shape"]), 0)
    use.absorb("layer" if use.op == "layer_norm" else "rms", label, use.merge(label.ids, list(axes), _SHARED))
    return None


@rule("_weight_norm")
def weight_norm(use: Use) -> Result:
    """``g v/‖v‖``: the scale of the direction is absorbed, that of the length passes."""
    direction, length = use.label("v"), use.label("g")
    dim = use.args.get("dim", 0)
    if direction is not None:
        axes = [axis for axis in range(direction.ids.ndim) if axis != dim % direction.ids.ndim]
        use.absorb("weight", direction, use.merge(direction.ids, axes, _SHARED))
    return length
