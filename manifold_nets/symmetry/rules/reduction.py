"""Operations that reduce axes, run over windows, or pick entries by their order: sums, norms, pooling, softmax."""

from __future__ import annotations

import numpy as np

from manifold_nets.symmetry.equations import Label
from manifold_nets.symmetry.rules.arithmetic import scaled_alike
from manifold_nets.symmetry.rules.elementwise import not_homogeneous
from manifold_nets.symmetry.rules.table import Rule, Table, both, of_first
from manifold_nets.symmetry.rules.use import Result, Use, shape_of, varies

_COMPARED = "compares entries that have different scales"
_DIFFERENTLY = "compares entries that are shifted differently"
_AVERAGED = "averages entries that are shifted differently"


def table() -> Table:
    """Operation → what it does to a scale, and to a shift."""
    return {
        "mean mean.dim sum sum.dim_IntList": (reduces(), mean),
        "nansum nanmean": (reduces(), None),
        "std std.dim std.correction": (reduces(), reduces(0.0)),
        "var var.dim var.correction": (reduces(2.0), reduces(0.0)),
        "var_mean var_mean.dim var_mean.correction": (reduces(2.0, 1.0), reduces(0.0, 1.0)),
        "std_mean std_mean.dim std_mean.correction": (reduces(1.0, 1.0), reduces(0.0, 1.0)),
        "norm.Scalar norm.ScalarOpt_dim norm.ScalarOpt_dtype norm.ScalarOpt_dim_dtype linalg_vector_norm linalg_norm "
        "linalg_norm.ord_str linalg_matrix_norm linalg_matrix_norm.str_ord frobenius_norm.dim nuclear_norm "
        "nuclear_norm.dim": (norm, None),
        "prod prod.dim_int": (product, None),
        "amax amin max max.dim min min.dim median median.dim": both(reduces(reason=_COMPARED)),
        "aminmax": (reduces(1.0, 1.0, reason=_COMPARED), None),
        "nanmedian nanmedian.dim kthvalue mode": (reduces(reason=_COMPARED), None),
        "cumsum cummax cummin": (along_axis(), None),
        "sort sort.stable topk msort": (along_axis(reason=_COMPARED), None),
        "argmax argmin argsort argsort.stable": (place, None),
        "logcumsumexp": (not_homogeneous, None),
        "logsumexp": (not_homogeneous, reduces(reason=_COMPARED)),
        "softmax.int log_softmax.int _softmax _log_softmax": (not_homogeneous, softmax),
        "cross_entropy_loss": (not_homogeneous, cross_entropy),
        "cosine_similarity": (cosine_similarity, None),
        "cdist _cdist_forward": (distances, distances_of_shifts),
        "max_pool1d max_pool2d max_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d "
        "max_pool2d_with_indices max_pool3d_with_indices": both(window),
        "max_unpool2d max_unpool3d fractional_max_pool2d": (window, None),
        "avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d "
        "upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_linear1d upsample_bilinear2d "
        "upsample_trilinear3d upsample_bicubic2d _upsample_nearest_exact1d _upsample_nearest_exact2d "
        "upsample_nearest1d.vec upsample_nearest2d.vec upsample_nearest3d.vec upsample_linear1d.vec "
        "upsample_bilinear2d.vec upsample_trilinear3d.vec upsample_bicubic2d.vec _upsample_nearest_exact1d.vec "
        "_upsample_nearest_exact2d.vec": (window, average),
        "grid_sampler grid_sampler_2d grid_sampler_3d": (grid_sampler, average),
    }  # fmt: skip


# ---- axes that are reduced -------------------------------------------------------------------------------------------


def reduces(*powers: float, reason: str = "sums entries that have different scales") -> Rule:
    """A rule of reductions over entries that are scaled alike: the power of the scale of each result.

    Of shifts, what multiplies them: a variance does not see a shift of everything that it runs over.
    """

    @of_first
    def rule(use: Use, label: Label) -> Result:
        ids = use.reduced(label, reason)
        scaled = (ids if power == 1.0 else use.scales.times(ids, power) for power in powers or (1.0,))
        results = [Label.compressed(each) for each in scaled]
        return results if len(results) > 1 else results[0]

    return rule


@of_first
def norm(use: Use, label: Label) -> Result:
    """Norms of vectors and matrices; that of order 0 counts the entries that are not zero."""
    if use.args.get("ord", use.args.get("p")) == 0:
        return use.end(label, reason="counts entries, and hands on no gradient")
    return Label.compressed(use.reduced(label))


@of_first
def product(use: Use, label: Label) -> Result:
    """Products of entries: their exponents add."""
    ids, shape = label.ids, use.shape("self")
    for axis in use.axes(ids.ndim):
        if ids.shape[axis] == 1:
            ids = use.scales.times(ids, float(shape[axis]))
        else:
            first, *others = np.split(ids, ids.shape[axis], axis)
            for other in others:
                first = use.scales.sum(first, other)
            ids = first
    return Label.compressed(use.without(ids, use.axes(ids.ndim)))


