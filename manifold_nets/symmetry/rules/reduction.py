"""Operations that reduce axes, or pick entries by their order: sums, norms, variances, extrema, sorting."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from manifold_nets.symmetry.rules.use import Result, Use, rule, unscaled
from manifold_nets.symmetry.structure.scales import Ids, Label

__all__: list[str] = []

_COMPARED = "compares entries that have different scales"


def axes_of(use: Use, rank: int) -> list[int]:
    """The axes over which an operation runs: all where none are given."""
    given = use.args.get("dim")
    if given is None or given == []:
        return list(range(rank))
    return [axis % rank for axis in (given if isinstance(given, (list, tuple)) else [given])] if rank else []


def reduced(use: Use, label: Label, reason: str = "sums entries that have different scales") -> Ids:
    """Ids of what is left of a tensor of one scale along the axes that an operation reduces."""
    axes = axes_of(use, label.ids.ndim)
    merged = use.merge(label.ids, axes, reason)
    return merged if use.args.get("keepdim", False) else np.squeeze(merged, tuple(axes))


@rule("mean", "mean.dim", "sum", "sum.dim_IntList", "nansum", "nanmean", "std", "std.dim", "std.correction")
def linear_in_scale(use: Use) -> Result:
    """Reductions that are scaled as the entries are."""
    label = use.label("self")
    return None if label is None else Label.compressed(reduced(use, label))


@rule("norm.Scalar", "norm.ScalarOpt_dim", "norm.ScalarOpt_dtype", "norm.ScalarOpt_dim_dtype", "linalg_vector_norm",
      "linalg_norm", "linalg_norm.ord_str", "linalg_matrix_norm", "linalg_matrix_norm.str_ord", "frobenius_norm.dim",
      "nuclear_norm", "nuclear_norm.dim")  # fmt: skip
def norm(use: Use) -> Result:
    """Norms of vectors and matrices; that of order 0 counts the entries that are not zero."""
    label = use.label("self" if "self" in use.args else "A")
    if label is None:
        return None
    if use.args.get("ord", use.args.get("p")) == 0:
        use.scales.end(label.ids, use.why("counts entries, and hands on no gradient"))
        return None
    return Label.compressed(reduced(use, label))


@rule("var", "var.dim", "var.correction")
def variance(use: Use) -> Result:
    """Variances are scaled by the square."""
    label = use.label("self")
    return None if label is None else Label.compressed(use.scales.times(reduced(use, label), 2.0))


@rule("var_mean", "var_mean.dim", "var_mean.correction", "std_mean", "std_mean.dim", "std_mean.correction")
def spread_and_mean(use: Use) -> Result:
    """A variance or standard deviation, and the mean."""
    label = use.label("self")
    if label is None:
        return None
    ids = reduced(use, label)
    spread = use.scales.times(ids, 2.0) if use.op == "var_mean" else ids
    return [Label.compressed(spread), Label.compressed(ids)]


@rule("cumsum", "logcumsumexp", "cummax", "cummin")
def running(use: Use) -> Result:
    """Running sums and extrema along one axis."""
    label = use.label("self")
    if label is None:
        return None
    if use.op == "logcumsumexp":
        use.pin("is not positively homogeneous", certainty="smooth")
        return None
    found = Label.compressed(use.merge(label.ids, axes_of(use, label.ids.ndim)))
    return [found, None] if use.op != "cumsum" else found


@rule("amax", "amin", "aminmax", "max", "min", "max.dim", "min.dim", "median", "median.dim", "nanmedian",
      "nanmedian.dim", "kthvalue", "mode")  # fmt: skip
def picked(use: Use) -> Result:
    """The largest, smallest or middle of entries that are scaled alike, and where it is."""
    label = use.label("self")
    if label is None:
        return None
    if use.op in ("kthvalue", "mode"):
        use.args["dim"] = -1 if use.args["dim"] is None else use.args["dim"]
    found = Label.compressed(reduced(use, label, _COMPARED))
    if use.op == "aminmax":
        return [found, found]
    return [found, None] if isinstance(use.node.meta.get("val"), (tuple, list)) else found


@rule("sort", "sort.stable", "topk", "msort")
def ordered(use: Use) -> Result:
    """Entries of one axis, scaled alike, in their order, and where they are."""
    label = use.label("self")
    if label is None:
        return None
    axis = 0 if use.op == "msort" else use.args.get("dim")
    found = Label.compressed(use.merge(label.ids, [-1 if axis is None else axis], _COMPARED))
    return found if use.op == "msort" else [found, None]


@rule("argmax", "argmin", "argsort", "argsort.stable")
def where_picked(use: Use) -> Result:
    """Where the largest of some entries is, or their order: the same at every scale that they share."""
    label = use.label("self")
    if label is None:
        return None
    axes: Sequence[int] = axes_of(use, label.ids.ndim)
    use.scales.end(use.merge(label.ids, axes, _COMPARED), use.why("does not see its scale, and hands on no gradient"))
    return None


@rule("cosine_similarity")
def cosine_similarity(use: Use) -> Result:
    """A product of two vectors of norm 1: each vector may have a scale of its own."""
    rank = len(use.out_shape) + 1
    for name in ("x1", "x2"):
        label = use.label(name)
        if label is not None:
            ids = np.broadcast_to(label.ids, label.ids.shape).reshape((1,) * (rank - label.ids.ndim) + label.ids.shape)
            merged = use.merge(ids, [int(use.args["dim"])], "normalizes by one norm entries that have different scales")
            use.absorb("quotient", np.broadcast_to(merged, np.broadcast_shapes(merged.shape, unscaled(rank).shape)))
    return None
