"""How a shift, a constant that is added to entries of a tensor, passes the operations that do not mix channels.

See `manifold_nets.symmetry.rules` for what the labels mean.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from torch.fx import Node

from manifold_nets.symmetry.graph import bound_arguments, op_name
from manifold_nets.symmetry.rules.elementwise import LARGER_OF_TWO, SHAPE_ONLY
from manifold_nets.symmetry.rules.shift_use import ShiftUse, first_label, reduced_axes, shift_rule, varies
from manifold_nets.symmetry.rules.use import Result, aligned, shape_of, unscaled
from manifold_nets.symmetry.structure.scales import UNSCALED, Label

__all__: list[str] = []

# What is filled in below this vanishes in a softmax, shifted or not.
_MASKED = -1e30
_PASSED = (
    "alias clone contiguous detach lift_fresh_copy _to_copy to.device to.dtype to.other to.dtype_layout to.prim_Device "
    "to.prim_dtype to.prim_other type_as positive"
).split()


@shift_rule(*_PASSED)
def passed(use: ShiftUse) -> Result:
    """Copies and casts."""
    return first_label(use)


@shift_rule("copy", "fill.Tensor")
def written(use: ShiftUse) -> Result:
    """What is written over a tensor brings its own shift."""
    label = use.label("src" if use.op == "copy" else "value")
    return None if label is None else Label(aligned(label, len(use.out_shape)))


@shift_rule(*SHAPE_ONLY, "zero", "fill.Scalar")
def shape_only(use: ShiftUse) -> Result:
    """Results that do not depend on the entries, and numbers that are written over them."""
    return None


@shift_rule("dropout", "native_dropout", "feature_dropout", "alpha_dropout")
def dropout(use: ShiftUse) -> Result:
    """Dropout scales entries at random, unless its probability is 0."""
    if use.inactive(use.graph.module_of(use.node)) and not use.args.get("p"):
        return first_label(use)
    use.pin("drops entries at random")
    return None


@shift_rule("neg", "negative")
def negate(use: ShiftUse) -> Result:
    """The opposite."""
    label = first_label(use)
    return None if label is None else Label(use.scales.times(label.ids, -1.0))


@shift_rule("add.Tensor", "add.Scalar", "sub.Tensor", "sub.Scalar", "rsub.Tensor", "rsub.Scalar", "subtract.Tensor",
            "subtract.Scalar")  # fmt: skip
def add(use: ShiftUse) -> Result:
    """Sums and differences: shifts add; what cancels is absorbed."""
    rank = len(use.out_shape)
    left, right = use.label("self"), use.label("other")
    a = unscaled(rank) if left is None else aligned(left, rank)
    b = unscaled(rank) if right is None else aligned(right, rank)
    factor = float(use.args.get("alpha", 1) or 0) * (1.0 if use.op == "add" else -1.0)
    if use.op == "rsub":
        a, factor = use.scales.times(a, -1.0), -factor
    total = use.scales.sum(a, b, factor)
    if left is not None and right is not None:
        start = np.broadcast_to(use.scales.roots(a), total.shape)
        if ((total == UNSCALED) & (start != UNSCALED)).any():
            use.absorb("difference", np.where(total == UNSCALED, start, UNSCALED))
    return Label.compressed(total)


@shift_rule("mul.Tensor", "mul.Scalar", "multiply.Tensor", "multiply.Scalar", "div.Tensor", "div.Scalar",
            "div.Tensor_mode", "div.Scalar_mode", "divide.Tensor", "divide.Scalar", "divide.Tensor_mode",
            "divide.Scalar_mode", "true_divide.Tensor", "true_divide.Scalar")  # fmt: skip
def multiply(use: ShiftUse) -> Result:
    """Products with a number multiply the shift; products with a tensor make something unknown of it."""
    left, right = use.label("self"), use.label("other")
    if (left is not None and right is not None) or use.args.get("rounding_mode") or ("div" in use.op and left is None):
        use.pin("multiplies or divides shifted tensors")
        return None
    label = left if left is not None else right
    if label is None:
        return None
    other = use.args["other" if left is not None else "self"]
    if isinstance(other, (int, float)):
        factor = 1.0 / float(other) if "div" in use.op else float(other)
        return Label.compressed(use.scales.times(label.ids, factor)) if factor else None
    rank = len(use.out_shape)
    ids, shape = aligned(label, rank), shape_of(other)
    padded = (1,) * (rank - len(shape)) + shape
    return use.fresh(ids, np.broadcast_shapes(ids.shape, padded), "multiplies with a tensor", ids)


@shift_rule("masked_fill.Scalar", "masked_fill.Tensor")
def masked(use: ShiftUse) -> Result:
    """Masks in front of a softmax; other values are not shifted with the rest."""
    if _is_mask(use.args.get("value")):
        return use.label("self")
    use.pin("fills in something that is not shifted with it")
    return None


@shift_rule("where.self", "where.ScalarOther", "where.ScalarSelf", "where.Scalar")
def chosen(use: ShiftUse) -> Result:
    """One tensor where a condition holds and another elsewhere: both shifted alike, or one of them a mask."""
    rank = len(use.out_shape)
    sides = [None if (label := use.label(name)) is None else aligned(label, rank) for name in ("self", "other")]
    for ids, other in zip(sides, ("other", "self"), strict=True):
        if ids is not None and _is_mask(use.args[other]):
            return Label.compressed(ids)
    left, right = (unscaled(rank) if ids is None else ids for ids in sides)
    use.scales.join(left, right, use.why("chooses between entries that are shifted differently"))
    return Label.compressed(use.scales.roots(np.broadcast_arrays(left, right)[0]))


def _is_mask(value: Any) -> bool:
    """Whether a number, or a tensor filled with it, vanishes in a softmax."""
    if isinstance(value, Node) and op_name(value) in ("full", "full_like", "scalar_tensor"):
        given = bound_arguments(value)
        value = given.get("fill_value", given.get("s"))
    return isinstance(value, (int, float)) and value <= _MASKED


@shift_rule("pad", "constant_pad_nd", "reflection_pad1d", "reflection_pad2d", "reflection_pad3d", "replication_pad1d",
            "replication_pad2d", "replication_pad3d")  # fmt: skip
def pad(use: ShiftUse) -> Result:
    """Padding with entries of the tensor itself passes what is constant; constants that are filled in do not move."""
    label = first_label(use)
    if label is None:
        return None
    amounts = list(use.args["pad" if "pad" in use.args else "padding"])
    rank = label.ids.ndim
    # The last axis comes first.
    sides = {rank - 1 - k: (amounts[2 * k], amounts[2 * k + 1]) for k in range(len(amounts) // 2)}
    padded = [axis for axis, amount in sides.items() if any(amount)]
    if use.op in ("pad", "constant_pad_nd") and (use.args.get("mode") or "constant") == "constant":
        ids = label.along(use.shape("self"), padded)
        cut = tuple(slice(max(0, -sides[a][0]) if a in padded else 0, None) for a in range(rank))
        ids = ids[cut]
        ends = tuple(slice(0, ids.shape[a] - max(0, -sides[a][1]) if a in padded else None) for a in range(rank))
        widths = [tuple(max(0, n) for n in sides[a]) if a in padded else (0, 0) for a in range(rank)]
        return Label.compressed(np.pad(ids[ends], widths, constant_values=UNSCALED))
    if varies(label, padded):
        use.pin("pads with entries that are not shifted alike")
        return None
    return label


def _window(use: ShiftUse) -> tuple[Label | None, list[int]]:
    label = first_label(use)
    count = int(next(c for c in use.op if c.isdigit()))
    return label, [] if label is None else list(range(label.ids.ndim - count, label.ids.ndim))


@shift_rule("max_pool1d", "max_pool2d", "max_pool3d", "adaptive_max_pool1d", "adaptive_max_pool2d",
            "adaptive_max_pool3d", "max_pool2d_with_indices", "max_pool3d_with_indices")  # fmt: skip
def max_pool(use: ShiftUse) -> Result:
    """Largest entries: one shift a channel."""
    label, axes = _window(use)
    if label is None:
        return None
    merged = Label.compressed(use.merge(label.ids, axes, "compares entries that are shifted differently"))
    return [merged, None] if isinstance(use.node.meta.get("val"), (tuple, list)) else merged


@shift_rule("avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d",
            "adaptive_avg_pool3d", "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d",
            "upsample_linear1d", "upsample_bilinear2d", "upsample_trilinear3d", "upsample_bicubic2d",
            "_upsample_nearest_exact1d", "_upsample_nearest_exact2d", "upsample_nearest1d.vec",
            "upsample_nearest2d.vec", "upsample_nearest3d.vec", "upsample_linear1d.vec", "upsample_bilinear2d.vec",
            "upsample_trilinear3d.vec", "upsample_bicubic2d.vec", "_upsample_nearest_exact1d.vec",
            "_upsample_nearest_exact2d.vec")  # fmt: skip
def average(use: ShiftUse) -> Result:
    """Weighted means pass what is constant over the window; zeros of the padding are not shifted."""
    label, axes = _window(use)
    if label is None:
        return None
    padding = use.args.get("padding") or 0
    padded = any(padding) if isinstance(padding, (list, tuple)) else bool(padding)
    counted = (padded and use.args.get("count_include_pad", True)) or use.args.get("divisor_override")
    if not counted and not varies(label, axes):
        return label
    shape = (*label.ids.shape[: axes[0]], *use.out_shape[axes[0] :])
    mask = None if varies(label, axes) else label.ids
    return use.fresh(label.ids, shape, "averages entries that are shifted differently", mask)


@shift_rule("mean", "mean.dim", "sum", "sum.dim_IntList")
def mean(use: ShiftUse) -> Result:
    """Means and sums."""
    label = first_label(use)
    if label is None:
        return None
    axes = reduced_axes(use, label.ids.ndim)
    ids = label.ids
    if varies(label, axes):
        if use.is_linked(ids):
            shape = [1 if axis in axes else n for axis, n in enumerate(ids.shape)]
            made = use.fresh(ids, shape, "averages entries that are shifted differently")
            ids = made.ids if isinstance(made, Label) else np.zeros(shape, dtype=np.int64)
        else:
            ids = use.merge(ids, axes, "averages entries that are shifted differently")
    if use.op == "sum":
        shape_before = shape_of(next(iter(use.args.values())))
        ids = use.scales.times(ids, float(np.prod([shape_before[axis] for axis in axes])))
    return Label.compressed(ids if use.args.get("keepdim") else np.squeeze(ids, tuple(axes)))


@shift_rule("amax", "amin", "logsumexp", "max", "max.dim", "min", "min.dim", "median", "median.dim")
def extremum(use: ShiftUse) -> Result:
    """Extrema and log-sum-exp move with a shift that is constant over their axes."""
    label = first_label(use)
    if label is None:
        return None
    axes = reduced_axes(use, label.ids.ndim)
    ids = use.merge(label.ids, axes, "compares entries that are shifted differently")
    result = Label.compressed(ids if use.args.get("keepdim") else np.squeeze(ids, tuple(axes)))
    return [result, None] if isinstance(use.node.meta.get("val"), (tuple, list)) else result


@shift_rule(*LARGER_OF_TWO)
def larger_of_two(use: ShiftUse) -> Result:
    """The larger or smaller of two entries moves with both, where they are shifted alike."""
    rank = len(use.out_shape)
    left, right = (unscaled(rank) if (x := use.label(name)) is None else aligned(x, rank) for name in ("self", "other"))
    left, right = np.broadcast_arrays(left, right)
    use.scales.join(left, right, use.why("compares entries that are shifted differently"))
    return Label.compressed(use.scales.roots(left))
