"""Unknown scales in a network: labels on tensors, and the linear equations between the scales.

Parts of the weights get unknown positive scales α_1 … α_n, which are followed through the graph. An entry of a tensor
is then multiplied by a product ``Π α_k ** c_k``: a *form*, linear in the logarithms. A `Label` holds the form of each
entry of a tensor. Operations put conditions on the forms: the terms of a sum must be scaled alike (`Scales.join`), and
an entry that a non-homogeneous operation reads must not be scaled at all (`Scales.pin`). These conditions are
homogeneous linear equations, solved as they arrive; the scales that stay free are the symmetries.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

__all__ = ["UNSCALED", "Break", "Certainty", "Form", "Ids", "Label", "Scales"]

Ids = NDArray[np.int64]
Form = dict[int, float]
Certainty = Literal["smooth", "jump", "cautious"]
UNSCALED = 0
# Exponents are small rationals; what is left of one by cancellation is rounding. Those whose denominator divides this
# number are kept as exactly as floats can, so that three thirds are one.
_NOTHING = 1e-9
_DENOMINATORS = 55_440


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

    Forms are numbered: 0 is the empty form, ``k + 1`` the form that is just scale ``k``, and negative numbers stand for
    products and powers. Nearly all equations are between single scales; they are solved in arrays.
    """

    def __init__(self, count: int = 0) -> None:
        self.count = 0
        # What takes the place of each scale (after the empty form) and of each product, in one step or several.
        self._next = np.zeros(1, dtype=np.int64)
        self._next_product = np.zeros(0, dtype=np.int64)
        self._products: list[Form] = []
        self._pairs = np.zeros((0, 2), dtype=np.int64)  # the scales of each product of two, negative for longer ones
        self._numbers: dict[frozenset[tuple[int, float]], int] = {}
        self._solved: set[int] = set()
        # Of each scale that is solved, what it was replaced by at first, and the number of the reason.
        self._replaced = np.zeros(0, dtype=np.int64)
        self._reason = np.zeros(0, dtype=np.int64)
        self._reasons: list[Break] = []
        self._ends: dict[int, Break] = {}
        # Called after equations were solved: may add what follows from them.
        self.on_solved: Callable[[], None] = lambda: None
        # Called with products that have to vanish: may pin some of their scales, all at once, in place of equations.
        self.on_pinned: Callable[[Ids], None] = lambda ids: None
        self.add(count)

    def add(self, count: int) -> Ids:
        """Introduce new scales and return the numbers of their forms."""
        numbers = np.arange(self.count + 1, self.count + count + 1, dtype=np.int64)
        self.count += count
        self._next = np.concatenate([self._next, numbers])
        self._replaced = np.concatenate([self._replaced, numbers])
        self._reason = np.concatenate([self._reason, np.full(count, -1)])
        return numbers

    # ---- forms -----------------------------------------------------------------------------------------------------

    def form(self, number: int) -> Form:
        """The form of this number in terms of the scales that are still free."""
        root = self._root(number)
        return self._products[-root - 1] if root < 0 else {root - 1: 1.0} if root else {}

    def scales_in(self, ids: Ids) -> Ids:
        """The free scales that occur in some forms, in order."""
        roots = self._distinct(self.roots(ids))
        products = [np.fromiter(self._products[-n - 1], np.int64) for n in roots[roots < 0].tolist()]
        return np.unique(np.concatenate([roots[roots > 0] - 1, *products]))

    def roots(self, ids: Ids) -> Ids:
        """Replace each form by what the equations make of it: equal forms get equal numbers."""
        found = ids
        while self._solved:
            if self._products:
                numbers = self._distinct(found[found < 0])
                pairs = self._pairs[-numbers - 1]
                for number in numbers[(pairs[:, 0] < 0) | (self._reason[pairs] >= 0).any(1)].tolist():
                    self._refresh(number)
            further = self._step(found)
            if np.array_equal(further, found):
                break
            found = further
        return found

    def sum(self, left: Ids, right: Ids, sign: float = 1.0) -> Ids:
        """Numbers of the forms of a product (or, with sign −1, of a quotient), entry by entry."""
        left, right = np.broadcast_arrays(self.roots(left), self.roots(right))
        result = np.where(right == UNSCALED, left, right)
        mixed = (right != UNSCALED) & (left != UNSCALED if sign == 1.0 else True)
        if sign == -1.0:
            result = np.where(left == right, UNSCALED, result)
            mixed &= left != right
        if mixed.any():
            a, b, inverse = _distinct_pairs(left[mixed], right[mixed])
            forms = (self._sum(m, n, sign) for m, n in zip(a.tolist(), b.tolist(), strict=True))
            result = result.copy()
            result[mixed] = np.array([self._number(form) for form in forms], dtype=np.int64)[inverse]
        return result

    def _sum(self, left: int, right: int, sign: float) -> Form:
        if left > 0 and right > 0 and left != right:
            return {left - 1: 1.0, right - 1: sign}
        return _plus(self.form(left), self.form(right), sign)

    def times(self, ids: Ids, exponent: float) -> Ids:
        """Numbers of the forms of a power."""
        roots = self.roots(ids)
        result = np.zeros_like(roots)
        for number in self._distinct(roots).tolist():
            power = {k: _exact(c * exponent) for k, c in self.form(number).items() if exponent}
            result[roots == number] = self._number(power)
        return result

    # ---- conditions ------------------------------------------------------------------------------------------------

    def join(self, left: Ids, right: Ids, because: Break) -> None:
        """Require equal forms entry by entry."""
        left, right = np.broadcast_arrays(self.roots(left), self.roots(right))
        different = left != right
        if not different.any():
            return
        self._reasons.append(because)
        reason = len(self._reasons) - 1
        left, right = left[different], right[different]
        single = (left >= 0) & (right >= 0)
        self._unite(left[single], right[single], reason)
        self.on_solved()
        if single.all():
            return
        left, right, _ = _distinct_pairs(left[~single], right[~single])
        self.on_pinned(np.where(right == UNSCALED, left, right)[(left == UNSCALED) | (right == UNSCALED)])
        count = 8
        while True:
            left, right = self.roots(left), self.roots(right)
            left, right = left[left != right], right[left != right]
            single = (left >= 0) & (right >= 0)
            if single.any():
                self._unite(left[single], right[single], reason)
            elif len(left):
                # A few equations between products often settle thousands: what they leave different goes on.
                for m, n in zip(left[:count].tolist(), right[:count].tolist(), strict=True):
                    self._solve(_plus(self.form(m), self.form(n), -1.0), reason)
                left, right, count = left[count:], right[count:], 2 * count
            else:
                return
            self.on_solved()

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
        numbers = self._distinct(self.roots(ids))
        self.join(numbers, np.zeros_like(numbers), because)

    def end(self, ids: Ids, because: Break) -> None:
        """Note that an operation whose result does not depend on these scales reads what they multiply."""
        for number in self._distinct(self.roots(ids)).tolist():
            self._ends.setdefault(number, because)

    # ---- what is left ----------------------------------------------------------------------------------------------

    @property
    def solved(self) -> int:
        """How many scales equations express by others."""
        return len(self._solved)

    @property
    def free(self) -> list[int]:
        """The scales that no equation expresses by others: one symmetry each."""
        return np.flatnonzero(self._reason < 0).tolist()

    def is_free(self, scales: Any) -> Any:
        """Which of some scales no equation expresses by others."""
        return self._reason[scales] < 0

    def is_pinned(self, number: int) -> bool:
        """Whether nothing is left of a form."""
        return self._root(number) == UNSCALED

    @property
    def all_pinned(self) -> bool:
        """True where no scale is free any more."""
        return self.solved == self.count

    def break_of(self, scale: int) -> Break | None:
        """Why the scale is pinned to 1, or None where it is not."""
        if self.form(scale + 1):
            return None
        replaced = int(self._replaced[scale])
        for partner in self._products[-replaced - 1] if replaced < 0 else [replaced - 1] if replaced else []:
            found = self.break_of(partner)
            if found is not None:
                return found
        return self._reasons[int(self._reason[scale])]

    def ends(self) -> dict[int, Break]:
        """For each free scale the first operation that it ends at, if any."""
        found: dict[int, Break] = {}
        for number, because in self._ends.items():
            for scale in self.form(number):
                found.setdefault(scale, because)
        return found

    def classes(self, first: int | None = None) -> dict[int, list[int]]:
        """Scales, or the first ones of them, that have to be equal, by the number of their common form."""
        found: dict[int, list[int]] = {}
        count = self.count if first is None else first
        for scale, number in enumerate(self.roots(np.arange(1, count + 1, dtype=np.int64)).tolist()):
            found.setdefault(number, []).append(scale)
        return found

    def allows(self, logarithms: NDArray[np.float64]) -> bool:
        """Whether these logarithms of the first scales satisfy every equation among them; later ones follow."""
        numbers = self.roots(np.arange(1, len(logarithms) + 1, dtype=np.int64))
        values = np.append(0.0, logarithms)[np.maximum(numbers, 0)]
        for place in np.flatnonzero(numbers < 0).tolist():
            values[place] = sum(c * logarithms[k] for k, c in self._products[-numbers[place] - 1].items())
        return bool((np.abs(values - logarithms) <= _NOTHING).all())

    # ---- elimination -----------------------------------------------------------------------------------------------

    def _unite(self, left: Ids, right: Ids, reason: int) -> None:
        """Require that pairs of single scales, or of a scale and nothing, are equal: the oldest of them stays."""
        numbers = self._distinct(np.concatenate([left, right]))
        oldest = np.arange(len(numbers))
        if 16 * len(left) < self.count:
            a, b = np.searchsorted(numbers, left), np.searchsorted(numbers, right)
        else:
            place = np.zeros(self.count + 1, dtype=np.int64)
            place[numbers] = oldest
            a, b = place[left], place[right]
        while True:
            before = oldest.copy()
            low = np.minimum(oldest[a], oldest[b])
            np.minimum.at(oldest, before[a], low)
            np.minimum.at(oldest, before[b], low)
            oldest = oldest[oldest]
            if (oldest == before).all():
                break
        changed = oldest != np.arange(len(numbers))
        self._replace(numbers[changed] - 1, numbers[oldest[changed]], reason)

    def _solve(self, equation: Form, reason: int) -> None:
        """Solve ``equation = 0`` for its newest scale."""
        if equation:
            pivot = max(equation)
            rest = {k: _exact(-c / equation[pivot]) for k, c in equation.items() if k != pivot}
            self._next[pivot + 1] = self._replaced[pivot] = self._number(rest)
            self._reason[pivot] = reason
            self._solved.add(pivot)

    def _replace(self, scales: Ids, numbers: Ids, reason: int) -> None:
        """Put forms in the place of free scales."""
        self._next[scales + 1] = self._replaced[scales] = numbers
        self._reason[scales] = reason
        self._solved.update(scales.tolist())

    def _refresh(self, number: int) -> None:
        """Write a product in terms of free scales."""
        form = self._products[-number - 1]
        if self._next_product[-number - 1] == number and not self._solved.isdisjoint(form):
            kept = {k: c for k, c in form.items() if k not in self._solved}
            for k in form.keys() - kept.keys():
                kept = _plus(kept, self.form(k + 1), form[k])
            self._next_product[-number - 1] = self._number(kept)

    def _root(self, number: int) -> int:
        """`roots` of one number, without arrays."""
        while True:
            if number < 0:
                self._refresh(number)
            found = int(self._next_product[-number - 1] if number < 0 else self._next[number])
            if found == number:
                return found
            number = found

    def _distinct(self, ids: Ids) -> Ids:
        """The different numbers among many, without sorting them. Products count from the end, as numpy does it."""
        size = self.count + 1 + len(self._products)
        if 64 * ids.size < size:
            return np.unique(ids)
        seen = np.zeros(size, dtype=bool)
        seen[ids] = True
        numbers = np.flatnonzero(seen)
        numbers[numbers > self.count] -= len(seen)
        return numbers

    def _step(self, ids: Ids) -> Ids:
        """What takes the place of each form."""
        if not self._products:
            return self._next[ids]
        return np.where(ids < 0, self._next_product[np.maximum(-ids - 1, 0)], self._next[np.maximum(ids, 0)])

    def _number(self, form: Form) -> int:
        """The number of a form, a new one where it is not known."""
        if not form:
            return UNSCALED
        if len(form) == 1:
            ((scale, exponent),) = form.items()
            if exponent == 1.0:
                return scale + 1
        key = frozenset(form.items())
        number = self._numbers.get(key)
        if number is None:
            place = len(self._products)
            number = self._numbers[key] = -place - 1
            self._products.append(form)
            if place == len(self._next_product):
                self._next_product = np.concatenate([self._next_product, np.arange(-place - 1, -2 * place - 65, -1)])
                self._pairs = np.concatenate([self._pairs, np.full((place + 64, 2), -1)])
            if len(form) == 2:
                self._pairs[place] = tuple(form)
        return number


def _distinct_pairs(left: Ids, right: Ids) -> tuple[Ids, Ids, NDArray[np.intp]]:
    """The different pairs of numbers that meet, and for each entry the number of its pair.

    One integer for each pair: numpy sorts pairs as rows many times slower.
    """
    low = int(right.min())
    base = int(right.max()) - low + 1
    keys, inverse = np.unique(left * base + (right - low), return_inverse=True)
    return keys // base, keys % base + low, inverse.reshape(-1)


def _plus(left: Form, right: Form, factor: float) -> Form:
    result = dict(left)
    for k, c in right.items():
        total = result.get(k, 0.0) + factor * c
        if abs(total) > _NOTHING:
            result[k] = _exact(total)
        else:
            result.pop(k, None)
    return result


def _exact(exponent: float) -> float:
    """An exponent without the rounding of what it was computed from."""
    numerator = round(exponent * _DENOMINATORS)
    near = abs(exponent * _DENOMINATORS - numerator) <= _DENOMINATORS * _NOTHING
    return numerator / _DENOMINATORS if near else round(exponent, 12)
