r"""Steps by torch's operations on matrices whose rows are groups: chunks that stay in cache, small weights together.

Where the direction of a step is its moment p times a number of each sphere (momentum without Nesterov's look ahead,
and Adam), the step needs no inner products beforehand, and nine operations on rows that stay in cache:

.. math:: p ← μ b + c\, r^2 g, \quad p ← p - w ⟨w, p⟩/⟨w, w⟩, \quad w ← w - t ‖w‖ p, \quad
          w' = w r/‖w‖, \quad b' = p + w' \frac{t ‖p‖^2}{r (1 + t^2 ‖p‖^2)^½}

with ``t`` the learning rate over r, times Adam's factor. It is the step of `manifold_nets.optim.backends.reference` to
rounding. Elsewhere the inner products of all weights come first, then the coefficients of all their groups at once,
then the writing.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from manifold_nets.groups import accumulation_dtype
from manifold_nets.optim.backends.compiled import step_compiled
from manifold_nets.optim.backends.inputs import Batch, mark_written
from manifold_nets.optim.backends.products import CHUNK, GroupView, Scalar, some
from manifold_nets.optim.backends.reference import combine_
from manifold_nets.optim.backends.rule import Coefficients, Rule, StepInput, adam_factor, bias_corrections
from manifold_nets.optim.backends.views import (
    columns_of,
    rows_of,
    small_together,
    what_to_write,
    without_radial_parts,
    write_second_moments,
)

__all__ = ["run_batched", "run_compiled"]

# Entries of a chunk where all that a step reads may have to be copied to float32.
_COPIED = 2**18


def run_batched(rule: Rule, members: Batch) -> None:
    """Step weights that `suits_rows` by torch's operations, large ones in chunks and small ones together."""
    for (*_, is_precise), alike in members.alike(_kind):
        batch, dampening, step = [rows_of(m) for m in alike], alike[0].dampening, alike[0].step
        if is_precise and rule.follows_moment:
            step_along_moment(rule, batch, dampening, step)
            continue
        with small_together(batch) as matrices:
            _step_all(rule, matrices, dampening, step)


def run_compiled(rule: Rule, members: Batch) -> None:
    """Step weights that `suits_rows` by a kernel that torch compiles for matrices of any size."""
    for _, alike in members.alike(_kind):
        step_compiled(rule, [rows_of(m) for m in alike], alike[0].dampening, alike[0].step)
    mark_written(members)


def _kind(m: StepInput) -> tuple[Any, ...]:
    """What weights have in common whose coefficients are computed together; whether none has to be cast, at last."""
    compute = accumulation_dtype(m.weight.dtype)
    is_precise = m.moment is not None and m.moment.dtype == m.weight.dtype == m.gradient.dtype == compute
    return m.dampening, m.step, m.moment is None, m.second is None, compute, m.weight.device, is_precise


def _step_all(rule: Rule, matrices: Sequence[GroupView], dampening: float, step: float) -> None:
    """Take the inner products of all matrices, find the coefficients of all their rows at once, and write."""
    chunks = (chunk.wide() for rows in matrices for chunk in rows.chunks(_COPIED))
    products = torch.cat([torch.cat(chunk.products(), 1) for chunk in chunks]).t()
    matrices, factors, far, carried = what_to_write(rule, matrices, products, dampening, step)
    is_far, start = some(far), 0
    for chunk in (chunk for rows in matrices for chunk in rows.chunks(_COPIED)):
        end = start + len(chunk.weight)
        beyond, wide = far[start:end], chunk.wide()
        ww, wb, wg, bw, bb, bg = torch.split(factors[start:end], 1, 1)
        move = Coefficients(ww, wb, wg, bw, bb, bg, beyond, carried)
        combine_(wide, move, beyond if is_far and some(beyond) else None)
        chunk.write(wide)
        start = end


# `torch.linalg.vector_norm` adds in sequence. Equal entries are rounded alike: at 8192 of them it is off by 50 machine
# epsilons, at this many entries by two at most.
_IN_SEQUENCE = 2**8
# Runs that are shorter cost more than the products of all entries.
_SHORT_RUN = 2**4
# From this many matrices on, two calls for all cost less than one for each.
_MANY = 8

# One number for each row of all matrices, and views of those of each matrix.
Column = tuple[Tensor, tuple[Tensor, ...]]


def step_along_moment(rule: Rule, matrices: Sequence[GroupView], dampening: float, step: float) -> None:
    """Take one step of all rows, in place: large matrices chunk by chunk, small ones together."""
    first = matrices[0].weight
    # Room for the products of two matrices: a new one every time would cost more than the products.
    largest = max(min(rows.weight.numel(), max(CHUNK, rows.weight.shape[1])) for rows in matrices)
    room = first.new_empty(largest) if first.is_cpu else None
    for portion in _portions(chunk for rows in matrices for chunk in rows.chunks()):
        _Portion(portion, room).step(rule, dampening, step)


def _portions(matrices: Iterable[GroupView]) -> Iterator[list[GroupView]]:
    """Yield runs of small matrices of together at most one chunk's entries; larger matrices by themselves."""
    portion: list[GroupView] = []
    entries = 0
    for rows in matrices:
        size = rows.weight.numel()
        if size > CHUNK // 2:
            yield [rows]
            continue
        if portion and entries + size > CHUNK:
            yield portion
            portion, entries = [], 0
        portion.append(rows)
        entries += size
    if portion:
        yield portion


