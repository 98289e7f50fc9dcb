"""Operations entry by entry: which let a positive scale through, and which do not."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch.fx import Node

from manifold_nets.symmetry.rules.use import RULES, Result, Use, aligned, rule, shape_of, unscaled
from manifold_nets.symmetry.structure.scales import UNSCALED, Ids, Label

__all__ = ["LARGEST_EPS", "alike"]

# A constant up to this size that is added under a normalization is its eps.
LARGEST_EPS = 1e-3

HOMOGENEOUS = (
    "relu leaky_relu prelu rrelu rrelu_with_noise abs absolute neg negative dropout feature_dropout alias clone "
    "contiguous detach lift_fresh_copy positive native_dropout conj _conj resolve_conj resolve_neg real imag tril triu "
    "max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d "
    "adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d "
    "max_pool2d_with_indices max_pool3d_with_indices max_unpool2d max_unpool3d fractional_max_pool2d "
    "upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_bilinear2d upsample_linear1d "
    "upsample_trilinear3d upsample_bicubic2d _upsample_nearest_exact1d _upsample_nearest_exact2d "
    "upsample_nearest1d.vec upsample_nearest2d.vec upsample_nearest3d.vec upsample_bilinear2d.vec "
    "upsample_linear1d.vec upsample_trilinear3d.vec upsample_bicubic2d.vec _upsample_nearest_exact1d.vec "
    "_upsample_nearest_exact2d.vec"
).split()
_SPATIAL = ("pool", "upsample")

CASTS = (
    "_to_copy to.device to.dtype to.other to.dtype_layout to.prim_Device to.prim_dtype to.prim_other type_as"
).split()  # fmt: skip

# Smooth functions, whose derivative shows that they are not homogeneous.
NOT_HOMOGENEOUS = (
    "sigmoid tanh gelu silu mish softplus log_sigmoid exp log log1p expm1 sin cos erf softmax.int log_softmax.int "
    "_softmax _log_softmax lstm.input lstm.data gru.input gru.data rnn_tanh.input rnn_tanh.data glu cross_entropy_loss "
    "nll_loss nll_loss_nd atan asin logsumexp pow.Scalar pow.Tensor_Tensor"
).split()

# Functions made of pieces, and jumps: between them the derivative may be that of a homogeneous function.
JUMPS = (
    "hardswish hardsigmoid hardtanh relu6 elu selu celu hardshrink softshrink round round.decimals floor "
    "ceil trunc fix frac bernoulli bernoulli.p bernoulli.Tensor alpha_dropout feature_alpha_dropout floor_divide "
    "floor_divide.Scalar remainder.Tensor remainder.Scalar remainder.Scalar_Tensor fmod.Tensor fmod.Scalar isclose"
).split()

# Results that depend on the shape and the dtype only.
SHAPE_ONLY = (
    "zeros_like ones_like empty_like new_zeros new_ones new_empty full_like new_full rand_like rand_like.generator "
    "randn_like randn_like.generator sym_size sym_size.int sym_numel _assert_tensor_metadata"
).split()
# Results that a positive scale of each entry does not change.
SIGNS = (
    "sign sgn signbit isnan isinf isfinite logical_not logical_and logical_or logical_xor count_nonzero "
    "count_nonzero.dim_IntList"
).split()
COMPARISONS = [
    f"{name}.{overload}"
    for name in "gt ge lt le eq ne greater greater_equal less less_equal not_equal".split()
    for overload in ("Scalar", "Tensor")
]
LARGER_OF_TWO = "maximum minimum fmax fmin max.other min.other".split()

_UNSEEN = "does not see its scale, and hands on no gradient"


def homogeneous(use: Use) -> Result:
    """Pass the label of the first tensor; one label over each window of pooling and interpolation."""
    first, *options = use.args
    label = use.label(first)
    for option in options:
        if use.label(option) is not None:
            use.pin("takes a scaled tensor as an option", use.label(option))
    if label is None:
        return None
    if any(word in use.op for word in _SPATIAL):
        window = int(next(c for c in use.op if c.isdigit()))
        merged = use.merge(label.ids, range(-window, 0))
        label = Label.compressed(merged)
    several = isinstance(use.node.meta.get("val"), (tuple, list))
    return [label, *[None] * (len(use.node.meta["val"]) - 1)] if several else label


def cast(use: Use) -> Result:
    """Pass the label of a tensor that is cast to another dtype; a truth value says which entries are not zero."""
    label = use.label("self")
    if label is not None and use.node.meta["val"].dtype == torch.bool:
        use.scales.end(label.ids, use.why(_UNSEEN))
        return None
    return label


def not_homogeneous(use: Use) -> Result:
    """Refuse every scale."""
    use.pin("is not positively homogeneous", certainty="smooth")
    return None


def jumps(use: Use) -> Result:
    """Refuse every scale, of which a derivative may see nothing."""
    use.pin("is not positively homogeneous", certainty="jump")
    return None


def shape_only(use: Use) -> Result:
    """Drop the label: the result does not depend on the entries."""
    return None


def sign(use: Use) -> Result:
    """Drop the label: the result does not depend on a positive scale."""
    for node in use.node.all_input_nodes:
        label = use.label_of(node)
        if label is not None:
            use.scales.end(label.ids, use.why(_UNSEEN))
    return None


RULES.update(dict.fromkeys(HOMOGENEOUS, homogeneous))
RULES.update(dict.fromkeys(CASTS, cast))
RULES.update(dict.fromkeys(NOT_HOMOGENEOUS, not_homogeneous))
RULES.update(dict.fromkeys(JUMPS, jumps))
RULES.update(dict.fromkeys(SHAPE_ONLY, shape_only))
RULES.update(dict.fromkeys(SIGNS, sign))


# ---- several tensors that have to be scaled alike --------------------------------------------------------------------


def alike(use: Use, *values: Any, otherwise: str, **certainty: Any) -> Result:
    """Require one scale, entry by entry, of all operands; return it.

    Zeros and infinities, which stay as they are, may have any scale; parameters are asked to be scaled along.

    Args:
        use: the operation.
        values: its operands, tensors and numbers, which broadcast to the result.
        otherwise: what the operation does where an operand is not scaled with the others.
        certainty: that of this reason.
    """
    rank = len(use.out_shape)
    labels = [label for value in values if (label := use.label_of(value)) is not None]
    if not labels:
        return None
    ids = aligned(labels[0], rank)
    for label in labels[1:]:
        ids, other = np.broadcast_arrays(ids, aligned(label, rank))
        use.scales.join(ids, other, use.why("takes entries that have different scales", **certainty))
    for value in values:
        if use.label_of(value) is not None or use.is_zero(value) or (isinstance(value, float) and math.isinf(value)):
            continue
        if use.graph.parameter_of(value) and _adopts(use, value, ids):
            continue
        reason = (
            otherwise if isinstance(value, Node) else f"{otherwise.rpartition(' something')[0]} the constant {value}"
        )
        use.pin(reason, Label(ids), **certainty)
        return None
    return Label.compressed(use.scales.roots(ids))


@rule(*COMPARISONS)
def compare(use: Use) -> Result:
    """Comparisons with zero, or with what is scaled alike, come out the same at every scale; others do not."""
    label = alike(
        use, use.args["self"], use.args["other"],
        otherwise="compares with something that is not scaled with it", certainty="jump",
    )  # fmt: skip
    if isinstance(label, Label):
        use.scales.end(label.ids, use.why(_UNSEEN))
    return None


@rule(*LARGER_OF_TWO)
def larger_of_two(use: Use) -> Result:
    """The larger or smaller of two entries, which have to be scaled alike."""
    return alike(
        use, use.args["self"], use.args["other"],
        otherwise="compares with something that is not scaled with it", certainty="jump",
    )  # fmt: skip


@rule("clamp", "clamp.Tensor", "clip", "clip.Tensor", "clamp_min", "clamp_min.Tensor", "clamp_max", "clamp_max.Tensor")
def clamp(use: Use) -> Result:
    """Bounds: zero makes a ReLU, a lower one as small as an eps guards a division; others have to be scaled alike."""
    low, high = use.args.get("min"), use.args.get("max")
    if isinstance(low, (int, float)) and 0 < low <= LARGEST_EPS:
        low = None
    bounds = [bound for bound in (low, high) if bound is not None]
    return alike(
        use, use.args["self"], *bounds,
        otherwise="bounds it by something that is not scaled with it", certainty="jump",
    )  # fmt: skip


@rule("threshold")
def threshold(use: Use) -> Result:
    """Zero below zero is a ReLU; other thresholds are not homogeneous."""
    return use.label("self") if use.args["threshold"] == use.args["value"] == 0 else jumps(use)


@rule("where.self", "where.ScalarOther", "where.ScalarSelf", "where.Scalar")
def where(use: Use) -> Result:
    """One of two entries, which have to be scaled alike."""
    values = [use.args["self"], use.args["other"]]
    return alike(use, *values, otherwise="chooses between it and something that is not scaled with it")


@rule("masked_fill.Scalar", "masked_fill.Tensor")
def masked(use: Use) -> Result:
    """Masks: zero in the masked places lets the scale pass."""
    return alike(use, use.args["self"], use.args["value"], otherwise="fills in something that is not scaled with it")


@rule("lerp.Scalar", "lerp.Tensor")
def lerp(use: Use) -> Result:
    """Interpolation between two tensors that are scaled alike."""
    if use.label("weight") is not None:
        use.pin("interpolates by a scaled weight")
        return None
    return alike(use, use.args["self"], use.args["end"], otherwise="adds something that is not scaled with it")


@rule("add.Tensor", "add.Scalar", "sub.Tensor", "sub.Scalar", "rsub.Tensor", "rsub.Scalar", "subtract.Tensor",
      "subtract.Scalar")  # fmt: skip
def add(use: Use) -> Result:
    """Sums and differences: both terms scaled alike, or the other one a bias that can be scaled along."""
    terms = [use.args["self"], use.args["other"]]
    number = next((term for term in terms if isinstance(term, (int, float))), None)
    if number is not None:
        eps = float(number) * (1.0 if use.op == "rsub" else float(use.args.get("alpha", 1)))
        if abs(eps) <= LARGEST_EPS:
            return use.label("self") or use.label("other")
    return alike(use, *terms, otherwise="adds something that is not scaled with it")


@rule("addcmul", "addcdiv")
def add_product(use: Use) -> Result:
    """``a + b ⊙ c`` and ``a + b ⊘ c``: the product is scaled as the first term, which may be a parameter."""
    rank = len(use.out_shape)
    terms = [use.label(name) for name in ("self", "tensor1", "tensor2")]
    start, left, right = (unscaled(rank) if label is None else aligned(label, rank) for label in terms)
    product = use.scales.sum(left, right, 1.0 if use.op == "addcmul" else -1.0)
    return add_to(use, product, start)


def add_to(use: Use, product: Ids, start: Ids) -> Result:
    """Label of a sum of a product and of the argument ``self``, which are scaled alike."""
    first = use.args["self"]
    if use.label("self") is None and (product != UNSCALED).any():
        adopted = use.graph.parameter_of(first) and _adopts(use, first, product)
        if use.is_zero(first) or adopted:
            return Label.compressed(product)
        use.pin("adds something that is not scaled with it", Label(product))
        return None
    product, start = np.broadcast_arrays(product, start)
    use.scales.join(product, start, use.why("adds tensors that have different scales"))
    return Label.compressed(use.scales.roots(product))


def _adopts(use: Use, other: Node, ids: Ids) -> bool:
    """Let an added parameter take the scale of the entries that it is added to."""
    shape = shape_of(other)
    padded = (1,) * (ids.ndim - len(shape)) + shape
    spread = [axis for axis, n in enumerate(padded) if n == 1 and ids.shape[axis] > 1]
    merged = use.merge(ids, spread, "adds one parameter to entries that have different scales")
    return use.adopt(other, np.broadcast_to(merged, padded).reshape(shape))


@rule("mul.Tensor", "mul.Scalar", "multiply.Tensor", "multiply.Scalar", "div.Tensor", "div.Scalar", "div.Tensor_mode",
      "div.Scalar_mode", "divide.Tensor", "divide.Scalar", "divide.Tensor_mode", "divide.Scalar_mode",
      "true_divide.Tensor", "true_divide.Scalar")  # fmt: skip
def multiply(use: Use) -> Result:
    """Products and quotients: exponents add; a factor without a scale lets the other's pass."""
    left, right = use.label("self"), use.label("other")
    rank = len(use.out_shape)
    sign = -1.0 if "div" in use.op else 1.0
    if use.args.get("rounding_mode"):
        use.pin("rounds a scaled tensor", certainty="jump")
        return None
    a = unscaled(rank) if left is None else aligned(left, rank)
    b = unscaled(rank) if right is None else aligned(right, rank)
    product = use.scales.sum(a, b, sign)
    if left is not None and right is not None and (product == UNSCALED).any():
        use.absorb("quotient", a)
    return Label.compressed(product)


@rule("pow.Tensor_Scalar", "square", "sqrt", "rsqrt", "reciprocal")
def power(use: Use) -> Result:
    """Powers multiply the exponents."""
    label = use.label("self")
    exponent: Any = {"square": 2.0, "sqrt": 0.5, "rsqrt": -0.5, "reciprocal": -1.0}.get(
        use.op, use.args.get("exponent")
    )
    if label is None or not isinstance(exponent, (int, float)):
        use.pin("has a scaled exponent")
        return None
    return Label.compressed(use.scales.times(label.ids, float(exponent)))


@rule("renorm")
def renorm(use: Use) -> Result:
    """Slices above the largest norm are brought down to it, others stay."""
    use.pin("leaves slices below its largest norm as they are", certainty="jump")
    return None
