"""Steps on CUDA and ROCm devices by kernels in Triton, for all weights of a parameter group in a few launches.

A weight is a matrix whose rows are its groups, wherever two strides lead through the rows and two through the entries
of one; so do filters, blocks, columns, heads and the filters of transposed convolutions. Where all these lie is in a
table on the device, made once and kept with the plan of a step; gradients that have moved are the only upload.

A row that fits into one tile is read once and written once: `_step` takes the whole step by the rules of SGD and Adam,
`_turn` and `_follow` those with a second moment for every entry. Longer rows, and all other rules, take two passes,
`_measure` and `_write`, between which torch computes the coefficients in float64. Nothing waits for the device: rows
that step farther than a radian, or whose gradient is mostly radial, are found and treated by the kernels themselves;
see products.py, rule.py and reference.py for the formulas. Rates and step counts may be tensors, so that a CUDA graph
can hold a step.

This module imports Triton; `manifold_nets.optim.backends.dispatch` imports it where there is a weight for it.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# The names of Triton's annotations are looked at when a kernel is made, so that they are no texts here.
# ruff: noqa: N803

import functools
import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from manifold_nets.groups import Partition, accumulation_dtype
from manifold_nets.optim.backends.inputs import Batch, mark_written
from manifold_nets.optim.backends.native import apart
from manifold_nets.optim.backends.products import radial_share, rounding_of, tangential_of
from manifold_nets.optim.backends.rule import Rule, StepInput, bias_corrections

__all__ = ["run_triton", "suits_triton"]

_TYPES = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}
# The fields of a job in the table: addresses, sizes, and the strides of rows and of entries in a row.
_FIELDS = (
    *("w", "b", "v", "v_max", "norms", "square", "squares", "step", "place", "rows", "size"),
    *("inner_rows", "outer_row", "inner_row", "inner_entries", "outer_entry", "inner_entry"),
)
_POINTERS = {"weight": "w", "moment": "b", "second": "v", "largest": "v_max", "norms": "norms"}
_STRIDES = {
    "inner_rows": (1, 0), "outer_row": (0, 1), "inner_row": (1, 1),
    "inner_entries": (3, 0), "outer_entry": (2, 1), "inner_entry": (3, 1),
}  # fmt: skip
_WIDTH = tl.constexpr(len(_FIELDS))
_W, _B, _V, _V_MAX, _NORMS, _SQUARE, _SQUARES, _STEP, _PLACE, _ROWS, _SIZE = (tl.constexpr(k) for k in range(11))
_INNER_ROWS = tl.constexpr(11)
# Columns of the numbers that `_write` reads for each row: six coefficients, see rule.Coefficients; what is taken off
# the gradient; factor of the new point, and of that in the new moment; whether the step is far.
_NUMBERS = tl.constexpr(10)


# ---- in a kernel: where entries lie ----------------------------------------------------------------------------------


@triton.jit
def _tile(
    jobs, blocks, ROWS: tl.constexpr, COLS: tl.constexpr, AXIS: tl.constexpr, STRIDED: tl.constexpr,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    """Number and job of this program's weight, rows of its tile, places of its entries, and which of both there are."""
    block = blocks + 3 * tl.program_id(0).to(tl.int64)
    k = tl.load(block)
    job = jobs + _WIDTH * k
    row = tl.load(block + 1) + tl.arange(0, ROWS)
    col = tl.multiple_of(tl.load(block + 2), 16) + tl.arange(0, COLS)
    rows, size = tl.load(job + _ROWS), tl.load(job + _SIZE)
    there = row < rows
    r, c = tl.expand_dims(row, AXIS), tl.expand_dims(col, 1 - AXIS)
    if STRIDED:
        strides = job + _INNER_ROWS
        i, j = tl.load(strides), tl.load(strides + 3)
        places = r // i * tl.load(strides + 1) + r % i * tl.load(strides + 2)
        places = places + (c // j * tl.load(strides + 4) + c % j * tl.load(strides + 5))
    else:
        if ALIGNED:
            size = tl.multiple_of(size, 8)
        places = r * size + c
    return k, job, row, there, places, (r < rows) & (c < size)


@triton.jit
def _at(address, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = tl.load(address).to(tl.pointer_type(TYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _read(address, places, mask, other, TYPE: tl.constexpr, WIDE: tl.constexpr, ALIGNED: tl.constexpr):
    return tl.load(_at(address, TYPE, ALIGNED) + places, mask=mask, other=other).to(WIDE)


@triton.jit
def _keep(address, places, mask, x, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    tl.store(_at(address, TYPE, ALIGNED) + places, x.to(TYPE), mask=mask)


@triton.jit
def _square_of(job, row, there):
    """Squared radii of rows."""
    one = tl.where(tl.load(job + _SQUARES) > 1, row, 0)
    return tl.load(tl.load(job + _SQUARE).to(tl.pointer_type(tl.float64)) + one, mask=there, other=1.0)


@triton.jit
def _rate(rate, lr, ROWS: tl.constexpr, LR: tl.constexpr):
    """The learning rate: a number, or with LR in a tensor; for each row."""
    found = tl.full((ROWS,), lr, tl.float64)
    if LR:
        found = tl.zeros((ROWS,), tl.float64) + tl.load(rate).to(tl.float64)
    return found


@triton.jit
def _correction(job, given, ROWS: tl.constexpr, STEP: tl.constexpr):
    """Adam's correction 1/(1 − βᵗ), given, or made of log β and of a count in a tensor of type STEP; for each row."""
    found = tl.full((ROWS,), given, tl.float64)
    if STEP is not None:
        step = tl.load(tl.load(job + _STEP).to(tl.pointer_type(STEP))).to(tl.float64)
        found = 1.0 / (1.0 - tl.exp(step * found))
    return found


# ---- in a kernel: what is done with rows -----------------------------------------------------------------------------


@triton.jit
def _dot(x, y, AXIS: tl.constexpr):
    return tl.sum(x * y, axis=AXIS).to(tl.float64)


@triton.jit
def _spread(numbers, WIDE: tl.constexpr, AXIS: tl.constexpr):
    """One number of each row, over its entries."""
    return tl.expand_dims(numbers.to(WIDE), AXIS)


@triton.jit
def _without_radial_part(
    w, g, b, ww, wg, gg, gb, rounding, MOMENT: tl.constexpr, WIDE: tl.constexpr, AXIS: tl.constexpr
):
    """Take ⟨w, g⟩/⟨w, w⟩ w off gradients of which it is the most; 0 counts for what is nothing but rounding."""
    counts = tl.full(ww.shape, 1.0, tl.float64)
    is_short = wg / ww * wg > 0.75 * gg
    if tl.max(is_short.to(tl.int32), axis=0) > 0:
        g = g - _spread(tl.where(is_short, wg / ww, 0.0), WIDE, AXIS) * w
        before, wg, gg = gg, _dot(w, g, AXIS), _dot(g, g, AXIS)
        if MOMENT:
            gb = _dot(g, b, AXIS)
        is_noise = is_short & (gg - wg / ww * wg <= rounding * rounding * before)
        counts = tl.where(is_noise, 0.0, counts)
    return g, wg, gg, gb, counts


@triton.jit
def _linear(w, g, b, ww, wb, wg, bw, bb, bg, MOMENT: tl.constexpr, WIDE: tl.constexpr, AXIS: tl.constexpr):
    """Return w' = ww w + wb b + wg g and b' = bw w + bb b + bg g."""
    new = _spread(ww, WIDE, AXIS) * w + _spread(wg, WIDE, AXIS) * g
    moment = new
    if MOMENT:
        new += _spread(wb, WIDE, AXIS) * b
        moment = _spread(bb, WIDE, AXIS) * b + _spread(bg, WIDE, AXIS) * g + _spread(bw, WIDE, AXIS) * w
    return new, moment


@triton.jit
def _second_moment(job, row, there, length, beta2, MOST: tl.constexpr, WIDE: tl.constexpr):
    """Let ‖ξ‖² enter the second moment of each row; return it, or with MOST the largest so far."""
    at = _at(job + _V, WIDE, False) + row
    v = tl.load(at, mask=there, other=0.0).to(tl.float64)
    v += (1.0 - beta2) * (length - v)
    tl.store(at, v.to(WIDE), mask=there)
    if MOST:
        at = _at(job + _V_MAX, WIDE, False) + row
        most = tl.load(at, mask=there, other=0.0).to(tl.float64)
        v = tl.where((v > most) | (v != v), v, most)
        tl.store(at, v.to(WIDE), mask=there)
    return v


@triton.jit
def _coefficients(ww, wg, gg, wb, gb, bb, length, follow, ahead, beta, taken, eta):
    """Coefficients of the normalized step, and where it is far: `rule.normalized_step`.

    With the momentum p = beta b + taken ξ and the direction d = follow p + ahead ξ, of tangential parts.
    """
    slope_g, slope_b = wg / ww, wb / ww
    of_b, of_gb = bb - slope_b * wb, gb - slope_b * wg
    d_b, d_g = follow * beta, follow * taken + ahead
    d_w, p_w = -(d_b * slope_b + d_g * slope_g), -(beta * slope_b + taken * slope_g)
    squares = d_b * d_b * of_b + 2.0 * d_b * d_g * of_gb + d_g * d_g * length
    squares = tl.where(squares < 0, 0.0, squares)
    overlap = d_b * beta * of_b + (d_b * taken + d_g * beta) * of_gb + d_g * taken * length
    # Products out of range make the row NaN, as a diverged step should: 0·∞.
    scale = (1.0 + 0.0 * squares) / tl.sqrt(1.0 + eta * eta * squares)
    turn = -eta * scale * overlap
    c_w = scale * (tl.where(eta == 0, 1.0, 1.0 / tl.sqrt(ww)) - eta * d_w)
    c_b, c_g = -eta * scale * d_b, -eta * scale * d_g
    far = c_b * c_b * bb + c_g * c_g * gg > 1.0
    return c_w, c_b, c_g, p_w - turn * c_w, beta - turn * c_b, taken - turn * c_g, far


# ---- the kernels -----------------------------------------------------------------------------------------------------


@triton.jit
def _step(
    jobs, gradients, blocks, rate, lr: tl.float64, beta: tl.float64, take: tl.float64, beta2: tl.float64,
    eps: tl.float64, first: tl.float64, second: tl.float64, rounding: tl.float64, sign: tl.float64,
    ADAM: tl.constexpr, MOMENT: tl.constexpr, MOST: tl.constexpr, NESTEROV: tl.constexpr, LR: tl.constexpr,
    STEP: tl.constexpr, TYPE: tl.constexpr, G: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr,
    COLS: tl.constexpr, AXIS: tl.constexpr, STRIDED: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Step rows that fit into a tile, and normalize: w' = (w − η d)/‖w − η d‖, b' = p − ⟨w', p⟩ w'; see rule.py."""
    k, job, row, there, places, mask = _tile(jobs, blocks, ROWS, COLS, AXIS, STRIDED, ALIGNED)
    w = _read(job + _W, places, mask, 0.0, TYPE, WIDE, ALIGNED)
    g = _read(gradients + k, places, mask, 0.0, G, WIDE, ALIGNED)
    b = w
    ww, wg, gg = tl.where(there, _dot(w, w, AXIS), 1.0), _dot(w, g, AXIS), _dot(g, g, AXIS)
    zero = tl.zeros((ROWS,), tl.float64)
    wb, gb, bb = zero, zero, zero
    if MOMENT:
        b = _read(job + _B, places, mask, 0.0, TYPE, WIDE, ALIGNED)
        wb, gb, bb = _dot(w, b, AXIS), _dot(g, b, AXIS), _dot(b, b, AXIS)
    eta = _rate(rate, lr, ROWS, LR)
    one = tl.full((ROWS,), 1.0, tl.float64)
    counts = one
    if ADAM:
        g, wg, gg, gb, counts = _without_radial_part(w, g, b, ww, wg, gg, gb, rounding, MOMENT, WIDE, AXIS)
    # In the coordinates of the unit sphere w/r, r g and b/r.
    square = _square_of(job, row, there)
    ww, wb, bb = ww / square, wb / square, bb / square
    gg, wg, gb = gg * square * counts, wg * sign * counts, gb * sign * counts
    length = gg - wg / ww * wg
    length = tl.where(length < 0, 0.0, length)
    follow, ahead = one, zero
    if ADAM:
        v = _second_moment(job, row, there, length, beta2, MOST, WIDE)
        first, second = _correction(job, first, ROWS, STEP), _correction(job, second, ROWS, STEP)
        follow = first / (tl.sqrt(v * second) + eps)
    elif not MOMENT:
        ahead = one
    elif NESTEROV:
        follow, ahead = one * beta, one
    c_w, c_b, c_g, b_w, b_b, b_g, far = _coefficients(
        ww, wg, gg, wb, gb, bb, length, follow, ahead, one * beta, take * counts, eta
    )
    to_g = sign * square
    new, moment = _linear(w, g, b, c_w, c_b, c_g * to_g, b_w, b_b, b_g * to_g, MOMENT, WIDE, AXIS)
    if tl.max((far & there).to(tl.int32), axis=0) > 0:
        norm = tl.where(far, _dot(new, new, AXIS), square)
        if MOMENT:
            moment -= _spread(tl.where(far, _dot(new, moment, AXIS) / norm, 0.0), WIDE, AXIS) * new
        new *= _spread((1.0 + 0.0 * norm) / tl.sqrt(norm / square), WIDE, AXIS)
    _keep(job + _W, places, mask, new, TYPE, ALIGNED)
    if MOMENT:
        _keep(job + _B, places, mask, moment, TYPE, ALIGNED)


@triton.jit
def _turn(
    jobs, gradients, blocks, rate, lr: tl.float64, beta: tl.float64, beta2: tl.float64, eps: tl.float64,
    first: tl.float64, second: tl.float64, rounding: tl.float64, sign: tl.float64, least: tl.float64,
    BY_ANGLE: tl.constexpr, LR: tl.constexpr, STEP: tl.constexpr, TYPE: tl.constexpr, G: tl.constexpr,
    WIDE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, AXIS: tl.constexpr, STRIDED: tl.constexpr,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    """Step in Adam's direction, entry by entry, made tangent: by the angle lr, or of its length; see reference.py."""
    k, job, row, there, places, mask = _tile(jobs, blocks, ROWS, COLS, AXIS, STRIDED, ALIGNED)
    w = _read(job + _W, places, mask, 0.0, TYPE, WIDE, ALIGNED)
    g = _read(gradients + k, places, mask, 0.0, G, WIDE, ALIGNED)
    m = _read(job + _B, places, mask, 0.0, TYPE, WIDE, ALIGNED)
    v = _read(job + _V, places, mask, 1.0, WIDE, WIDE, ALIGNED)
    ww, wg, gg = tl.where(there, _dot(w, w, AXIS), 1.0), _dot(w, g, AXIS), _dot(g, g, AXIS)
    g, wg, gg, _, counts = _without_radial_part(w, g, m, ww, wg, gg, gg, rounding, False, WIDE, AXIS)
    one = tl.full((ROWS,), 1.0, tl.float64)
    radius = tl.sqrt(_square_of(job, row, there))
    xi = _spread(sign * radius * counts, WIDE, AXIS) * (g - _spread(wg / ww, WIDE, AXIS) * w)
    m = beta * m + _spread((1.0 - beta) * radius, WIDE, AXIS) * xi
    eta = _rate(rate, lr, ROWS, LR)
    to_first, to_second = _correction(job, first, ROWS, STEP), _correction(job, second, ROWS, STEP)
    v = beta2 * v + (1.0 - beta2) * xi * xi
    d = m / (tl.sqrt(v * _spread(to_second, WIDE, AXIS)) + eps)
    wd = _dot(w, d, AXIS)
    tilt = wd / ww
    d -= _spread(tilt, WIDE, AXIS) * w
    length = _dot(d, d, AXIS)
    # Entries of d are rounded a few times: what is shorter than that has no direction.
    is_noise = length <= tilt * wd * least * least
    if BY_ANGLE:
        turn, along = tl.sin(eta) * radius / tl.sqrt(tl.where(is_noise, 1.0, length)), tl.cos(eta)
    else:
        turn, along = eta * to_first, one
    new = _spread(along, WIDE, AXIS) * w - _spread(tl.where(is_noise, 0.0, turn), WIDE, AXIS) * d
    norm = tl.where(there, _dot(new, new, AXIS), 1.0)
    m -= _spread(_dot(new, m, AXIS) / norm, WIDE, AXIS) * new
    _keep(job + _B, places, mask, m, TYPE, ALIGNED)
    _keep(job + _V, places, mask, v, WIDE, ALIGNED)
    scale = (radius + 0.0 * norm) / tl.sqrt(norm)
    _keep(job + _W, places, mask & tl.expand_dims(eta != 0, AXIS), _spread(scale, WIDE, AXIS) * new, TYPE, ALIGNED)


@triton.jit
def _follow(
    jobs, gradients, blocks, lr: tl.float64, beta: tl.float64, beta2: tl.float64, eps: tl.float64, first: tl.float64,
    second: tl.float64, sign: tl.float64, decay: tl.float64, shrink: tl.float64,
    MOST: tl.constexpr, FOLLOWS: tl.constexpr, STEP: tl.constexpr, TYPE: tl.constexpr, G: tl.constexpr,
    WIDE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, AXIS: tl.constexpr, STRIDED: tl.constexpr,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    """Take plain Adam's step from a weight of another norm, and normalize: `reference.plain_adam_`."""
    k, job, row, there, places, mask = _tile(jobs, blocks, ROWS, COLS, AXIS, STRIDED, ALIGNED)
    w = _read(job + _W, places, mask, 0.0, TYPE, WIDE, ALIGNED)
    g = _read(gradients + k, places, mask, 0.0, G, WIDE, ALIGNED)
    m = _read(job + _B, places, mask, 0.0, TYPE, WIDE, ALIGNED)
    v = _read(job + _V, places, mask, 1.0, WIDE, WIDE, ALIGNED)
    eta, radius = tl.full((ROWS,), lr, tl.float64), tl.sqrt(_square_of(job, row, there))
    at = _at(job + _NORMS, tl.float64, False) + row
    norms = tl.load(at, mask=there, other=1.0)
    down = tl.sqrt(tl.where(there, _dot(w, w, AXIS), 1.0)) / norms
    plain = _spread(sign * down, WIDE, AXIS) * g + _spread(decay / down, WIDE, AXIS) * w
    m = beta * m + _spread((1.0 - beta) * radius, WIDE, AXIS) * plain
    v = beta2 * v + (1.0 - beta2) * plain * plain
    _keep(job + _B, places, mask, m, TYPE, ALIGNED)
    _keep(job + _V, places, mask, v, WIDE, ALIGNED)
    if MOST:
        most = _read(job + _V_MAX, places, mask, 1.0, WIDE, WIDE, ALIGNED)
        v = tl.where((v > most) | (v != v), v, most)
        _keep(job + _V_MAX, places, mask, v, WIDE, ALIGNED)
    to_second = _spread(_correction(job, second, ROWS, STEP), WIDE, AXIS)
    d = _spread(_correction(job, first, ROWS, STEP), WIDE, AXIS) * m / (tl.sqrt(v * to_second) + eps)
    turn, of_w = eta / radius, shrink / down
    # The norm of the plain run goes on from its own value: it never moves by the rounding of the weight's.
    squared = shrink * norms * shrink * norms - 2.0 * turn * of_w * _dot(w, d, AXIS) + turn * turn * _dot(d, d, AXIS)
    if FOLLOWS:
        tl.store(at, tl.sqrt(squared), mask=there)
    new = _spread(of_w, WIDE, AXIS) * w - _spread(turn, WIDE, AXIS) * d
    norm = tl.where(there, _dot(new, new, AXIS), 1.0)
    new *= _spread((1.0 + 0.0 * norm) / tl.sqrt(norm) * radius, WIDE, AXIS)
    _keep(job + _W, places, mask & tl.expand_dims(eta != 0, AXIS), new, TYPE, ALIGNED)


@triton.jit
def _measure(
    jobs, gradients, blocks, taken, products, PIECES: tl.constexpr, REST: tl.constexpr, MOMENT: tl.constexpr,
    TYPE: tl.constexpr, G: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    AXIS: tl.constexpr, STRIDED: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Write the inner products of each row, or of each piece of one: ww, wg, gg, and with a moment wb, gb, bb.

    With REST those of g − taken w, where something is taken.
    """
    k, job, row, there, places, mask = _tile(jobs, blocks, ROWS, COLS, AXIS, STRIDED, ALIGNED)
    number = tl.load(job + _PLACE) + row
    off = tl.zeros((ROWS,), tl.float64)
    wanted = 1
    if REST:
        off = tl.load(taken + number, mask=there, other=0.0)
        wanted = tl.max((off != 0).to(tl.int32), axis=0)
    if wanted > 0:
        w = _read(job + _W, places, mask, 0.0, TYPE, WIDE, ALIGNED)
        g = _read(gradients + k, places, mask, 0.0, G, WIDE, ALIGNED)
        g -= _spread(off, WIDE, AXIS) * w
        piece = tl.load(blocks + 3 * tl.program_id(0).to(tl.int64) + 2) // COLS
        to = products + 6 * (number * PIECES + piece)
        tl.store(to, _dot(w, w, AXIS), mask=there)
        tl.store(to + 1, _dot(w, g, AXIS), mask=there)
        tl.store(to + 2, _dot(g, g, AXIS), mask=there)
        if MOMENT:
            b = _read(job + _B, places, mask, 0.0, TYPE, WIDE, ALIGNED)
            tl.store(to + 3, _dot(w, b, AXIS), mask=there)
            tl.store(to + 4, _dot(g, b, AXIS), mask=there)
            tl.store(to + 5, _dot(b, b, AXIS), mask=there)


@triton.jit
def _write(
    jobs, gradients, blocks, numbers, outcome, PIECES: tl.constexpr, OUTCOME: tl.constexpr, MOMENT: tl.constexpr,
    TYPE: tl.constexpr, G: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    AXIS: tl.constexpr, STRIDED: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Write linear combinations of w, b and g − taken w, with a row's numbers.

    With OUTCOME nothing but ⟨w', w'⟩ and ⟨w', b'⟩ of what would be written, where the step is far.
    """
    k, job, row, there, places, mask = _tile(jobs, blocks, ROWS, COLS, AXIS, STRIDED, ALIGNED)
    number = tl.load(job + _PLACE) + row
    at = numbers + _NUMBERS * number
    wanted = 1
    if OUTCOME:
        wanted = tl.max((tl.load(at + 9, mask=there, other=0.0) > 0).to(tl.int32), axis=0)
    if wanted > 0:
        w = _read(job + _W, places, mask, 0.0, TYPE, WIDE, ALIGNED)
        g = _read(gradients + k, places, mask, 0.0, G, WIDE, ALIGNED)
        g -= _spread(tl.load(at + 6, mask=there, other=0.0), WIDE, AXIS) * w
        b = w
        if MOMENT:
            b = _read(job + _B, places, mask, 0.0, TYPE, WIDE, ALIGNED)
        new, moment = _linear(
            w, g, b, tl.load(at, mask=there, other=0.0), tl.load(at + 1, mask=there, other=0.0),
            tl.load(at + 2, mask=there, other=0.0), tl.load(at + 3, mask=there, other=0.0),
            tl.load(at + 4, mask=there, other=0.0), tl.load(at + 5, mask=there, other=0.0), MOMENT, WIDE, AXIS,
        )  # fmt: skip
        if OUTCOME:
            piece = tl.load(blocks + 3 * tl.program_id(0).to(tl.int64) + 2) // COLS
            to = outcome + 2 * (number * PIECES + piece)
            tl.store(to, _dot(new, new, AXIS), mask=there)
            tl.store(to + 1, _dot(new, moment, AXIS), mask=there)
        else:
            if MOMENT:
                moment -= _spread(tl.load(at + 8, mask=there, other=0.0), WIDE, AXIS) * new
                _keep(job + _B, places, mask, moment, TYPE, ALIGNED)
            _keep(
                job + _W, places, mask, _spread(tl.load(at + 7, mask=there, other=0.0), WIDE, AXIS) * new, TYPE, ALIGNED
            )


# ---- which weights, and where they lie -------------------------------------------------------------------------------

# Entries of the widest tile: longer rows are cut into pieces. Of rows that lie side by side, several make a tile.
_LONGEST, _SIDE_BY_SIDE = 8192, 1024
# Machine epsilons of a direction, relative to d: see reference.py.
_UNKNOWN = 8.0
# Without it every look at a weight asks its class first.
_as_tensors = torch._C.DisableTorchFunctionSubclass


def suits_triton(member: StepInput, rule: Rule) -> bool:
    """Whether the kernels can step a weight by a rule."""
    with _as_tensors():
        return _fits(member, rule)


def _fits(member: StepInput, rule: Rule) -> bool:
    weight, manifold = member.weight, member.manifold
    if not manifold.moderate or not _is_plain(weight) or weight.dtype not in _TYPES:
        return False
    stride, wide = weight.stride(), accumulation_dtype(weight.dtype)
    runs = _runs(manifold.partition, stride)
    if runs is None or not (member.moment is None or _lies(member.moment, weight.dtype, stride)):
        return False
    more = [x for x in (member.second, member.largest) if x is not None]
    if isinstance(member.step, Tensor) and (member.step.device != weight.device or not _is_plain(member.step)):
        return False
    if rule.by_entries:
        fits = manifold.partition.group_size <= (_SIDE_BY_SIDE if _is_side_by_side(runs) else _LONGEST)
        lie = all(_lies(x, wide, stride) for x in more)
        return fits and lie and (member.norms is None or (_is_plain(member.norms) and member.norms.is_contiguous()))
    held = [*more, *(() if member.norms is None else (member.norms,))]
    return all(_is_plain(x) and x.is_contiguous() for x in held) and all(x.dtype == wide for x in more)


def _is_plain(tensor: Tensor) -> bool:
    """Whether the values of a tensor are what lies in its memory."""
    return (
        type(tensor).__torch_dispatch__ is Tensor.__torch_dispatch__ and not tensor.is_neg() and tensor.data_ptr() != 0
    )


def _lies(tensor: Tensor, dtype: torch.dtype, stride: tuple[int, ...]) -> bool:
    return tensor.dtype == dtype and tensor.stride() == stride and _is_plain(tensor)


_Runs = tuple[tuple[int, int], ...]


@functools.lru_cache(maxsize=4096)
def _runs(partition: Partition, stride: tuple[int, ...]) -> _Runs | None:
    """Return sizes and strides, outer and inner, first through the rows, then through a row; None where two do not do.

    Example:
        >>> _runs(Partition.transposed_filters((6, 5, 2, 2), groups=2), (20, 4, 2, 1))
        ((2, 60), (5, 4), (3, 20), (4, 1))
    """
    if partition.has_rows(stride):
        size = partition.group_size
        return (1, 0), (partition.n_groups, size), (1, 0), (size, 1)
    try:
        whole = torch.empty_strided(partition.shape, stride, device="meta").view(partition.view)
    except RuntimeError:  # there is no such view
        return None
    found: list[tuple[int, int]] = []
    for axes in (partition.kept, partition.reduced):
        runs: list[tuple[int, int]] = []
        for axis in axes:
            size, step = whole.shape[axis], whole.stride(axis)
            if runs and runs[-1][1] == size * step:
                runs[-1] = (runs[-1][0] * size, step)
            elif size > 1:
                runs.append((size, step))
        if len(runs) > 2:
            return None
        found += [(1, 0)] * (2 - len(runs)) + runs
    reach = 1
    for size, step in sorted((run for run in found if run[0] > 1), key=lambda run: run[1]):
        if step != reach:
            return None  # there are gaps, or entries that share memory
        reach *= size
    return tuple(found)


def _is_side_by_side(runs: _Runs) -> bool:
    """Whether neighbours in memory belong to different rows."""
    return runs[1][1] == 1 and runs[1][0] > 1 and runs[3][1] != 1


@dataclass(frozen=True)
class _Tiles:
    """Rows that are stepped in one launch.

    Attributes:
        members: numbers of their weights.
        rows: how many there are.
        pieces: into how many tiles a row is cut at most.
        even: whether rows begin in runs of eight entries.
        blocks: for each tile the number of the weight, the first row and the first entry.
        options: what the kernels are compiled for.
    """

    members: list[int]
    rows: int
    pieces: int
    even: bool
    blocks: Tensor
    options: dict[str, Any]


_Shape = tuple[int, int, int, int, bool, bool]


def _shape_of(partition: Partition, runs: _Runs) -> _Shape:
    """Return rows and columns of the tiles of a weight, pieces of a row, and the axis of its entries.

    Then whether it is strided; and whether its rows begin in runs of eight entries, so that many are read at once.
    """
    size, aside = partition.group_size, _is_side_by_side(runs)
    rows, columns = 32, 64
    if size <= _SIDE_BY_SIDE or not aside:
        columns = next(width for width in (32, 128, 512, 2048, _LONGEST) if width >= min(size, _LONGEST))
        rows = max(8 if aside else 1, 2048 // columns)
    strided = runs[1][1] != size or runs[3] != (size, 1)
    pieces = triton.next_power_of_2(-(-size // columns))
    return rows, columns, pieces, 1 - aside, strided, not strided and size % 8 == 0


class _Table:
    """Weights that are alike, as the kernels find them: made once, and kept until a step takes others.

    Args:
        members: weights of one dtype on one device, with moments of the same kinds.
    """

    def __init__(self, members: Sequence[StepInput]) -> None:
        first, self.members = members[0], list(members)
        self.device, dtype, of_gradient = first.weight.device, first.weight.dtype, first.gradient.dtype
        self.rounding, self.read = rounding_of(of_gradient), of_gradient if of_gradient in _TYPES else dtype
        self.types = {"TYPE": _TYPES[dtype], "G": _TYPES[self.read], "WIDE": _TYPES[accumulation_dtype(dtype)]}
        # Gradients that cannot be read where they lie are copied.
        self.readable = [_lies(m.gradient, self.read, m.weight.stride()) for m in members]
        runs = [_runs(m.manifold.partition, m.weight.stride()) or () for m in members]
        squares = [m.manifold.squared_radii for m in members]
        self.squares = self.upload(np.concatenate(squares))
        self.fields = np.zeros(len(members), dtype=[(name, np.int64) for name in (*_FIELDS, "g")])
        for name, field in _POINTERS.items():
            held = [getattr(m, name) for m in members]
            self.fields[field] = [0 if x is None else x.data_ptr() for x in held]
        self.fields["step"] = [m.step.data_ptr() if isinstance(m.step, Tensor) else 0 for m in members]
        self.fields["squares"] = [len(square) for square in squares]
        self.fields["square"] = self.squares.data_ptr() + 8 * (
            np.cumsum(self.fields["squares"]) - self.fields["squares"]
        )
        self.fields["rows"] = [m.manifold.partition.n_groups for m in members]
        self.fields["size"] = [m.manifold.partition.group_size for m in members]
        for name, (run, which) in _STRIDES.items():
            self.fields[name] = [way[run][which] for way in runs]
        self.tiles = self._cut([_shape_of(m.manifold.partition, way) for m, way in zip(members, runs, strict=True)])
        self.jobs = self.upload(np.stack([self.fields[name] for name in _FIELDS], axis=1))
        self.gradients = torch.zeros(len(members), dtype=torch.int64, device=self.device)
        # Read when a graph is replayed; such memory cannot be had while one is recorded.
        self.host = torch.zeros(len(members), dtype=torch.int64, pin_memory=self.device.type == "cuda")
        self.are_apart = np.ones(len(members), dtype=bool)
        self.radius: Any = None

    def upload(self, values: np.ndarray) -> Tensor:
        found = torch.from_numpy(values)
        # Out of pinned memory, so that nothing waits for it.
        return found.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else found

    def _cut(self, shapes: Sequence[_Shape]) -> list[_Tiles]:
        """Cut all rows into tiles, and number the rows of each launch."""
        found = []
        for shape in sorted(set(shapes)):
            rows, columns, pieces, axis, strided, even = shape
            chosen, total, blocks = [k for k, other in enumerate(shapes) if other == shape], 0, []
            for k in chosen:
                self.fields["place"][k] = total
                total += int(self.fields["rows"][k])
                corners = np.arange(0, self.fields["rows"][k], rows), np.arange(0, self.fields["size"][k], columns)
                corner = np.stack(np.meshgrid([k], *corners, indexing="ij"), axis=-1)
                blocks.append(corner.reshape(-1, 3).astype(np.int64))
            options = {"ROWS": rows, "COLS": columns, "AXIS": axis, "STRIDED": strided}
            found.append(_Tiles(chosen, total, pieces, even, self.upload(np.concatenate(blocks)), options))
        return found

    def take_up(self, gradients: Sequence[Tensor]) -> np.ndarray:
        """Find the gradients of a step; return which weights share no memory with others."""
        pointers = np.array([gradient.data_ptr() for gradient in gradients])
        recording = _is_recording(self.device)
        if not recording and (pointers == self.fields["g"]).all():
            return self.are_apart
        self.fields["g"] = pointers
        if recording:
            # The graph copies it whenever it is replayed, and owns it from now on: others take another table.
            self.host.copy_(torch.from_numpy(pointers))
            self.gradients.copy_(self.host, non_blocking=True)
            _recorded.append(self)
        else:
            self.gradients.copy_(self.upload(pointers), non_blocking=True)
        addresses = np.stack([self.fields[name] for name in ("w", "b", "v", "v_max", "g")])
        for tiles in self.tiles:
            tiles.options["ALIGNED"] = tiles.even and not (addresses[:, tiles.members] % 16).any()
        self.are_apart = apart(self.fields, self.members[0], self.read.itemsize)
        return self.are_apart

    def launch(self, kernel: Any, tiles: _Tiles, *args: Any, **options: Any) -> None:
        """Launch a kernel for all tiles."""
        warps = max(4, tiles.options["ROWS"] * tiles.options["COLS"] // 512)
        grid = (len(tiles.blocks),)
        kernel[grid](
            self.jobs, self.gradients, tiles.blocks, *args, **options, **self.types, **tiles.options,
            num_warps=warps,
        )  # fmt: skip


# What graphs that were recorded go on reading and writing.
_recorded: list[_Table] = []


def _is_recording(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


# ---- steps -----------------------------------------------------------------------------------------------------------


def run_triton(rule: Rule, members: Batch) -> list[StepInput]:
    """Step weights by a few launches for all that are alike; return those that share memory with others."""
    shared: list[StepInput] = []
    with _as_tensors():
        alike = [chosen for _, chosen in members.alike(_kind_of)]
        if not members.jobs:
            members.jobs = [_Table(chosen) for chosen in alike]
        for table, chosen in zip(members.jobs, alike, strict=True):
            with torch.cuda.device(table.device) if table.device.type == "cuda" else nullcontext():
                shared += _run(rule, table, chosen)
        if any(table in _recorded for table in members.jobs):
            members.jobs = ()
    mark_written(members)
    return shared


def _kind_of(m: StepInput) -> tuple[Any, ...]:
    step = m.step.dtype if isinstance(m.step, Tensor) else m.step
    have = m.moment is None, m.second is None, m.largest is None, m.norms is None
    return m.dampening, step, *have, m.weight.dtype, m.gradient.dtype, m.weight.device


def _run(rule: Rule, table: _Table, chosen: Sequence[StepInput]) -> list[StepInput]:
    """Step all weights of a table; return copies of those that share memory with others."""
    if isinstance(rule.lr, Tensor) and rule.lr.device != table.device:
        rule = replace(rule, lr=float(rule.lr))
    gradients = [
        m.gradient if readable else torch.empty_like(m.weight, dtype=table.read, requires_grad=False).copy_(m.gradient)
        for m, readable in zip(chosen, table.readable, strict=True)
    ]
    whole = table.take_up(gradients)
    if not whole.all():
        alone = [m for m, is_apart in zip(chosen, whole, strict=True) if is_apart]
        if alone:
            _run(rule, _Table(alone), alone)
        left = [m for m, is_apart in zip(chosen, whole, strict=True) if not is_apart]
        return [replace(m, gradient=m.gradient.clone(), fits=None, rows=None) for m in left]
    whole_rows = rule.kind in ("sgd", "adam") or rule.by_entries
    long = [tiles for tiles in table.tiles if not whole_rows or tiles.pieces > 1]
    for tiles in table.tiles:
        if tiles not in long:
            _step_rows(rule, table, tiles, chosen[0])
    if long:
        _step_in_passes(rule, table, long, chosen)
    return []


def _step_rows(rule: Rule, table: _Table, tiles: _Tiles, first: StepInput) -> None:
    """Take the whole step of rows that fit into tiles."""
    in_tensor = isinstance(rule.lr, Tensor)
    lr = (rule.lr, 0.0) if in_tensor else (table.jobs, rule.lr)
    corrections: tuple[Any, ...] = 1.0, 1.0
    counts = None
    if isinstance(first.step, Tensor):
        counts = _TYPES[first.step.dtype]
        corrections = tuple(math.log(beta) if beta else -math.inf for beta in (rule.beta1, rule.beta2))
    elif first.second is not None:
        corrections = bias_corrections(rule.beta1, rule.beta2, first.step)
    sign, kinds = -1.0 if rule.maximize else 1.0, {"LR": in_tensor, "STEP": counts}
    has_most = first.largest is not None
    if rule.is_plain:
        numbers = rule.beta1, rule.beta2, rule.eps, *corrections, sign, rule.decay, rule.shrink
        table.launch(_follow, tiles, rule.lr, *numbers, MOST=has_most, FOLLOWS=rule.follows, STEP=counts)
        return
    if rule.by_entries:
        least = _UNKNOWN * torch.finfo(accumulation_dtype(first.weight.dtype)).eps
        decays = rule.beta1, rule.beta2, rule.eps
        table.launch(
            _turn,
            tiles,
            *lr,
            *decays,
            *corrections,
            table.rounding,
            sign,
            least,
            BY_ANGLE=rule.kind == "angular-adam",
            **kinds,
        )
        return
    has_moment, adam = first.moment is not None, first.second is not None
    beta = rule.beta1 if has_moment else 0.0
    take = 1.0 - rule.beta1 if adam else 1.0 - first.dampening if has_moment else 0.0
    numbers = beta, take, rule.beta2, rule.eps, *corrections, table.rounding, sign
    kinds |= {"ADAM": adam, "MOMENT": has_moment, "MOST": has_most, "NESTEROV": rule.nesterov}
    table.launch(_step, tiles, *lr, *numbers, **kinds)


def _step_in_passes(rule: Rule, table: _Table, tiles: Sequence[_Tiles], chosen: Sequence[StepInput]) -> None:
    """Step rows in two passes, between which torch computes their coefficients, in float64."""
    chosen = [chosen[k] for each in tiles for k in each.members]
    first, options = chosen[0], {"MOMENT": chosen[0].moment is not None}
    if table.radius is None:
        table.radius = table.upload(
            np.concatenate([np.broadcast_to(m.manifold.radii, m.manifold.partition.n_groups) for m in chosen])[:, None]
        )
    dots, taken, is_noise = _measured(rule, table, tiles, options)
    eps = torch.finfo(accumulation_dtype(first.weight.dtype)).eps
    found = tangential_of(dots, table.radius, maximize=rule.maximize, taken=taken, eps=eps)
    state: list[tuple[Any, ...]] = [(m.second, m.largest, m.norms) for m in chosen]
    second, largest, norms = (None if x[0] is None else _column(chosen, x) for x in zip(*state, strict=True))
    step: Any = _column(chosen, [m.step for m in chosen]) if isinstance(first.step, Tensor) else first.step
    move = rule.coefficients(
        found, None if second is None else (second, largest), dampening=first.dampening, step=step, norms=norms
    )
    for k, column in enumerate((second, largest, norms)):
        if column is not None:
            held = [each[k] for each in state]
            torch._foreach_copy_([x.view(-1, 1) for x in held], list(column.split([x.numel() for x in held])))
    square = table.radius * table.radius
    to_g = -square if rule.maximize else square
    if is_noise is not None:
        to_g = to_g.masked_fill(is_noise, 0.0)
    numbers = found.ww.new_zeros(len(found.ww), _NUMBERS.value)
    six = move._replace(wg=move.wg * to_g, bg=move.bg * to_g)[:6]
    for k, x in enumerate((*six, 0.0 if taken is None else taken, 1.0, 0.0, move.far)):
        numbers[:, k : k + 1] = x
    norm, overlap = _sums(table, tiles, _write, numbers, OUTCOME=True, **options)
    numbers[:, 7:8] = torch.where(move.far, (1.0 + 0.0 * norm) / (norm / square).sqrt(), 1.0)
    if move.carried:
        numbers[:, 8:9] = torch.where(move.far, overlap / norm, 0.0)
    _sums(table, tiles, _write, numbers, OUTCOME=False, **options)


def _measured(
    rule: Rule, table: _Table, tiles: Sequence[_Tiles], options: dict[str, bool]
) -> tuple[list[Tensor], Tensor | None, Tensor | None]:
    """Return the inner products of all rows, what is taken off their gradients, and where nothing remains of one."""
    dots = list(_sums(table, tiles, _measure, None, REST=False, **options))[: 6 if options["MOMENT"] else 3]
    if not rule.needs_lengths:
        return dots, None, None
    taken = radial_share(dots)
    rest = list(_sums(table, tiles, _measure, taken, REST=True, **options))
    ww, wg, gg = rest[:3]
    is_noise = (taken != 0) & (gg - wg / ww * wg <= table.rounding**2 * dots[2])
    rest = [x.masked_fill(is_noise, 0.0) if k in (1, 2, 4) else x for k, x in enumerate(rest)]
    return [torch.where(taken != 0, new, old) for new, old in zip(rest, dots, strict=False)], taken, is_noise


def _column(members: Sequence[StepInput], values: Sequence[Any]) -> Tensor:
    """Return numbers of weights, or of their rows, as one column for all rows."""
    rows = [m.manifold.partition.n_groups for m in members]
    return torch.cat([x.reshape(-1, 1).expand(n, 1) for x, n in zip(values, rows, strict=True)]).double()


def _sums(
    table: _Table, tiles: Sequence[_Tiles], kernel: Any, numbers: Tensor | None, **options: bool
) -> tuple[Tensor, ...]:
    """Add up what a kernel writes for each piece of each row; numbers are what it reads of a row."""
    found, start = [], 0
    for each in tiles:
        pieces = torch.zeros(
            each.rows, each.pieces, 6 if kernel is _measure else 2, dtype=torch.float64, device=table.device
        )
        read = pieces if numbers is None else numbers[start : start + each.rows]
        table.launch(kernel, each, read, pieces, PIECES=each.pieces, **options)
        found.append(pieces.sum(1))
        start += each.rows
    return torch.cat(found).unsqueeze(-1).unbind(1)
