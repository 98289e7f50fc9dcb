r"""A step along the moment, operation by operation on rows that stay in cache: what is usual needs no more than nine.

Where the direction is the moment p itself times a number of each sphere (momentum without Nesterov's look ahead, and
Adam), the step has no need of all inner products beforehand:

.. math:: p ← μ b + c\, r^2 g, \quad p ← p - w ⟨w, p⟩/⟨w, w⟩, \quad w ← w - t ‖w‖ p, \quad
          w' = w r/‖w‖, \quad b' = p + w' \frac{t ‖p‖^2}{r (1 + t^2 ‖p‖^2)^½}

with ``t`` the learning rate over r, times Adam's factor. Each operation passes over a block of rows; it is the step of
`manifold_nets.optim.backends.reference` to rounding.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from manifold_nets.optim.backends.products import (
    Scalar,
    noise_in,
    radial_share,
    rounding_of,
    some,
    tangential_of,
)
from manifold_nets.optim.backends.rule import Rule, adam_factor, bias_corrections
from manifold_nets.optim.backends.views import CHUNK, GroupView, keep_second_moments, portions, radii, second_moments

__all__ = ["follows_moment", "step_along_moment"]

# `torch.linalg.vector_norm` adds in sequence. Equal entries are rounded alike: at 8192 of them it is off by 50 machine
# epsilons, at this many entries by two at most.
_IN_SEQUENCE = 2**8
# Runs that are shorter cost more than the products of all entries.
_SHORT_RUN = 2**4
# From this many matrices on, two calls for all cost less than one for each.
_MANY = 8


def follows_moment(rule: Rule) -> bool:
    """Whether a step is along the moment; it is taken so where all is at hand in the dtype to compute in."""
    return not rule.nesterov and rule.has_kernel


def step_along_moment(rule: Rule, matrices: Sequence[GroupView], dampening: float, step: float) -> None:
    """Take one step of all rows, in place: large matrices chunk by chunk, small ones together."""
    first = matrices[0].weight
    # Room for the products of two matrices: a new one every time would cost more than the products.
    largest = max(min(rows.weight.numel(), max(CHUNK, rows.weight.shape[1])) for rows in matrices)
    room = first.new_empty(largest) if first.is_cpu else None
    for portion in portions(chunk for rows in matrices for chunk in rows.chunks()):
        _Step(rule, portion, room).take(dampening, step)


@functools.lru_cache(maxsize=4096)
def _run_of(size: int) -> int:
    """Return the length of the runs in which the squares of a row are added in sequence: a divisor of its size."""
    return next(run for run in range(min(size, _IN_SEQUENCE), 0, -1) if size % run == 0)


class _Column:
    """A number for each row of all matrices, and the views of those of each matrix."""

    def __init__(self, values: Tensor, sizes: list[int]) -> None:
        self.values, self.parts = values, values.split_with_sizes(sizes)


class _Step:
    """One step of some matrices, with the numbers of their rows in columns for all of them."""

    def __init__(self, rule: Rule, matrices: Sequence[GroupView], room: Tensor | None) -> None:
        self.rule, self.matrices = rule, matrices
        self.room = room if len(matrices) < _MANY else None
        self.w = [rows.weight for rows in matrices]
        self.g = [rows.gradient for rows in matrices]
        self.b = [rows.moment for rows in matrices if rows.moment is not None]
        self.sizes = [w.shape[0] for w in self.w]
        self.radius = radii(matrices)

    def take(self, dampening: float, step: float) -> None:
        w, b, radius, rule = self.w, self.b, self.radius, self.rule
        norm, gain, turn = self.norms(w), 1 - dampening, float(rule.lr) / radius
        norms = norm.values
        squares = norms.square()
        second = second_moments(self.matrices)
        if second is not None:
            gain, turn = 1 - rule.beta1, turn * self.adam_factor(second, squares, step)
        self.take_up((-gain if rule.maximize else gain) * radius * radius)
        slope = self.dots(w, b)
        slope.values.div_(squares)
        self.add(b, w, slope, -1)
        if rule.lr == 0:
            return  # the weights stay as they are, bit for bit
        length = self.norms(b)
        lengths = length.values.square_()
        reach = norms.mul_(turn)
        moved = (reach * lengths).mul_(reach)  # the sides of a right angle are w and what it moves by
        # What was taken off the moment has left its rounding in it.
        whole = (slope.values * reach).square_().mul_(squares).add_(moved)
        self.add(w, b, norm, -1)
        # In the places of numbers that are needed no more: the factor of w, and of w in b.
        scale, overlap = slope, length
        if some(whole > squares):  # steps with a part of more than a radian, whose ends are measured
            # A norm out of range would send a group to zero without a word; 0·∞ makes it NaN, as it should be.
            scale.values.copy_((radius + 0.0 * moved) / self.norms(w).values)
            torch.mul(self.dots(w, b).values, scale.values, out=overlap.values).neg_()
        else:
            torch.div(radius, moved.add_(squares).sqrt_(), out=scale.values)
            overlap.values.mul_(reach).mul_(scale.values)
        torch._foreach_mul_(w, scale.parts)
        overlap.values.div_(radius * radius)
        self.add(b, w, overlap, 1)

    def take_up(self, share: Scalar) -> None:
        """Let the moment become ``μ b + share g``, in one pass where there is an operation for it."""
        beta = self.rule.beta1
        if isinstance(share, Tensor):
            torch._foreach_mul_(self.b, beta)
            self.add(self.b, self.g, _Column(share, self.sizes), 1)
        elif share == 1 - beta:
            torch._foreach_lerp_(self.b, self.g, share)
        elif share == 1 and len(self.b) < _MANY:
            for b, g in zip(self.b, self.g, strict=True):
                torch.add(g, b, alpha=beta, out=b)
        else:
            torch._foreach_mul_(self.b, beta)
            torch._foreach_add_(self.b, self.g, alpha=share)

    def adam_factor(self, second: tuple[Tensor, Tensor | None], squares: Tensor, step: float) -> Tensor:
        """Return by what Adam multiplies the moment of each row, and update the second moments."""
        rule = self.rule
        dots = self.without_radial_parts([squares, *self.products_of(self.g)])
        found = tangential_of(dots, self.radius * self.radius, maximize=rule.maximize)
        corrections = bias_corrections(rule.beta1, rule.beta2, step)
        factor = adam_factor(found, *second, beta2=rule.beta2, eps=rule.eps, corrections=corrections)
        keep_second_moments(self.matrices, second)
        return factor

    def products_of(self, g: list[Tensor]) -> list[Tensor]:
        """Return ⟨w, g⟩ and ⟨g, g⟩ of each row."""
        return [self.dots(self.w, g).values, self.norms(g).values.square_()]

    def without_radial_parts(self, dots: list[Tensor]) -> Sequence[Tensor]:
        """Let tangential parts take the place of gradients that are mostly radial; see `without_radial_part`."""
        taken = radial_share(dots)
        if not some(taken):
            return dots
        rounding = rounding_of(self.g[0].dtype)
        parts = list(torch._foreach_addcmul(self.g, self.w, _Column(taken, self.sizes).parts, value=-1))
        found = [dots[0], *self.products_of(parts)]
        is_noise = noise_in(found, taken, dots[2], rounding)
        torch._foreach_mul_(parts, _Column((~is_noise).to(taken.dtype), self.sizes).parts)
        self.g = parts
        return [dots[0], *(x.masked_fill_(is_noise, 0) for x in found[1:])]

    def add(self, to: list[Tensor], what: list[Tensor], share: _Column, sign: int) -> None:
        torch._foreach_addcmul_(to, what, share.parts, value=sign)

    def column(self) -> _Column:
        return _Column(self.w[0].new_empty(sum(self.sizes), 1), self.sizes)

    def dots(self, x: list[Tensor], y: list[Tensor]) -> _Column:
        found = self.column()
        if self.room is None:
            products: Sequence[Tensor] = torch._foreach_mul(x, y)
            for product, out in zip(products, found.parts, strict=True):
                torch.sum(product, 1, keepdim=True, out=out)
            return found
        for a, b, out in zip(x, y, found.parts, strict=True):
            product = torch.mul(a, b, out=self.room[: a.numel()].view(a.shape))
            torch.sum(product, 1, keepdim=True, out=out)
        return found

    def norms(self, x: list[Tensor]) -> _Column:
        found = self.column()
        for each, out in zip(x, found.parts, strict=True):
            _norms(each, out)
        return found


def _norms(x: Tensor, out: Tensor) -> None:
    """Take the norms of rows: of runs that may be added in sequence, then of the norms of these."""
    while (size := x.shape[1]) > _IN_SEQUENCE:
        run = _run_of(size)
        if run < _SHORT_RUN:
            torch.sum(x * x, 1, keepdim=True, out=out).sqrt_()
            return
        x = torch.linalg.vector_norm(x.view(-1, size // run, run), dim=2)
    torch.linalg.vector_norm(x, dim=1, keepdim=True, out=out)
