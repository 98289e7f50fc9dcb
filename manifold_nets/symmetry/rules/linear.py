"""Linear maps: convolutions, matrix products, Einstein sums, embeddings, attention.

They pass a scale of their input that all summed entries share. What they make of a shift depends on the other factor:
it is new unknowns, linked to the shift; they are constant along the axes that only the shifted factor has.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch.fx import Node

from manifold_nets.symmetry.rules.elementwise import add_to
from manifold_nets.symmetry.rules.use import (
    LARGEST_LINK,
    Result,
    ShiftUse,
    Table,
    Use,
    aligned,
    of_first,
    shape_of,
    unscaled,
)
from manifold_nets.symmetry.structure.scales import UNSCALED, Ids, Label

_WINDOW = "sums over a window whose entries have different scales"
_CHANNELS = "sums input channels that have different scales"
_ROWS = "looks up rows that have different scales"
_KEYS = "compares keys that are shifted differently"
_MULTIPLIES = "multiplies with a tensor"
# Up to this many pairs of contracted entries are compared one by one; beyond, each factor needs one scale.
_LARGEST_PRODUCT = 200_000


def table() -> Table:
    """Operation → what it does to a scale, and to a shift."""
    return {
        "conv1d conv1d.padding conv2d conv2d.padding conv3d conv3d.padding convolution conv_transpose1d "
        "conv_transpose2d.input conv_transpose3d.input linear": (linear_map, linear_map_of_shifts),
        "matmul mm bmm": (matmul, matmul_of_shifts),
        "_sparse_mm mv dot vdot inner": (matmul, None),
        "outer ger": (outer, None),
        "einsum": (einsum, einsum_of_shifts),
        "addmm baddbmm": (addmm, addmm_of_shifts),
        "addbmm addmv": (addmm, None),
        "embedding": (embedding, embedding_of_shifts),
        "embedding_bag embedding_bag.padding_idx": (embedding_bag, None),
        "scaled_dot_product_attention": (attention, attention_of_shifts),
    }


# ---- convolutions and linear layers ----------------------------------------------------------------------------------


def _is_transposed(use: Use) -> bool:
    return "transpose" in use.op or bool(use.args.get("transposed"))


def _channel_axis(use: Use) -> int:
    """The axis of the channels of the result, behind which come those of space."""
    return len(use.out_shape) - 1 - (0 if use.op == "linear" else len(use.shape("weight")) - 2)


def linear_map(use: Use) -> Result:
    """Combine the forms of the weight's output channels with that of the input, then scale the bias along."""
    axis, groups, rank = _channel_axis(use), int(use.args.get("groups", 1)), len(use.out_shape)
    rows, source, ids = _row_forms(use, groups), use.label("input"), unscaled(rank)
    if source is None and use.is_shared(use.args["weight"]):
        source = Label(ids)
    if source is not None:
        ids = _input_forms(use, use.merge(source.ids, range(axis + 1, rank), _WINDOW), axis, groups)
    if rows is not None:
        ids = use.scales.sum(ids, rows.reshape([len(rows) if a == axis else 1 for a in range(rank)]))
    return _with_bias(use, axis, ids)