@of_first
def mean(use: Use, label: Label) -> Result:
    """Means and sums."""
    axes, ids = use.axes(label.ids.ndim), label.ids
    if varies(label, axes) and use.is_linked(ids):
        ids = use.image(ids, [1 if axis in axes else n for axis, n in enumerate(ids.shape)], _AVERAGED)
    elif varies(label, axes):
        ids = use.merge(ids, axes, _AVERAGED)
    if use.op == "sum":
        shape = shape_of(next(iter(use.args.values())))
        ids = use.scales.times(ids, float(np.prod([shape[axis] for axis in axes])))
    return Label.compressed(use.without(ids, axes))


@of_first
def softmax(use: Use, label: Label) -> Result:
    """A softmax does not see a shift that is constant along its axis."""
    return use.absorb("softmax", use.merge(label.ids, [int(use.args["dim"])], _DIFFERENTLY))


def cross_entropy(use: Use) -> Result:
    """The loss does not see a constant added to all logits of an example."""
    label = use.label("self")
    if label is not None:
        use.absorb("loss", use.merge(label.ids, [min(1, label.ids.ndim - 1)], "compares logits shifted differently"))
    if use.label("target") is not None:
        use.refuse("has shifted targets", use.label("target"))
    return None


# ---- one axis, which stays -------------------------------------------------------------------------------------------


def along_axis(reason: str = "sums entries that have different scales") -> Rule:
    """A rule of running sums and of orders along one axis of entries that are scaled alike."""

    @of_first
    def rule(use: Use, label: Label) -> Result:
        axis = 0 if use.op == "msort" else use.args.get("dim")
        return Label.compressed(use.merge(label.ids, [-1 if axis is None else axis], reason))

    return rule


@of_first
def place(use: Use, label: Label) -> Result:
    """Where the largest of some entries is, or their order: the same at every scale that they share."""
    return use.end(Label(use.merge(label.ids, use.axes(label.ids.ndim), _COMPARED)))


def cosine_similarity(use: Use) -> Result:
    """A product of two vectors of norm 1: each vector may have a scale of its own."""
    for name in ("x1", "x2"):
        if use.label(name) is not None:
            ids = use.ids(name, len(use.out_shape) + 1)
            reason = "normalizes by one norm entries that have different scales"
            use.absorb("quotient", use.merge(ids, [int(use.args["dim"])], reason))
    return None


# ---- distances between all rows of two matrices ----------------------------------------------------------------------


def distances(use: Use) -> Result:
    """Distances are scaled as all rows are; that of order 0 counts the entries that differ."""
    names = [name for name in ("x1", "x2") if use.label(name) is not None]
    merged = {use.args[name]: Label(use.merge(use.ids(name), [-1, -2], _COMPARED)) for name in names}
    otherwise, counts = "compares with something that is not scaled with it", use.args["p"] == 0
    return scaled_alike(use, use.args["x1"], use.args["x2"], otherwise=otherwise, unseen=counts, merged=merged)


def distances_of_shifts(use: Use) -> Result:
    """Distances do not see what is added to all rows of both matrices."""
    left, right = (use.merge(use.ids(name), [-2], _DIFFERENTLY) for name in ("x1", "x2"))
    return use.absorb("difference", use.join(left, right, _DIFFERENTLY))


# ---- windows over the last axes --------------------------------------------------------------------------------------


def _space(use: Use, label: Label) -> list[int]:
    """The axes of space, of which the name of the operation says how many there are."""
    count = next((int(c) for c in use.op if c.isdigit()), label.ids.ndim - 2)
    return list(range(label.ids.ndim - count, label.ids.ndim))


@of_first
def window(use: Use, label: Label) -> Result:
    """Pooling and interpolation: one scale over all windows of a channel."""
    return Label.compressed(use.merge(label.ids, _space(use, label)))


def grid_sampler(use: Use) -> Result:
    """Interpolation at computed places is linear in what is interpolated, not in the places."""
    if use.label("grid") is not None:
        use.refuse("reads entries at places that are scaled", use.label("grid"), certainty="smooth")
    return window(use)


def average(use: Use) -> Result:
    """Weighted means pass what is constant over the window; zeros of the padding are not shifted."""
    first, *others = use.args
    for name in others:
        if use.label(name) is not None:
            use.refuse("reads entries at places that are shifted", use.label(name))
    label = use.label(first)
    if label is None:
        return None
    axes, constant = _space(use, label), not varies(label, _space(use, label))
    if constant and not _counts_zeros(use):
        return label
    shape = (*label.ids.shape[: axes[0]], *use.out_shape[axes[0] :])
    return use.fresh(label.ids, shape, _AVERAGED, label.ids if constant else None)


def _counts_zeros(use: Use) -> bool:
    """Whether zeros beyond the border take part in means, or means are divided by a number of one's own."""
    if use.op.startswith("grid_sampler"):
        return int(use.args["padding_mode"]) == 0
    padding = use.args.get("padding") or 0
    padded = any(padding) if isinstance(padding, (list, tuple)) else bool(padding)
    return bool((padded and use.args.get("count_include_pad", True)) or use.args.get("divisor_override"))
