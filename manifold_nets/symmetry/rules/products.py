"""Products of matrices and vectors, all of them Einstein sums."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch.fx import Node

from manifold_nets.symmetry.equations import Ids, Label
from manifold_nets.symmetry.rules.arithmetic import add_to
from manifold_nets.symmetry.rules.table import Table
from manifold_nets.symmetry.rules.use import LARGEST_LINK, Result, Use, shape_of, unscaled

# Up to this many pairs of contracted entries are compared pair by pair; beyond, each factor needs one scale.
_LARGEST_PRODUCT = 200_000
_Factors = Sequence[tuple[Any, Sequence[str]]]


def table() -> Table:
    """Operation → what it does to a scale, and to a shift."""
    return {
        "matmul mm bmm einsum _sparse_mm mv dot vdot inner outer ger": (product, product_of_shifts),
        "addmm baddbmm addbmm addmv": (added_product, added_product_of_shifts),
    }


def product(use: Use) -> Result:
    """Products of tensors: the products of the entries that are summed need one scale."""
    factors, result = _indices(use)
    return Label.compressed(contracted(use, factors, result))


def added_product(use: Use) -> Result:
    """``β b + α x W``: a product to which a tensor is added, scaled along where it is a parameter."""
    factors, result = _indices(use)
    alpha, beta = (float(use.args.get(factor, 1)) for factor in ("alpha", "beta"))
    ids = contracted(use, factors, result) if alpha else unscaled(len(result))
    if not beta:
        return Label.compressed(ids)
    return add_to(use, ids) if alpha else use.label("self")


def contracted(use: Use, factors: _Factors, result: Sequence[str]) -> Ids:
    """Ids of a product; one scale is demanded of all that is summed.

    Args:
        use: the operation.
        factors: the factors, each with the names of its axes.
        result: the names of the axes of the result.
    """
    scaled = [(label.ids, names) for factor, names in factors if (label := use.label_of(factor)) is not None]
    every = list(dict.fromkeys(name for _, names in scaled for name in names))
    summed = [every.index(name) for name in every if name not in result]
    spread = [_spread(ids, names, every) for ids, names in scaled]
    if np.prod(np.broadcast_shapes(*(ids.shape for ids in spread))) > _LARGEST_PRODUCT:
        spread = [use.merge(ids, summed) for ids in spread]
    total = unscaled(len(every))
    for ids in spread:
        total = use.scales.sum(total, ids)
    kept = use.merge(total, summed).squeeze(tuple(summed))
    return _spread(kept, [name for name in every if name in result], result)


def product_of_shifts(use: Use) -> Result:
    """What the shifts of the factors make."""
    return Label.compressed(_images(use))


def added_product_of_shifts(use: Use) -> Result:
    """A product that is added to a tensor."""
    ids = use.scales.times(use.ids("self"), float(use.args.get("beta", 1)))
    return Label.compressed(use.scales.sum(ids, _images(use)) if float(use.args.get("alpha", 1)) else ids)


def _images(use: Use) -> Ids:
    """Sum of what the shifts of the factors make: each stays constant along the axes that only its factor has.

    The product of several shifts has the pattern of these, whose unknowns are arbitrary.
    """
    factors, result = _indices(use)
    shifted = [(place, label) for place, (factor, _) in enumerate(factors) if (label := use.label_of(factor))]
    if len(shifted) > 1 and int(np.prod(use.out_shape)) > LARGEST_LINK:
        for _, label in shifted[:-1]:
            use.refuse("makes too many different shifts to follow", label, unknown=True)
        del shifted[:-1]
    total = unscaled(len(result))
    for place, label in shifted:
        have = dict(zip(factors[place][1], label.ids.shape, strict=True))
        others = {name for _, names in (*factors[:place], *factors[place + 1 :]) for name in names}
        sizes = zip(result, use.out_shape, strict=True)
        shape = [have[name] if name in have and name not in others else n for name, n in sizes]
        total = use.scales.sum(total, use.image(label.ids, shape, "multiplies with a tensor"))
    return total


def _spread(ids: Ids, names: Sequence[str], every: Sequence[str]) -> Ids:
    """Ids with one axis for each index of a list, of size 1 where the tensor does not have it."""
    order = sorted(range(len(names)), key=lambda axis: every.index(names[axis]))
    sizes = {names[axis]: ids.shape[axis] for axis in order}
    return ids.transpose(order).reshape([sizes.get(name, 1) for name in every])


def _indices(use: Use) -> tuple[_Factors, list[str]]:
    """The factors of a product, each with the names of its axes, and those of the result.

    Raises:
        ValueError: an index occurs twice in a factor, or an inner product is none of vectors.
    """
    factors: list[Any] = [value for value in use.args.values() if isinstance(value, Node)][-2:]
    if use.op == "einsum":
        factors, equation = use.args["tensors"], str(use.args["equation"])
    elif use.op in ("outer", "ger", "addbmm"):
        equation = "bij,bjk->ik" if use.op == "addbmm" else "i,j->ij"
    else:
        left, right = (len(shape_of(factor)) > 1 for factor in factors)
        if use.op == "inner" and right:
            raise ValueError("the second factor is no vector")
        equation = f"...{'i' * left}j,...j{'k' * right}->...{'i' * left}{'k' * right}"
    indices, result = einsum_indices(equation, [len(shape_of(factor)) for factor in factors])
    if any(len(set(names)) < len(names) for names in indices):
        raise ValueError("an index occurs twice in a factor")
    return list(zip(factors, indices, strict=True)), result


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