class _Portion:
    """Matrices that take a step together, with the numbers of their rows in columns for all of them."""

    def __init__(self, matrices: Sequence[GroupView], room: Tensor | None) -> None:
        self.matrices, self.room = matrices, room if len(matrices) < _MANY else None
        self.sizes = [len(rows.weight) for rows in matrices]
        self.w = [rows.weight for rows in matrices]
        self.b = [rows.moment for rows in matrices if rows.moment is not None]

    def step(self, rule: Rule, dampening: float, step: float) -> None:
        w, b, g, gain = self.w, self.b, [rows.gradient for rows in self.matrices], 1 - dampening
        norm, norms = self.norms(w)
        squares = norm.square()
        radius, second = columns_of(self.matrices, norm.dtype)
        turn: Scalar = float(rule.lr) / radius
        if second is not None:
            gain, (g, square) = 1 - rule.beta1, self.gradients(squares, g)
            corrections = bias_corrections(rule.beta1, rule.beta2, step)
            square.mul_(radius * radius)
            turn = turn * adam_factor(square, *second, beta2=rule.beta2, eps=rule.eps, corrections=corrections)
            write_second_moments(self.matrices, second)
        self.take_up(g, rule.beta1, (-gain if rule.maximize else gain) * radius * radius)
        slope, slopes = self.dots(w, b)
        slope.div_(squares)
        torch._foreach_addcmul_(b, w, slopes, value=-1)
        if rule.lr == 0:
            return  # the weights stay as they are, bit for bit
        length, lengths = self.norms(b)
        length.square_()
        reach = norm.mul_(turn)
        moved = (reach * length).mul_(reach)  # the sides of a right angle are w and what it moves by
        # What was taken off the moment has left its rounding in it.
        whole = (slope * reach).square_().mul_(squares).add_(moved)
        torch._foreach_addcmul_(w, b, norms, value=-1)
        # In the places of numbers that are needed no more: the factor of w, and of w in b.
        if some(whole > squares):  # steps with a part of more than a radian, whose ends are measured
            # A norm out of range would send a group to zero without a word; 0·∞ makes it NaN, as it should be.
            slope.copy_((radius + 0.0 * moved) / self.norms(w)[0])
            torch.mul(self.dots(w, b)[0], slope, out=length).neg_()
        else:
            torch.div(radius, moved.add_(squares).sqrt_(), out=slope)
            length.mul_(reach).mul_(slope)
        torch._foreach_mul_(w, slopes)
        length.div_(radius * radius)
        torch._foreach_addcmul_(b, w, lengths)

    def gradients(self, squares: Tensor, g: list[Tensor]) -> tuple[list[Tensor], Tensor]:
        """Return the gradients to take, and the squared length of the tangential part of each row's."""
        products = squares, self.dots(self.w, g)[0], self.norms(g)[0].square_()
        matrices, (ww, wg, gg), _ = without_radial_parts(self.matrices, products)
        return [rows.gradient for rows in matrices], torch.addcmul(gg, wg / ww, wg, value=-1).clamp_min_(0)

    def take_up(self, g: list[Tensor], beta: float, share: Scalar) -> None:
        """Let the moment become ``μ b + share g``, in one pass where there is an operation for it."""
        if isinstance(share, Tensor):
            torch._foreach_mul_(self.b, beta)
            torch._foreach_addcmul_(self.b, g, share.split_with_sizes(self.sizes))
        elif share == 1 - beta:
            torch._foreach_lerp_(self.b, g, share)
        elif share == 1 and len(g) < _MANY:
            for b, gradient in zip(self.b, g, strict=True):
                torch.add(gradient, b, alpha=beta, out=b)
        else:
            torch._foreach_mul_(self.b, beta)
            torch._foreach_add_(self.b, g, alpha=share)

    def column(self) -> Column:
        values = self.w[0].new_empty(sum(self.sizes), 1)
        return values, values.split_with_sizes(self.sizes)

    def dots(self, x: list[Tensor], y: list[Tensor]) -> Column:
        found = self.column()
        room = self.room
        products: Iterable[Tensor] = (
            torch._foreach_mul(x, y)
            if room is None
            else (torch.mul(a, b, out=room[: a.numel()].view(a.shape)) for a, b in zip(x, y, strict=True))
        )
        for product, out in zip(products, found[1], strict=True):
            torch.sum(product, 1, keepdim=True, out=out)
        return found

    def norms(self, x: list[Tensor]) -> Column:
        found = self.column()
        for each, out in zip(x, found[1], strict=True):
            _norms(each, out)
        return found


@functools.lru_cache(maxsize=4096)
def _run_of(size: int) -> int:
    """Return the length of the runs in which the squares of a row are added in sequence: a divisor of its size."""
    return next(run for run in range(min(size, _IN_SEQUENCE), 0, -1) if size % run == 0)


def _norms(x: Tensor, out: Tensor) -> None:
    """Take the norms of rows: of runs that may be added in sequence, then of the norms of these."""
    while (size := x.shape[1]) > _IN_SEQUENCE:
        run = _run_of(size)
        if run < _SHORT_RUN:
            torch.sum(x * x, 1, keepdim=True, out=out).sqrt_()
            return
        x = torch.linalg.vector_norm(x.view(-1, size // run, run), dim=2)
    torch.linalg.vector_norm(x, dim=1, keepdim=True, out=out)
