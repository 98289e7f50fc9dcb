"""Products of matrices and vectors, and Einstein sums."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch.fx import Node

from manifold_nets.symmetry.equations import Ids, Label
from manifold_nets.symmetry.rules.arithmetic import add_to
from manifold_nets.symmetry.rules.table import Table
from manifold_nets.symmetry.rules.use import LARGEST_LINK, Result, ShiftUse, Use, aligned, shape_of, unscaled

_MULTIPLIES = "multiplies with a tensor"
# Up to this many pairs of contracted entries are compared pair by pair; beyond, each factor needs one scale.
_LARGEST_PRODUCT = 200_000


def table() -> Table:
    """Operation → what it does to a scale, and to a shift."""
    return {
        "matmul mm bmm": (matmul, matmul_of_shifts),
        "_sparse_mm mv dot vdot inner": (matmul, None),
        "outer ger": (outer, None),
        "einsum": (einsum, einsum_of_shifts),
        "addmm baddbmm": (addmm, addmm_of_shifts),
        "addbmm addmv": (addmm, None),
    }


# ---- matrix products -------------------------------------------------------------------------------------------------


def matmul(use: Use) -> Result:
    """Products of matrices and vectors: the products of the entries that are summed need one scale."""
    first, second = _factors(use)
    if use.op == "inner" and len(use.shape(second)) > 1:
        use.refuse("is followed for vectors only", unknown=True)
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
    product = matrix_product(use, *(unscaled(rank) if side is None else aligned(side, rank) for side in (left, right)))
    return product.squeeze(tuple(axis for axis, vector in zip((-2, -1), vectors, strict=True) if vector))


def matrix_product(use: Use, a: Ids, b: Ids) -> Ids:
    """Ids of a product of matrices, of which both have as many axes; one scale is demanded of all that is summed."""
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
        use.refuse("multiplies shifted tensors")
        return None
    left, right = use.label(first), use.label(second)
    if left is not None and right is not None and int(np.prod(use.out_shape)) > LARGEST_LINK:
        use.refuse("makes too many different shifts to follow", left, unknown=True)
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
        use.refuse("is followed for equations without repeated indices only", unknown=True)
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
