"""Operations on the entries of several tensors that meet: comparisons and choices, sums, products."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
from torch.fx import Node

from manifold_nets.symmetry.equations import UNSCALED, Certainty, Ids, Label
from manifold_nets.symmetry.graph import bound_arguments, is_in_place, op_name, operation_key
from manifold_nets.symmetry.rules.table import Rule, Table
from manifold_nets.symmetry.rules.use import Result, Use, aligned, shape_of

# A constant up to this size that is added under a normalization is its eps.
LARGEST_EPS = 1e-3
# What is filled in below this vanishes in a softmax, shifted or not.
_MASKED = -1e30
_ALIKE = "compares with something that is not scaled with it"
_ADDS = "adds something that is not scaled with it"


def table() -> Table:
    """Operation → what it does to a scale, and to a shift."""
    fills = "fills in something that is not scaled with it"
    chooses = "chooses between it and something that is not scaled with it"
    comparisons = " ".join(
        f"{name}.Scalar {name}.Tensor"
        for name in "gt ge lt le eq ne greater greater_equal less less_equal not_equal".split()
    )
    return {
        comparisons: (alike("self", "other", otherwise=_ALIKE, certainty="jump", unseen=True), None),
        "maximum minimum fmax fmin max.other min.other": (
            alike("self", "other", otherwise=_ALIKE, certainty="jump"), chosen),
        "bucketize.Tensor searchsorted.Tensor bucketize.Scalar searchsorted.Scalar": (between, None),
        "clamp clamp.Tensor clip clip.Tensor clamp_min clamp_min.Tensor clamp_max clamp_max.Tensor": (clamp, None),
        "where.self where.ScalarOther where.ScalarSelf where.Scalar": (
            alike("self", "other", otherwise=chooses), chosen),
        "masked_fill.Scalar masked_fill.Tensor": (alike("self", "value", otherwise=fills), chosen),
        "lerp.Scalar lerp.Tensor": (lerp, None),
        "add.Tensor add.Scalar sub.Tensor sub.Scalar rsub.Tensor rsub.Scalar subtract.Tensor subtract.Scalar": (
            add, add_shifts),
        "addcmul addcdiv": (add_product, None),
        "mul.Tensor mul.Scalar multiply.Tensor multiply.Scalar div.Tensor div.Scalar div.Tensor_mode div.Scalar_mode "
        "divide.Tensor divide.Scalar divide.Tensor_mode divide.Scalar_mode true_divide.Tensor true_divide.Scalar": (
            multiply, multiply_shift),
        "_foreach_mul.Scalar _foreach_mul.List _foreach_mul.ScalarList _foreach_mul.Tensor": (multiply_each, None),
    }  # fmt: skip


# ---- several tensors that have to be scaled alike --------------------------------------------------------------------


def alike(*names: str, **options: Any) -> Rule:
    """A rule that requires one scale, entry by entry, of some arguments; see `scaled_alike`."""
    return lambda use: scaled_alike(use, *(use.args[name] for name in names), **options)


def scaled_alike(
    use: Use,
    *values: Any,
    otherwise: str,
    certainty: Certainty = "cautious",
    unseen: bool = False,
    merged: Mapping[Any, Label] = MappingProxyType({}),
) -> Result:
    """Require one scale, entry by entry, of operands that broadcast to the result, and return it.

    Zeros and infinities, which stay as they are, may have any scale; parameters are asked to be scaled along.

    Args:
        use: the operation.
        values: its operands, tensors and numbers.
        otherwise: what it does where an operand is not scaled with the others.
        certainty: that of this reason.
        unseen: whether the result does not depend on the scale that all have.
        merged: labels of operands that take the place of their own.
    """
    rank = len(use.out_shape)
    labels = [merged.get(value) or use.label_of(value) for value in values]
    known = [aligned(label, rank) for label in labels if label is not None]
    if not known:
        return None
    ids = known[0]
    for other in known[1:]:
        ids = use.join(ids, other, "takes entries that have different scales", certainty)
    for value, label in zip(values, labels, strict=True):
        if label is not None or use.is_zero(value) or (isinstance(value, float) and math.isinf(value)):
            continue
        if use.graph.parameter_of(value) and _coscales(use, value, ids):
            continue
        constant = f"{otherwise.rpartition(' something')[0]} the constant {value}"
        return use.refuse(otherwise if isinstance(value, Node) else constant, Label(ids), certainty=certainty)
    found = Label.compressed(use.scales.roots(ids))
    return use.end(found) if unseen else found


def clamp(use: Use) -> Result:
    """Bounds: zero makes a ReLU, a lower one as small as an eps guards a division; others have to be scaled alike."""
    low, high = use.args.get("min"), use.args.get("max")
    if isinstance(low, (int, float)) and 0 < low <= LARGEST_EPS:
        low = None
    bounds = [bound for bound in (low, high) if bound is not None]
    bounds_it = "bounds it by something that is not scaled with it"
    return scaled_alike(use, use.args["self"], *bounds, otherwise=bounds_it, certainty="jump")


def lerp(use: Use) -> Result:
    """Interpolation between two tensors that are scaled alike."""
    if use.label("weight") is not None:
        return use.refuse("interpolates by a scaled weight")
    return scaled_alike(use, use.args["self"], use.args["end"], otherwise=_ADDS)


def between(use: Use) -> Result:
    """Places of entries between boundaries: the same at every scale that the boundaries have as well."""
    bounds = use.args["boundaries" if use.op == "bucketize" else "sorted_sequence"]
    label = use.label_of(bounds)
    if use.graph.parameter_of(bounds) and label is None:  # as many as there are boundaries: it does not broadcast
        return use.refuse(_ALIKE, certainty="jump")
    merged = {}
    if label is not None:
        merged[bounds] = Label(use.merge(label.ids, [-1], "compares with entries that have different scales"))
    return scaled_alike(use, use.args["self"], bounds, otherwise=_ALIKE, certainty="jump", unseen=True, merged=merged)


def chosen(use: Use) -> Result:
    """One of two values, by a condition or by their size: both shifted alike, or one of them a mask of a softmax."""
    names = ("self", "value" if "value" in use.args else "other")
    for name, other in (names, names[::-1]):
        if use.label(name) is not None and _is_mask(use.args[other]):
            return Label.compressed(use.ids(name))
    first, second = map(use.ids, names)
    return Label.compressed(use.join(first, second, "takes entries that are shifted differently"))


def _is_mask(value: Any) -> bool:
    """Whether a number, or a tensor filled with it, vanishes in a softmax."""
    if isinstance(value, Node) and op_name(value) in ("full", "full_like", "scalar_tensor"):
        given = bound_arguments(value)
        value = given.get("fill_value", given.get("s"))
    return isinstance(value, (int, float)) and value <= _MASKED


# ---- sums ------------------------------------------------------------------------------------------------------------


def add(use: Use) -> Result:
    """Sums and differences: both terms scaled alike, or the other one a bias that can be scaled along."""
    terms = {name: use.args[name] for name in ("self", "other")}
    number = next((term for term in terms.values() if isinstance(term, (int, float))), None)
    if number is not None:
        eps = float(number) * (1.0 if use.op == "rsub" else float(use.args.get("alpha", 1)))
        if abs(eps) <= LARGEST_EPS:
            return use.label("self") or use.label("other")
    for name, other in (("self", "other"), ("other", "self")):
        if _is_subtracted(use, terms[name]):
            use.end(use.label(name), reason="is subtracted with the mean by the normalization behind it")
            return Label.compressed(use.ids(other))
    return scaled_alike(use, *terms.values(), otherwise=_ADDS)


def _is_subtracted(use: Use, term: Any) -> bool:
    """Whether a term of a sum vanishes in normalizations, which are all that reads the sum: their mean contains it.

    Not where the mean is stored, as it would have to follow the scale of the sum without the term.
    """
    if is_in_place(use.node) or use.graph.parameter_of(term) or not use.node.users:
        return False
    rank = len(use.out_shape)
    shape = (1,) * (rank - len(shape_of(term))) + shape_of(term) if isinstance(term, Node) else (1,) * rank
    return all(_subtracts(user, use.node, shape) for user in use.node.users)


def _subtracts(user: Node, source: Node, shape: Sequence[int]) -> bool:
    """Whether an operation subtracts from a tensor whatever has this shape, which broadcasts to the tensor's."""
    op, given = op_name(user), bound_arguments(user)
    if op in ("clone", "contiguous", "alias") or operation_key(user) == "to.dtype":
        return bool(user.users) and all(_subtracts(later, user, shape) for later in user.users)
    if given.get("input") is not source or given.get("running_mean") is not None:
        return False
    if op == "layer_norm":
        return all(n == 1 for n in shape[-len(given["normalized_shape"]) :])
    if op == "group_norm":
        return all(n == 1 for n in shape[2:]) and (shape[1] == 1 or given["num_groups"] == shape[1])
    if op in ("batch_norm", "instance_norm") and given.get("training", given.get("use_input_stats")):
        return all(n == 1 for n in (*shape[2:], *shape[: op == "batch_norm"]))
    return False


