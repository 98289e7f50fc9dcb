"""Layers that are linear maps: convolutions, linear layers, embeddings, attention.

They pass a scale of their input that all summed entries share. What they make of a shift depends on the other factor:
it is new unknowns, linked to the shift; they are constant along the axes that only the shifted factor has.
"""

from __future__ import annotations

import numpy as np
from torch._ops import OpOverload
from torch.fx import Node

from manifold_nets.symmetry.equations import UNSCALED, Ids, Label
from manifold_nets.symmetry.graph import operation_key
from manifold_nets.symmetry.rules.products import contracted, einsum_indices
from manifold_nets.symmetry.rules.table import SHIFT_RULES, Table, of_first
from manifold_nets.symmetry.rules.use import Result, Use, shape_of, unscaled

_WINDOW = "sums over a window whose entries have different scales"
_CHANNELS = "sums input channels that have different scales"
_ROWS = "looks up rows that have different scales"
_KEYS = "compares keys that are shifted differently"


def table() -> Table:
    """Operation → what it does to a scale, and to a shift."""
    return {
        "conv1d conv1d.padding conv2d conv2d.padding conv3d conv3d.padding convolution conv_transpose1d "
        "conv_transpose2d.input conv_transpose3d.input linear": (linear_map, linear_map_of_shifts),
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
    if use.walk.columns is not None and ids.size == ids.shape[axis]:
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
    elif not use.coscale(use.args["bias"], per_channel):
        return use.refuse("adds a bias that cannot be scaled along", Label(ids))
    return Label.compressed(use.scales.roots(ids))


def linear_map_of_shifts(use: Use) -> Result:
    """The bias shifts its channel; a shift of the input or of the rows is linked."""
    axis, rank = _channel_axis(use), len(use.out_shape)
    source, weight, blocks = use.label("input"), use.label("weight"), use.blocks
    ids = unscaled(rank)
    if any(_lets_no_shift_pass(user) for user in use.node.users.keys() & use.graph.live_or_stored):
        use.refuse("is read by an operation that lets no shift pass")  # at once: each entry would be an unknown
        return None
    if weight is not None and (source is not None or blocks is None):
        return use.refuse("multiplies with what is shifted", weight, source)
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


def _lets_no_shift_pass(user: Node) -> bool:
    return isinstance(user.target, OpOverload) and operation_key(user) not in SHIFT_RULES


def _rows(use: Use, weight: Label, blocks: int, axis: int) -> Ids:
    """Every channel of a block gets v·x, which differs from position to position and from block to block."""
    shape = [1 if a == axis else n for a, n in enumerate(use.out_shape)]
    reason = "makes one shift per position of a row that is added to filters"
    numbers = np.broadcast_to(weight.ids.reshape(-1), (blocks,))
    ids = np.concatenate([use.image(np.array(number), shape, reason) for number in numbers.tolist()], axis)
    return ids if blocks == 1 else np.repeat(ids, use.out_shape[axis] // blocks, axis)


def _pads(use: Use, axis: int) -> list[bool]:
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
        use.refuse("multiplies rows by what is scaled", factors, unknown=True)
    return None if weight is None else Label.compressed(use.merge(weight.ids, [0], _ROWS))


@of_first
def embedding_of_shifts(use: Use, label: Label) -> Result:
    """A constant added to all of a row shifts the result at every place where it is looked up."""
    if use.blocks is not None:
        return use.fresh(label.ids, (*use.out_shape[:-1], 1), "looks up shifted rows")
    return embedding(use)


def attention(use: Use) -> Result:
    """Attention is linear in the values; the products of queries and keys pass a softmax."""
    query, key, value = use.label("query"), use.label("key"), use.label("value")
    if use.label("attn_mask") is not None:
        use.refuse("adds it to what a softmax reads", use.label("attn_mask"))
    if query is not None or key is not None:
        factors = [use.args["query"], use.args["key"]]
        indices, result = einsum_indices("...ij,...kj->...ik", [len(shape_of(factor)) for factor in factors])
        scores = contracted(use, list(zip(factors, indices, strict=True)), result)
        use.refuse("feeds products of queries and keys to a softmax", Label(scores), certainty="smooth")
    if value is None:
        return None
    return Label.compressed(use.merge(value.ids, [-2], "averages values that have different scales"))


def attention_of_shifts(use: Use) -> Result:
    """A shift of all keys is not seen, one of all values passes, one of the queries matters."""
    query, key, value = use.label("query"), use.label("key"), use.label("value")
    if query is not None and use.shape("key")[-2] == 1:
        use.absorb("softmax", query.ids)  # of one key, whose weight is 1
    elif query is not None:
        use.refuse("multiplies queries with keys", query)
    if key is not None:
        use.absorb("softmax", use.merge(key.ids, [-2], _KEYS))
    if use.label("attn_mask") is not None:
        use.absorb("softmax", use.merge(use.ids("attn_mask"), [-1], _KEYS))
    if value is None:
        return None
    if float(use.args.get("dropout_p") or 0.0) > 0 or not use.walk.inactive(use.graph.module_of(use.node)):
        return use.refuse("drops attention weights at random, which then do not sum to 1", value)
    ids = value.ids
    if use.args.get("enable_gqa") and ids.shape[-3] > 1:
        ids = np.repeat(ids, use.out_shape[-3] // ids.shape[-3], -3)
    if ids.shape[-2] == 1:
        return Label.compressed(ids)
    return use.fresh(value.ids, (*ids.shape[:-2], use.out_shape[-2], ids.shape[-1]), "averages values")
