"""Operations entry by entry: which let a positive scale through, and which do not."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch.fx import Node

from manifold_nets.symmetry.structure.rules.use import RULES, Result, Use, aligned, rule, shape_of, unscaled
from manifold_nets.symmetry.structure.scales import UNSCALED, Ids, Label

__all__ = ["LARGEST_EPS"]

# A constant up to this size that is added under a normalization is its eps.
LARGEST_EPS = 1e-3

HOMOGENEOUS = (
    "relu leaky_relu prelu rrelu rrelu_with_noise abs neg dropout dropout_ feature_dropout alias clone contiguous "
    "detach lift_fresh_copy to _to_copy float double half bfloat16 identity positive native_dropout "
    "conj _conj resolve_conj real imag "
    "max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d "
    "adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d lp_pool2d "
    "max_pool2d_with_indices max_pool3d_with_indices max_unpool2d max_unpool3d fractional_max_pool2d "
    "upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_bilinear2d upsample_linear1d "
    "upsample_trilinear3d upsample_bicubic2d _upsample_nearest_exact1d _upsample_nearest_exact2d"
).split()
_SPATIAL = ("pool", "upsample")

NOT_HOMOGENEOUS = (
    "sigmoid tanh gelu silu mish hardswish hardsigmoid hardtanh relu6 elu selu celu softplus softsign logsigmoid exp "
    "log log1p expm1 sin cos erf clamp clamp_max softmax log_softmax _softmax _log_softmax threshold hardshrink "
    "softshrink tanhshrink lstm gru rnn_tanh glu round floor ceil bernoulli cross_entropy_loss nll_loss nll_loss_nd "
    "atan asin"
).split()

# Results that a positive scale does not change.
INVARIANT = (
    "sign argmax argmin gt ge lt le eq ne isnan isinf zeros_like ones_like empty_like new_zeros new_ones new_empty "
    "full_like new_full rand_like randn_like sym_size _assert_tensor_metadata"
).split()


# Of these, what depends on the values all the same.
_READ = frozenset("sign argmax argmin gt ge lt le eq ne isnan isinf".split())


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
    """Pass the label of a tensor that is cast like another one, whose scale does not matter."""
    return use.label("self")


def not_homogeneous(use: Use) -> Result:
    """Refuse every scale."""
    use.pin("is not positively homogeneous")
    return None


def invariant(use: Use) -> Result:
    """Drop the label: the result does not depend on a positive scale."""
    for node in use.node.all_input_nodes if use.op in _READ else ():
        label = use.label_of(node)
        if label is not None:
            use.scales.end(label.ids, use.why("does not see its scale, and hands on no gradient"))
    return None


RULES.update(dict.fromkeys(HOMOGENEOUS, homogeneous))
RULES.update(dict.fromkeys(NOT_HOMOGENEOUS, not_homogeneous))
RULES.update(dict.fromkeys(INVARIANT, invariant))
RULES["type_as"] = cast


@rule("add", "sub", "rsub")
def add(use: Use) -> Result:
    """Sums and differences: both terms scaled alike, or the other one a bias that can be scaled along."""
    terms = [use.args["self"], use.args["other"]]
    labels = [use.label_of(term) for term in terms]
    if labels[0] is not None and labels[1] is not None:
        return _sum_of_scaled(use, labels[0], labels[1])
    label, other = (labels[0], terms[1]) if labels[0] is not None else (labels[1], terms[0])
    if label is None:
        return None
    if not isinstance(other, Node):
        if other == 0 or abs(float(other)) <= LARGEST_EPS:
            return label
        use.pin(f"adds the constant {other}", label)
        return None
    ids = aligned(label, len(use.out_shape))
    if other in use.graph.zeros:
        return Label(ids)
    if other in use.graph.parameters and _adopts(use, other, ids):
        return Label(ids)
    use.pin("adds something that is not scaled with it", label)
    return None


@rule("addcmul", "addcdiv")
def add_product(use: Use) -> Result:
    """``a + b ⊙ c`` and ``a + b ⊘ c``: the product is scaled as the first term, which may be a parameter."""
    rank = len(use.out_shape)
    terms = [use.label(name) for name in ("self", "tensor1", "tensor2")]
    start, left, right = (unscaled(rank) if label is None else aligned(label, rank) for label in terms)
    product = use.scales.sum(left, right, 1.0 if use.op == "addcmul" else -1.0)
    if terms[0] is None and (product != UNSCALED).any():
        if use.args["self"] in use.graph.parameters and _adopts(use, use.args["self"], product):
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


def _sum_of_scaled(use: Use, left: Label, right: Label) -> Result:
    rank = len(use.out_shape)
    a, b = np.broadcast_arrays(aligned(left, rank), aligned(right, rank))
    use.scales.join(a, b, use.why("adds tensors that have different scales"))
    return Label.compressed(use.scales.roots(a))


@rule("mul", "div")
def mul(use: Use) -> Result:
    """Products and quotients: exponents add; a factor without a scale lets the other's pass."""
    left, right = use.label("self"), use.label("other")
    rank = len(use.out_shape)
    sign = -1.0 if use.op == "div" else 1.0
    if use.args.get("rounding_mode"):
        use.pin("rounds a scaled tensor")
        return None
    a = unscaled(rank) if left is None else aligned(left, rank)
    b = unscaled(rank) if right is None else aligned(right, rank)
    product = use.scales.sum(a, b, sign)
    if left is not None and right is not None and (product == UNSCALED).any():
        use.absorb("quotient", a)
    return Label.compressed(product)


@rule("pow", "square", "sqrt", "rsqrt", "reciprocal")
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


@rule("clamp_min")
def clamp_min(use: Use) -> Result:
    """A lower bound as small as an eps guards a division; zero is a ReLU; anything else is not homogeneous."""
    label, bound = use.label("self"), use.args["min"]
    if label is not None and isinstance(bound, (int, float)) and 0 <= bound <= LARGEST_EPS:
        return label
    return not_homogeneous(use)


@rule("mean", "sum", "amax", "amin", "norm", "linalg_vector_norm", "var", "std", "logsumexp", "cumsum", "max", "min")
def reduce(use: Use) -> Result:
    """Reductions: one scale along the reduced axes; a variance is scaled by its square."""
    label = use.label("self")
    if label is None or use.op == "logsumexp":
        return not_homogeneous(use)
    given = use.args.get("dim")
    axes = (
        range(label.ids.ndim)
        if given is None or given == []
        else given
        if isinstance(given, (list, tuple))
        else [given]
    )
    axes = [axis % label.ids.ndim for axis in axes]
    merged = use.merge(label.ids, axes)
    if use.op != "cumsum" and not use.args.get("keepdim", False):
        merged = np.squeeze(merged, tuple(axes))
    result = Label.compressed(use.scales.times(merged, 2.0) if use.op == "var" else merged)
    return [result, None] if isinstance(use.node.meta.get("val"), (tuple, list)) else result


@rule("masked_fill", "where")
def masked(use: Use) -> Result:
    """Masks: zero in the masked places lets the scale pass."""
    value = use.args.get("value", use.args.get("other"))
    label = use.label("self")
    if label is not None and isinstance(value, (int, float)) and value == 0:
        return label
    use.pin("fills in something that is not scaled with it")
    return None