def add_product(use: Use) -> Result:
    """``a + b ⊙ c`` and ``a + b ⊘ c``: the product is scaled as the first term, which may be a parameter."""
    sign = 1.0 if use.op == "addcmul" else -1.0
    return add_to(use, use.scales.sum(use.ids("tensor1"), use.ids("tensor2"), sign))


def add_to(use: Use, product: Ids) -> Result:
    """Label of a sum of a product and of the argument ``self``, which are scaled alike."""
    label = Label.compressed(product)
    merged = {} if label is None else {use.node: label}
    return scaled_alike(use, use.args["self"], use.node, otherwise=_ADDS, merged=merged)


def _coscales(use: Use, other: Node, ids: Ids) -> bool:
    """Let an added parameter take the scale of the entries that it is added to."""
    shape = shape_of(other)
    padded = (1,) * (ids.ndim - len(shape)) + shape
    spread = [axis for axis, n in enumerate(padded) if n == 1 and ids.shape[axis] > 1]
    merged = use.merge(ids, spread, "adds one parameter to entries that have different scales")
    return use.coscale(other, np.broadcast_to(merged, padded).reshape(shape))


def add_shifts(use: Use) -> Result:
    """Sums and differences: shifts add; what cancels is absorbed."""
    a, b = use.ids("self"), use.ids("other")
    factor = float(use.args.get("alpha", 1) or 0) * (1.0 if use.op == "add" else -1.0)
    if use.op == "rsub":
        a, factor = use.scales.times(a, -1.0), -factor
    total = use.scales.sum(a, b, factor)
    start = np.broadcast_to(use.scales.roots(a), total.shape)
    cancelled = (total == UNSCALED) & (start != UNSCALED)
    if cancelled.any():
        use.absorb("difference", np.where(total == UNSCALED, start, UNSCALED))
    return Label.compressed(total)


