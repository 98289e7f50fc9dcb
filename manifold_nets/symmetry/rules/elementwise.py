"""Operations entry by entry."""

from __future__ import annotations

import torch

from manifold_nets.symmetry.equations import Label
from manifold_nets.symmetry.rules.table import Table, both, of_first
from manifold_nets.symmetry.rules.use import Result, Use


def table() -> Table:
    """Operation → what it does to a scale, and to a shift."""
    return {
        "alias clone contiguous detach lift_fresh_copy positive": both(passes),
        "_to_copy to.device to.dtype to.other to.dtype_layout to.prim_Device to.prim_dtype to.prim_other type_as": (
            both(cast)),
        "relu leaky_relu prelu rrelu rrelu_with_noise abs absolute conj _conj resolve_conj resolve_neg real imag tril "
        "triu": (passes, None),
        "neg negative": (passes, negated),
        "dropout native_dropout feature_dropout": (passes, dropout),
        "alpha_dropout": (jumps, dropout),
        # Smooth functions, whose derivative shows that they are not homogeneous.
        "sigmoid tanh gelu silu mish softplus log_sigmoid exp log1p expm1 sin cos erf lstm.input lstm.data "
        "gru.input gru.data rnn_tanh.input rnn_tanh.data glu nll_loss nll_loss_nd atan asin pow.Scalar": (
            not_homogeneous, None),
        # What follows may undo them: a mean that is subtracted, or the inverse power.
        "log log2 log10": (logarithm, None),
        "pow.Tensor_Tensor": (power_of_tensors, None),
        # Functions made of pieces, and jumps: between them the derivative may be that of a homogeneous function.
        "hardswish hardsigmoid hardtanh relu6 elu selu celu hardshrink softshrink round round.decimals floor ceil "
        "trunc fix frac bernoulli bernoulli.p bernoulli.Tensor feature_alpha_dropout floor_divide floor_divide.Scalar "
        "remainder.Tensor remainder.Scalar remainder.Scalar_Tensor fmod.Tensor fmod.Scalar isclose": (jumps, None),
        # Results that depend on the shape and the dtype only.
        "zeros_like ones_like empty_like new_zeros new_ones new_empty full_like new_full rand_like "
        "rand_like.generator randn_like randn_like.generator sym_size sym_size.int sym_numel "
        "_assert_tensor_metadata": both(shape_only),
        # Results that a positive scale of each entry does not change.
        "sign sgn signbit isnan isinf isfinite logical_not logical_and logical_or logical_xor count_nonzero "
        "count_nonzero.dim_IntList": (sign, None),
        "threshold": (threshold, None),
        "nan_to_num": (nan_to_num, None),
        "pow.Tensor_Scalar square sqrt rsqrt reciprocal": (power, None),
        "renorm embedding_renorm": (renorm, None),
    }  # fmt: skip


def passes(use: Use) -> Result:
    """Pass the label of the first argument."""
    first, *options = use.args
    for option in options:
        if use.label(option) is not None:
            use.refuse("takes a scaled tensor as an option", use.label(option))
    return use.label(first)


@of_first
def cast(use: Use, label: Label) -> Result:
    """Pass the label of a tensor that is cast to another dtype; a truth value says which entries are not zero."""
    if use.node.meta["val"].dtype == torch.bool and not use.shifts:
        return use.end(label)
    return label


@of_first
def negated(use: Use, label: Label) -> Result:
    """The opposite shift."""
    return Label(use.scales.times(label.ids, -1.0))


def dropout(use: Use) -> Result:
    """Dropout scales entries at random, unless its probability is 0."""
    if use.walk.inactive(use.graph.module_of(use.node)) and not use.args.get("p"):
        return use.label_of(next(iter(use.args.values())))
    return use.refuse("drops entries at random")


def not_homogeneous(use: Use) -> Result:
    """Refuse every scale."""
    return use.refuse("is not positively homogeneous", certainty="smooth")


def logarithm(use: Use) -> Result:
    """A scale becomes a shift, which is not followed."""
    return use.refuse("turns its scale into a shift")


def power_of_tensors(use: Use) -> Result:
    """The exponents are not known here."""
    return use.refuse("has exponents that are not constant numbers")


def jumps(use: Use) -> Result:
    """Refuse every scale, of which a derivative may see nothing."""
    return use.refuse("is not positively homogeneous", certainty="jump")


def shape_only(use: Use) -> Result:
    """Drop the label: the result does not depend on the entries."""
    return None


def sign(use: Use) -> Result:
    """Drop the label: the result does not depend on a positive scale."""
    return use.end()


def threshold(use: Use) -> Result:
    """Zero below zero is a ReLU; other thresholds are not homogeneous."""
    return use.label("self") if use.args["threshold"] == use.args["value"] == 0 else jumps(use)


@of_first
def nan_to_num(use: Use, label: Label) -> Result:
    """What is finite stays, zeros for the rest pass any scale, and the largest numbers are as good as infinite."""
    if any(use.args.get(name) for name in ("nan", "posinf", "neginf")):
        return use.refuse("fills in something that is not scaled with it", label)
    return label


def power(use: Use) -> Result:
    """Powers multiply the exponents."""
    known = {"square": 2.0, "sqrt": 0.5, "rsqrt": -0.5, "reciprocal": -1.0}
    label, exponent = use.label("self"), known.get(use.op, use.args.get("exponent"))
    if label is None or not isinstance(exponent, (int, float)):
        return use.refuse("has a scaled exponent")
    return Label.compressed(use.scales.times(label.ids, float(exponent)))


def renorm(use: Use) -> Result:
    """Slices above the largest norm are brought down to it, others stay."""
    return use.refuse("leaves slices below its largest norm as they are", certainty="jump")