def _row_forms(use: Use, groups: int) -> Ids | None:
    """Form of each output channel that the weight causes: one for all entries of its filter."""
    weight = use.label("weight")
    if weight is None:
        return None
    shape = use.shape("weight")
    if not _is_transposed(use):
        ids = weight.along(shape, (0,))
        return use.merge(ids, range(1, ids.ndim)).reshape(-1)
    channels_in, per_group = shape[:2]
    ids = weight.along(shape, (0, 1)).reshape(groups, channels_in // groups, per_group, *weight.ids.shape[2:])
    return use.merge(ids, [1, *range(3, ids.ndim)]).reshape(-1)


def _input_forms(use: Use, ids: Ids, axis: int, groups: int) -> Ids:
    """Label that a scaled input causes: its columns undo it where they may; else each group of channels is summed."""
    channels = use.shape("input")[axis]
    if use.columns is not None and ids.size == ids.shape[axis]:
        left = use.compensate(use.args["weight"], np.broadcast_to(ids.reshape(-1), (channels,)))
        if left is not None:
            return left.reshape((1,) * ids.ndim)
    if ids.shape[axis] == 1:
        return ids
    before, after = ids.shape[:axis], ids.shape[axis + 1 :]
    mixed = use.merge(ids.reshape(*before, groups, channels // groups, *after), [axis + 1], _CHANNELS)
    return np.repeat(mixed.reshape(*before, groups, *after), use.out_shape[axis] // groups, axis)


def _with_bias(use: Use, axis: int, ids: Ids) -> Result:
    """Require or ask that the bias of a linear map has the form of the channel that it is added to."""
    bias = use.label("bias")
    if use.args.get("bias") is None or (bias is None and (ids == UNSCALED).all()):
        return Label.compressed(ids)
    others = [other for other in range(ids.ndim) if other != axis]
    merged = use.merge(ids, others, "adds one bias to entries that have different scales")
    per_channel = np.broadcast_to(merged.reshape(-1), (use.out_shape[axis],))
    if bias is not None:
        use.join(per_channel, bias.ids, "adds a bias of another scale")
    elif not use.adopt(use.args["bias"], per_channel):
        use.pin("adds a bias that cannot be scaled along", Label(ids))
        return None
    return Label.compressed(use.scales.roots(ids))


def linear_map_of_shifts(use: ShiftUse) -> Result:
    """The bias shifts its channel; a shift of the input or of the rows is linked."""
    axis, rank = _channel_axis(use), len(use.out_shape)
    source, weight, blocks = use.label("input"), use.label("weight"), use.rows.get(use.args["weight"])
    ids = unscaled(rank)
    if weight is not None and (source is not None or blocks is None):
        use.pin("multiplies with what is shifted", weight, source)
        return None
    if weight is not None and blocks is not None:
        ids = _rows(use, weight, blocks, axis)
    elif source is not None:
        lead, space = source.ids.shape[:axis], zip(source.ids.shape, use.out_shape, _pads(use, axis), strict=True)
        # What is constant along an axis stays so, but at borders that are padded.
        tail = [1 if have == 1 and not padded else n for have, n, padded in list(space)[axis + 1 :]]
        ids = use.image(source.ids, [*lead, use.out_shape[axis], *tail], "maps the shift linearly")
    bias = use.label("bias")
    if bias is not None:
        ids = use.scales.sum(ids, bias.ids.reshape([len(bias.ids) if a == axis else 1 for a in range(rank)]))
    return Label.compressed(ids)


def _rows(use: ShiftUse, weight: Label, blocks: int, axis: int) -> Ids:
    """Every channel of a block gets v·x, which differs from position to position and from block to block."""
    shape = [1 if a == axis else n for a, n in enumerate(use.out_shape)]
    reason = "makes one shift a position of a row that is added to filters"
    numbers = np.broadcast_to(weight.ids.reshape(-1), (blocks,))
    ids = np.concatenate([use.image(np.array(number), shape, reason) for number in numbers.tolist()], axis)
    return ids if blocks == 1 else np.repeat(ids, use.out_shape[axis] // blocks, axis)


def _pads(use: ShiftUse, axis: int) -> list[bool]:
    """For each axis of the result whether positions at its border see fewer shifted entries than those inside."""
    count = len(use.out_shape) - axis - 1
    if _is_transposed(use):
        pads = [True] * count
    elif isinstance(padding := use.args.get("padding", 0), str):
        pads = [padding == "same" and size > 1 for size in use.shape("weight")[2:]]
    else:
        each = list(padding) if isinstance(padding, (list, tuple)) else [padding]
        pads = [bool(amount) for amount in (each if len(each) == count else each * count)]
    return [False] * (axis + 1) + pads


# ---- matrix products -------------------------------------------------------------------------------------------------


def matmul(use: Use) -> Result:
    """Products of matrices and vectors: the products of the entries that are summed need one scale."""
    first, second = _factors(use)
    if use.op == "inner" and len(use.shape(second)) > 1:
        use.pin("is followed for vectors only", unknown=True)
        return None
    return Label.compressed(_product(use, first, second))


def addmm(use: Use) -> Result:
    """``β b + α x W``: a matrix product to which a tensor is added, scaled along where it is a parameter."""
    first, second = _factors(use)
    alpha, beta = (float(use.args.get(factor, 1)) for factor in ("alpha", "beta"))
    product = _product(use, first, second) if alpha else unscaled(len(use.out_shape))
    if use.op == "addbmm" and alpha:
        product = use.merge(product, [0]).squeeze(0)
    if not beta:
        return Label.compressed(product)
    return add_to(use, product) if alpha else use.label("self")


def _factors(use: Use) -> tuple[str, str]:
    first, second = [name for name, value in use.args.items() if isinstance(value, Node)][-2:]
    return first, second


def _product(use: Use, first: str, second: str) -> Ids:
    """Ids of the product of two arguments, of which each may be a vector."""
    vectors = [len(use.shape(name)) == 1 for name in (first, second)]
    rank = max(2, len(use.shape(first)), len(use.shape(second)))
    left, right = use.label(first), use.label(second)
    if left is not None and vectors[0]:
        left = Label(left.ids[None])
    if right is not None and vectors[1]:
        right = Label(right.ids[:, None])
    product = _matrix_product(use, *(unscaled(rank) if side is None else aligned(side, rank) for side in (left, right)))
    return product.squeeze(tuple(axis for axis, vector in zip((-2, -1), vectors, strict=True) if vector))


def _matrix_product(use: Use, a: Ids, b: Ids) -> Ids:
    size = np.prod(np.broadcast_shapes((*a.shape, 1), (*b.shape[:-2], 1, *b.shape[-2:])))
    if size > _LARGEST_PRODUCT:
        a, b = use.merge(a, [-1]), use.merge(b, [-2])
    return use.merge(use.scales.sum(a[..., None], b[..., None, :, :]), [-2]).squeeze(-2)


def outer(use: Use) -> Result:
    """Every product of an entry of one vector and one of another."""
    return Label.compressed(use.scales.sum(use.ids("self", 1)[:, None], use.ids("vec2", 1)[None]))


def matmul_of_shifts(use: ShiftUse) -> Result:
    """A shift of one factor that is the same in all rows (columns) is so in the product."""
    first, second = _factors(use)
    if min(len(use.shape(first)), len(use.shape(second))) < 2:
        use.pin("multiplies shifted tensors")
        return None
    left, right = use.label(first), use.label(second)
    if left is not None and right is not None and int(np.prod(use.out_shape)) > LARGEST_LINK:
        use.pin("makes too many different shifts to follow", left, unknown=True)
        return Label.compressed(_images(use, second))
    return Label.compressed(_images(use, first, second))


def _images(use: ShiftUse, *names: str) -> Ids:
    """Sum of what the shifts of the factors make: of the left one along its rows, of the right one along its columns.

    The product of both shifts has the pattern of each of the other terms, whose unknowns are arbitrary.
    """
    total, factors = (
        unscaled(len(use.out_shape)),
        _factors(use) if use.op.startswith(("add", "badd")) else list(use.args),
    )
    for name in names:
        label, axis = use.label(name), -2 if name == factors[0] else -1
        if label is not None:
            shape = list(use.out_shape)
            shape[axis] = label.ids.shape[axis]
            total = use.scales.sum(total, use.image(label.ids, shape, _MULTIPLIES))
    return total


def addmm_of_shifts(use: ShiftUse) -> Result:
    """A matrix product that is added to a bias."""
    ids = use.scales.times(use.ids("self"), float(use.args.get("beta", 1)))
    product = _images(use, *_factors(use)) if float(use.args.get("alpha", 1)) else unscaled(ids.ndim)
    return Label.compressed(use.scales.sum(ids, product))


# ---- Einstein sums ---------------------------------------------------------------------------------------------------


def einsum(use: Use) -> Result:
    """The products of the entries that are summed need one scale."""
    parsed = _parsed(use)
    if parsed is None:
        return None
    indices, result = parsed
    labels = [use.label_of(tensor) for tensor in use.args["tensors"]]
    factors = [(names, label.ids) for names, label in zip(indices, labels, strict=True) if label is not None]
    every = list(dict.fromkeys(name for names, _ in factors for name in names))
    summed = [every.index(name) for name in every if name not in result]
    spread = [_spread(ids, names, every) for names, ids in factors]
    if np.prod(np.broadcast_shapes(*(ids.shape for ids in spread))) > _LARGEST_PRODUCT:
        spread = [use.merge(ids, summed) for ids in spread]
    total = unscaled(len(every))
    for ids in spread:
        total = use.scales.sum(total, ids)
    kept = use.merge(total, summed).squeeze(tuple(summed))
    return Label.compressed(_spread(kept, [name for name in every if name in result], result))


def einsum_of_shifts(use: ShiftUse) -> Result:
    """A shift stays constant along the indices that only its own factor has."""
    parsed = _parsed(use)
    if parsed is None:
        return None
    indices, result = parsed
    total = unscaled(len(result))
    for place, (names, tensor) in enumerate(zip(indices, use.args["tensors"], strict=True)):
        label = use.label_of(tensor)
        if label is None:
            continue
        others = {name for factor in (*indices[:place], *indices[place + 1 :]) for name in factor}
        have = dict(zip(names, label.ids.shape, strict=True))
        sizes = zip(result, use.out_shape, strict=True)
        shape = [have[name] if name in have and name not in others else n for name, n in sizes]
        # The product of several shifts has the pattern of these, whose unknowns are arbitrary.
        total = use.scales.sum(total, use.image(label.ids, shape, _MULTIPLIES))
    return Label.compressed(total)


def _parsed(use: Use) -> tuple[list[list[str]], list[str]] | None:
    """The indices of the factors and of the result of an equation; None where one occurs twice in a factor."""
    ranks = [len(shape_of(tensor)) for tensor in use.args["tensors"]]
    indices, result = einsum_indices(str(use.args["equation"]), ranks)
    if any(len(set(names)) < len(names) for names in indices):
        use.pin("is followed for equations without repeated indices only", unknown=True)
        return None
    return indices, result


def _spread(ids: Ids, names: Sequence[str], every: Sequence[str]) -> Ids:
    """Ids with one axis for each index of a list, of size 1 where the tensor does not have it."""
    order = sorted(range(len(names)), key=lambda axis: every.index(names[axis]))
    sizes = {names[axis]: ids.shape[axis] for axis in order}
    return ids.transpose(order).reshape([sizes.get(name, 1) for name in every])


def einsum_indices(equation: str, ranks: Sequence[int]) -> tuple[list[list[str]], list[str]]:
    """The indices of the factors and of the result of an equation, those of an ellipsis numbered from the last.

    Example:
        >>> einsum_indices("...i,ij", [2, 2])
        ([['-1', 'i'], ['i', 'j']], ['-1', 'j'])
    """
    terms, arrow, result = equation.replace(" ", "").partition("->")
    factors = []
    for term, rank in zip(terms.split(","), ranks, strict=True):
        before, dots, after = term.partition("...")
        more = rank - len(before) - len(after) if dots else 0
        factors.append([*before, *(str(-n) for n in range(more, 0, -1)), *after])
    most = max((names for names in factors), key=lambda names: sum(name[0] == "-" for name in names))
    dotted = [name for name in most if name[0] == "-"]
    if not arrow:
        letters = terms.replace(",", "").replace("...", "")
        return factors, dotted + sorted(letter for letter in set(letters) if letters.count(letter) == 1)
    before, dots, after = result.partition("...")
    return factors, [*before, *(dotted if dots else []), *after]


# ---- embeddings and attention ----------------------------------------------------------------------------------------


@of_first
def embedding(use: Use, label: Label) -> Result:
    """Look up rows: any row may be picked, so all rows need one scale."""
    ids = use.merge(label.ids, [0], _ROWS if not use.shifts else "looks up rows that are shifted differently")
    return Label.compressed(ids.reshape((1,) * (len(use.out_shape) - 1) + ids.shape[1:]))


def embedding_bag(use: Use) -> Result:
    """Sums, means or maxima of rows: any row may be picked, so all rows need one scale."""
    weight, factors = use.label("weight"), use.label("per_sample_weights")
    if factors is not None:
        use.pin("multiplies rows by what is scaled", factors, unknown=True)
    return None if weight is None else Label.compressed(use.merge(weight.ids, [0], _ROWS))


@of_first
def embedding_of_shifts(use: ShiftUse, label: Label) -> Result:
    """A constant added to all of a row shifts the result at every place where it is looked up."""
    if use.args["weight"] in use.rows:
        return use.fresh(label.ids, (*use.out_shape[:-1], 1), "looks up shifted rows")
    return embedding(use)


def attention(use: Use) -> Result:
    """Attention is linear in the values; the products of queries and keys pass a softmax."""
    query, key, value = use.label("query"), use.label("key"), use.label("value")
    if use.label("attn_mask") is not None:
        use.pin("adds it to what a softmax reads", use.label("attn_mask"))
    if query is not None or key is not None:
        scores = _matrix_product(use, use.ids("query"), use.ids("key").swapaxes(-1, -2))
        use.pin("feeds products of queries and keys to a softmax", Label(scores), certainty="smooth")
    if value is None:
        return None
    return Label.compressed(use.merge(value.ids, [-2], "averages values that have different scales"))


def attention_of_shifts(use: ShiftUse) -> Result:
    """A shift of all keys is not seen, one of all values passes, one of the queries matters."""
    query, key, value = use.label("query"), use.label("key"), use.label("value")
    if query is not None and use.shape("key")[-2] == 1:
        use.absorb("softmax", query.ids)  # of one key, whose weight is 1
    elif query is not None:
        use.pin("multiplies queries with keys", query)
    if key is not None:
        use.absorb("softmax", use.merge(key.ids, [-2], _KEYS))
    if use.label("attn_mask") is not None:
        use.absorb("softmax", use.merge(use.ids("attn_mask"), [-1], _KEYS))
    if value is None:
        return None
    if float(use.args.get("dropout_p") or 0.0) > 0 or not use.inactive(use.graph.module_of(use.node)):
        use.pin("drops attention weights at random, which then do not sum to 1", value)
        return None
    ids = value.ids
    if use.args.get("enable_gqa") and ids.shape[-3] > 1:
        ids = np.repeat(ids, use.out_shape[-3] // ids.shape[-3], -3)
    if ids.shape[-2] == 1:
        return Label.compressed(ids)
    return use.fresh(value.ids, (*ids.shape[:-2], use.out_shape[-2], ids.shape[-1]), "averages values")
