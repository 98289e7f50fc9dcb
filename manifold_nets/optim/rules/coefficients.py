r"""What a step writes, as numbers for each group: the new weight and the new moment are linear combinations.

.. math:: w' = A w + B b + C g, \qquad b' = D w + E b + F g .

Rounding does not add up. ⟨w, w⟩ and ⟨w, b⟩ are measured in every step, and a step starts from the nearest point of the
sphere and the tangential part of the moment. The norm after the step is predicted from the products, to a few machine
epsilons where no part of the step is longer than a radian; elsewhere the new point is measured before it is written.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from manifold_nets.gathered import local_part
from manifold_nets.optim.rules.products import Scalar, Tangential

__all__ = [
    "Coefficients",
    "Moments",
    "adam_coefficients",
    "adam_factor",
    "bias_corrections",
    "coefficients",
    "sgd_coefficients",
    "where_moved",
]


class Moments(NamedTuple):
    """How a moment p is made, and the direction of the step: ``p = keep b + take ξ``, ``d = follow p + ahead ξ``."""

    keep: Scalar
    take: Scalar
    follow: Scalar
    ahead: Scalar


class Coefficients(NamedTuple):
    """What a step writes: ``w' = ww w + wb b + wg g`` and ``b' = bw w + bb b + bg g``, in unit-sphere coordinates.

    Attributes:
        far: where a part of the step is longer than a radian, so that the norm of w' is to be measured.
        carried: whether the moment belongs in the tangent space of the new point, wherever that is measured.
    """

    ww: Scalar
    wb: Scalar
    wg: Scalar
    bw: Scalar
    bb: Scalar
    bg: Scalar
    far: Tensor
    carried: bool = True


def coefficients(found: Tangential, moments: Moments, lr: Scalar) -> Coefficients:
    r"""Return the coefficients of a step on unit spheres, with transport of the moment.

    As d is orthogonal to w, ``‖w − η d‖² = 1 + η² ‖d‖²``; so ``w' = (w − η d)/(1 + η² ‖d‖²)^½``, and the transport
    ``b' = p − ⟨w', p⟩ w'`` has ``⟨w', p⟩ = −η ⟨d, p⟩/(1 + η² ‖d‖²)^½``. A learning rate of 0 leaves w bit for bit.
    """
    keep, take, follow, ahead = moments
    alone = _is_nothing(take) and _is_nothing(ahead)  # the moment, with whatever is in it, is all there is
    d_b, d_g = follow * keep, 0.0 if alone else follow * take + ahead
    p_w, d_w = -keep * found.b_slope, -d_b * found.b_slope
    length, overlap = d_b * d_b * found.bb, d_b * keep * found.bb
    if not alone:
        p_w, d_w = p_w - take * found.g_slope, d_w - d_g * found.g_slope
        length = length + 2.0 * d_b * d_g * found.gb + d_g * d_g * found.gg
        overlap = overlap + (d_b * take + d_g * keep) * found.gb + d_g * take * found.gg
    length = length.clamp_min(0)
    # Products out of range would send the group to zero without a word; 0·∞ makes it NaN, as a diverged step should.
    scale = (1.0 + 0.0 * length) / (1.0 + lr * lr * length).sqrt()
    root = where_moved(lr, found.ww.rsqrt())
    along, turn = -lr * scale, -lr * scale * overlap
    w_w, w_b, w_g = scale * (root - lr * d_w), along * d_b, 0.0 if alone else along * d_g
    reach = w_b * w_b * found.b_total
    far = (reach if alone else reach + w_g * w_g * found.g_total) > 1
    b_g = 0.0 if alone else take - turn * w_g
    return Coefficients(w_w, w_b, w_g, p_w - turn * w_w, keep - turn * w_b, b_g, far)


def where_moved(lr: Scalar, factor: Tensor) -> Tensor:
    """Return a factor of the weight, and 1 where the learning rate is 0: there nothing is put back to its norm."""
    if isinstance(lr, Tensor):
        return torch.where(lr == 0, 1.0, factor)
    return factor if lr != 0 else torch.ones_like(factor)


def _is_nothing(factor: Scalar) -> bool:
    return isinstance(factor, float | int) and factor == 0


def sgd_coefficients(
    found: Tangential, *, lr: Scalar, momentum: Scalar, dampening: Scalar = 0.0, nesterov: bool = False
) -> Coefficients:
    """Return the coefficients of stochastic gradient descent; see `riemannian_sgd_`."""
    if _is_nothing(momentum):
        return coefficients(found, Moments(0.0, 0.0, 0.0, 1.0), lr)
    follow, ahead = (momentum, 1.0) if nesterov else (1.0, 0.0)
    return coefficients(found, Moments(momentum, 1.0 - dampening, follow, ahead), lr)


def adam_coefficients(
    found: Tangential,
    exp_avg_sq: Tensor,
    max_exp_avg_sq: Tensor | None,
    *,
    lr: Scalar,
    beta1: Scalar,
    beta2: Scalar,
    eps: Scalar,
    corrections: tuple[Scalar, Scalar],
    dampening: float = 0.0,
) -> Coefficients:
    """Return the coefficients of Adam, and update the second moments in place; see `riemannian_adam_`.

    A share ``dampening`` of the gradient is left out of the first moment.
    """
    factor = adam_factor(found, exp_avg_sq, max_exp_avg_sq, beta2=beta2, eps=eps, corrections=corrections)
    return coefficients(found, Moments(beta1, (1 - beta1) * (1 - dampening), factor, 0.0), lr)


def adam_factor(
    found: Tangential,
    exp_avg_sq: Tensor,
    max_exp_avg_sq: Tensor | None,
    *,
    beta2: Scalar,
    eps: Scalar,
    corrections: tuple[Scalar, Scalar],
) -> Tensor:
    """Return by what Adam multiplies the first moment of each group, and update the second moments in place."""
    second = local_part(exp_avg_sq).lerp_(found.gg, 1 - beta2)
    if max_exp_avg_sq is not None:
        largest = local_part(max_exp_avg_sq)
        second = largest.copy_(torch.maximum(largest, second))
    return corrections[0] / ((second * corrections[1]).sqrt() + eps)


def bias_corrections(beta1: Scalar, beta2: Scalar, step: Scalar) -> tuple[Scalar, Scalar]:
    """Return what Adam multiplies the first and the second moment by, as both started at zero."""
    return 1 / (1 - beta1**step), 1 / (1 - beta2**step)
