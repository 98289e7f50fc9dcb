"""How unknown scales run through a network: labels on tensors, and what the scales have to satisfy.

Give parts of the weights unknown positive scales α_1 … α_n and follow them through the graph. An entry of a tensor is
then multiplied by a product ``Π α_k ** c_k``: a *form*, linear in the logarithms. A `Label` says which form each entry
of a tensor has. Operations put conditions on the forms: a sum of two entries needs both scaled alike (`Scales.join`),
an entry that a non-homogeneous operation reads must not be scaled at all (`Scales.pin`). The conditions are
homogeneous linear equations, solved as they come; what they leave free are the symmetries.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

__all__ = ["UNSCALED", "Break", "Certainty", "Form", "Ids", "Label", "Scales"]

Ids = NDArray[np.int64]
Form = dict[int, float]
Certainty = Literal["smooth", "jump", "cautious"]
UNSCALED = 0
# Exponents are small rationals; what is left of one by cancellation is rounding.
_NOTHING = 1e-9


@dataclass(frozen=True)
class Label:
    """The number of the form by which each entry of a tensor is multiplied; 0 marks an entry that no scale reaches.

    ``ids`` broadcasts to the shape of the tensor: axes along which the label does not vary have size 1.
    """

    ids: Ids

    @classmethod
    def compressed(cls, ids: Ids) -> Label | None:
        """Reduce every axis along which the ids do not vary to size 1; None where nothing is scaled."""
        for axis in range(ids.ndim):
            if ids.shape[axis] > 1:
                first = ids.take([0], axis)
                if (ids == first).all():
                    ids = first
        return None if (ids == UNSCALED).all() else cls(ids)

    def along(self, shape: Sequence[int], axes: Sequence[int]) -> Ids:
        """Return the ids with the given axes at their full size and the others as they are."""
        full = [n if axis in axes else have for axis, (n, have) in enumerate(zip(shape, self.ids.shape, strict=True))]
        spread: Ids = np.broadcast_to(self.ids, full)
        return spread


@dataclass(frozen=True)
class Break:
    """Why a scale is not free: the operation that refuses it and the module that runs it.

    Args:
        op: the operation.
        module: the module that runs it.
        reason: what it does to the scale.
        unknown: whether nothing is known about the operation.
        certainty: ``"smooth"``: the function certainly changes, and its derivative shows it. ``"jump"``: it certainly
            changes, but on some inputs the derivative does not show it, as at a comparison with a constant.
            ``"cautious"``: the rule covers sufficient conditions only.
    """

    op: str
    module: str
    reason: str
    unknown: bool = False
    certainty: Certainty = "cautious"

    def __str__(self) -> str:
        where = f" in {self.module}" if self.module else ""
        return f"{self.op}{where}: {self.reason}"


class Scales:
    """Unknown scales and the linear equations between their logarithms, in solved form.

    Forms are numbered: 0 is the empty form, ``k + 1`` the form that is just scale ``k``.
    """

    def __init__(self, count: int = 0) -> None:
        self.count = 0
        self._forms: list[Form] = [{}]
        self._numbers: dict[tuple[tuple[int, float], ...], int] = {(): UNSCALED}
        self._solved: dict[int, Form] = {}
        self._reasons: dict[int, tuple[Break, tuple[int, ...]]] = {}
        self._reduced: dict[int, int] = {}
        self._ends: dict[int, Break] = {}
        self.add(count)

    def add(self, count: int) -> Ids:
        """Introduce new scales and return the numbers of their forms."""
        numbers = [self._number({k: 1.0}) for k in range(self.count, self.count + count)]
        self.count += count
        return np.array(numbers, dtype=np.int64)

    # ---- forms -----------------------------------------------------------------------------------------------------

    def form(self, number: int) -> Form:
        """The form of this number in terms of the scales that are still free."""
        return self._forms[self._reduce(number)]

    def roots(self, ids: Ids) -> Ids:
        """Replace each form by what the equations make of it: equal forms get equal numbers."""
        return self._each(ids, self._reduce)

    def sum(self, left: Ids, right: Ids, sign: float = 1.0) -> Ids:
        """Numbers of the forms of a product (or, with sign −1, of a quotient), entry by entry."""
        a, b, inverse, shape = _distinct_pairs(left, right)
        pairs = zip(self.roots(a).tolist(), self.roots(b).tolist(), strict=True)
        numbers = [self._number(_plus(self._forms[m], self._forms[n], sign)) for m, n in pairs]
        return np.array(numbers, dtype=np.int64)[inverse].reshape(shape)

    def times(self, ids: Ids, exponent: float) -> Ids:
        """Numbers of the forms of a power."""
        return self._each(self.roots(ids), lambda n: self._number({k: c * exponent for k, c in self._forms[n].items()}))

    # ---- conditions ------------------------------------------------------------------------------------------------

    def join(self, left: Ids, right: Ids, because: Break) -> None:
        """Require equal forms entry by entry."""
        left, right, _, _ = _distinct_pairs(left, right)
        left, right = self.roots(left), self.roots(right)
        different = left != right
        if different.any():
            a, b, _, _ = _distinct_pairs(left[different], right[different])
            # A few equations often settle thousands: what they leave different goes on.
            count = 64
            while len(a):
                for m, n in zip(a[:count].tolist(), b[:count].tolist(), strict=True):
                    self._solve(_plus(self.form(m), self.form(n), -1.0), because)
                a, b = self.roots(a[count:]), self.roots(b[count:])
                a, b, count = a[a != b], b[a != b], 2 * count

    def merge(self, ids: Ids, axes: Sequence[int], because: Break) -> Ids:
        """Require one form along the given axes and return the ids with these axes reduced to size 1."""
        first = ids
        for axis in axes:
            first = first.take([0], axis)
        if first.shape == ids.shape:
            return first
        self.join(ids, first, because)
        return self.roots(first)

    def pin(self, ids: Ids, because: Break) -> None:
        """Require that nothing is scaled here."""
        self.join(ids, np.zeros_like(ids), because)

    def end(self, ids: Ids, because: Break) -> None:
        """Note that an operation whose result does not depend on these scales reads what they multiply."""
        for number in np.unique(self.roots(ids)).tolist():
            self._ends.setdefault(number, because)

    # ---- what is left ----------------------------------------------------------------------------------------------

    @property
    def free(self) -> list[int]:
        """The scales that no equation expresses by others: one symmetry each."""
        return [k for k in range(self.count) if k not in self._solved]

    def is_pinned(self, number: int) -> bool:
        """Whether nothing is left of a form."""
        return self._reduce(number) == UNSCALED

    @property
    def all_pinned(self) -> bool:
        """True where no scale is free any more."""
        return len(self._solved) == self.count

    def break_of(self, scale: int) -> Break | None:
        """Why the scale is pinned to 1, or None where it is not."""
        if self.form(scale + 1):
            return None
        because, partners = self._reasons[scale]
        for partner in partners:
            found = self.break_of(partner) if partner in self._reasons else None
            if found is not None:
                return found
        return because

    def end_of(self, number: int) -> Break | None:
        """The first operation that a form ends at, if any."""
        form = self.form(number)
        return next(
            (because for end, because in self._ends.items() if not form.keys().isdisjoint(self.form(end))), None
        )

    def classes(self, first: int | None = None) -> dict[int, list[int]]:
        """Scales, or the first ones of them, that have to be equal, by the number of their common form."""
        found: dict[int, list[int]] = {}
        for scale in range(self.count if first is None else first):
            found.setdefault(self._reduce(scale + 1), []).append(scale)
        return found

    def allows(self, logarithms: NDArray[np.float64]) -> bool:
        """Whether these logarithms of the first scales satisfy every equation among them; later ones follow."""
        return all(
            abs(logarithms[scale] - sum(c * logarithms[k] for k, c in form.items())) <= _NOTHING
            for scale, form in self._solved.items()
            if scale < len(logarithms)
        )

    # ---- elimination -----------------------------------------------------------------------------------------------

    def _solve(self, equation: Form, because: Break) -> None:
        """Solve ``equation = 0`` for its newest scale."""
        if not equation:
            return
        pivot = max(equation)
        rest = {k: -c / equation[pivot] for k, c in equation.items() if k != pivot}
        self._solved[pivot] = rest
        self._reasons[pivot] = (because, tuple(rest))
        self._reduced.clear()

    def _reduce(self, number: int) -> int:
        form = self._forms[number]
        if self._solved.keys().isdisjoint(form):
            return number
        known = self._reduced.get(number)
        if known is None:
            known = self._reduced[number] = self._number(self._expressed(form))
        return known

    def _expressed(self, form: Form) -> Form:
        if not any(k in self._solved for k in form):
            return form
        result: Form = {}
        for k, c in form.items():
            solved = self._solved.get(k)
            if solved is None:
                result = _plus(result, {k: 1.0}, c)
            else:
                # Kept in terms of free scales, so that chains of equations stay short.
                solved = self._solved[k] = self._expressed(solved)
                result = _plus(result, solved, c)
        return result

    def _number(self, form: Form) -> int:
        key = tuple(sorted(form.items()))
        number = self._numbers.get(key)
        if number is None:
            number = self._numbers[key] = len(self._forms)
            self._forms.append(form)
        return number

    def _each(self, ids: Ids, function: Callable[[int], int]) -> Ids:
        unique, inverse = np.unique(ids, return_inverse=True)
        return np.array([function(n) for n in unique.tolist()], dtype=np.int64)[inverse.reshape(-1)].reshape(ids.shape)


def _distinct_pairs(left: Ids, right: Ids) -> tuple[Ids, Ids, Ids, tuple[int, ...]]:
    """The different pairs of numbers that meet, for each entry the number of its pair, and the common shape.

    One integer for each pair: numpy sorts pairs as rows many times slower.
    """
    left, right = np.broadcast_arrays(left, right)
    base = int(right.max(initial=0)) + 1
    keys, inverse = np.unique(left.ravel() * base + right.ravel(), return_inverse=True)
    return keys // base, keys % base, inverse.reshape(-1), left.shape


def _plus(left: Form, right: Form, factor: float) -> Form:
    result = dict(left)
    for k, c in right.items():
        total = result.get(k, 0.0) + factor * c
        if abs(total) > _NOTHING:
            result[k] = round(total, 12)
        else:
            result.pop(k, None)
    return result