# ---- products --------------------------------------------------------------------------------------------------------


def multiply(use: Use) -> Result:
    """Products and quotients: exponents add; a factor without a scale lets the other's pass."""
    if use.args.get("rounding_mode"):
        return use.refuse("rounds a scaled tensor", certainty="jump")
    left = use.ids("self")
    product = use.scales.sum(left, use.ids("other"), -1.0 if "div" in use.op else 1.0)
    if use.label("self") is not None and use.label("other") is not None and (product == UNSCALED).any():
        use.absorb("quotient", left)
    return Label.compressed(product)


def multiply_each(use: Use) -> Result:
    """Products of each tensor of a list with a factor that has no scale; in place, its label is what it was."""
    factors = use.args.get("other")
    if any(use.label_of(factor) for factor in (factors if isinstance(factors, list) else [factors])):
        return use.refuse("multiplies lists of scaled tensors", unknown=True)
    return None if use.op.endswith("_") else [use.label_of(tensor) for tensor in use.args["self"]]


def multiply_shift(use: Use) -> Result:
    """Products with a number multiply the shift; products with a tensor make something unknown of it."""
    left, right = use.label("self"), use.label("other")
    if (left is not None and right is not None) or use.args.get("rounding_mode") or ("div" in use.op and left is None):
        return use.refuse("multiplies or divides shifted tensors")
    name, other = ("self", use.args["other"]) if left is not None else ("other", use.args["self"])
    ids = use.ids(name)
    if isinstance(other, (int, float)):
        factor = 1.0 / float(other) if "div" in use.op else float(other)
        return Label.compressed(use.scales.times(ids, factor)) if factor else None
    shape = np.broadcast_shapes(ids.shape, shape_of(other))
    return use.fresh(ids, shape, "multiplies with a tensor", ids)
