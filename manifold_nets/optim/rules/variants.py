r"""What other methods on products of spheres write: the same linear combinations with other coefficients.

A method is told by how it makes a moment p and a direction d of a gradient (`Moments`), how far along d it goes, and
how it comes back to the sphere:

- `geodesic_coefficients`: the exponential map, and parallel transport of the moment;
- `projected_coefficients`: a plain Euclidean step, of which nothing is projected but the result;
- `scaled_coefficients`: not at all; gradients and steps are scaled by the norm of a group.

Clipped gradients, and steps of a given angle, are factors of the moments and of the learning rate, one a group.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from manifold_nets.optim.rules.coefficients import Coefficients, Moments, where_moved
from manifold_nets.optim.rules.products import Scalar, Tangential

__all__ = [
    "angular_rate",
    "clip_factor",
    "direction_length",
    "geodesic_coefficients",
    "projected_coefficients",
    "scaled_coefficients",
]


# How often the machine epsilon of the products of b and g the squared norm of their sum has to be, so as to be known.
_KNOWN = 16.0


def direction_length(found: Tangential, moments: Moments) -> Tensor:
    """Return ‖d‖ of each group, in radians per unit of learning rate."""
    d_b, d_g = _direction(moments)
    square = d_b * d_b * found.bb + 2.0 * d_b * d_g * found.gb + d_g * d_g * found.gg
    return square.clamp_min(0).sqrt()


def clip_factor(found: Tangential, limit: float) -> Tensor:
    """Return the factor, at most 1, that shortens the Riemannian gradient of each group to ``limit``."""
    length = found.gg.sqrt()
    # 0/0 where there is nothing to clip; a gradient that is not a number stays one.
    return torch.where(length > limit, limit / length, 1.0 + 0.0 * length)


def angular_rate(
    found: Tangential,
    moments: Moments,
    lr: Scalar,
    *,
    per_weight: bool,
    elsewhere: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Return the learning rate at which a step is of ``lr`` radians, for each group or in root mean square over them.

    A direction of length zero has none: its group stays where it is. So does one where momentum and gradient cancel up
    to the rounding of their products. Where other processes hold other groups of the weight, ``elsewhere`` adds up
    over them.
    """
    length, (d_b, d_g) = direction_length(found, moments), _direction(moments)
    total = d_b * d_b * found.b_total + d_g * d_g * found.g_total
    length = torch.where(length.square() <= _KNOWN * found.eps * total, 0.0, length)
    if per_weight:
        sums = torch.stack([length.square().sum(), length.new_tensor(float(length.numel()))])
        total, count = sums if elsewhere is None else elsewhere(sums)
        length = (total / count).sqrt().expand_as(length)
    return torch.where(length == 0, 0.0, lr / length)


def geodesic_coefficients(found: Tangential, moments: Moments, lr: Scalar) -> Coefficients:
    r"""Return the coefficients of a step along the geodesic, with parallel transport of the moment.

    With ``θ = η‖d‖`` and ``e = d/‖d‖``, ``w' = cos θ w − sin θ e`` and
    ``p' = p + ⟨e, p⟩ ((cos θ − 1) e + sin θ w)``.

    References:
        Absil, Mahony, Sepulchre, *Optimization Algorithms on Matrix Manifolds*, examples 5.4.1 and 8.1.1.
    """
    keep, take, _, _ = moments
    d_b, d_g = _direction(moments)
    length = direction_length(found, moments)
    overlap = d_b * keep * found.bb + (d_b * take + d_g * keep) * found.gb + d_g * take * found.gg
    angle = lr * length
    inverse = torch.where(length == 0, 0.0, 1.0 / length)
    # Of one angle, so that their squares add up to 1: torch.sinc would round it once more.
    cosine, sine_rate = torch.cos(angle), torch.where(length == 0, lr, torch.sin(angle) * inverse)
    root = where_moved(lr, found.ww.rsqrt())
    # Factors of d in w' and in p', and of w in p'; where d is zero the moment stays as it is.
    along, back = overlap * inverse * inverse * (cosine - 1.0), overlap * sine_rate
    d_w = -(d_b * found.b_slope + d_g * found.g_slope)
    p_w = -(keep * found.b_slope + take * found.g_slope)
    w_w, w_b, w_g = cosine * root - sine_rate * d_w, -sine_rate * d_b, -sine_rate * d_g
    far = w_b * w_b * found.b_total + w_g * w_g * found.g_total > 1
    return Coefficients(w_w, w_b, w_g, p_w + along * d_w + back * root, keep + along * d_b, take + along * d_g, far)


def projected_coefficients(found: Tangential, moments: Moments, lr: Scalar) -> Coefficients:
    r"""Return the coefficients of a Euclidean step of which only the result is put on the sphere.

    ``p = keep b + take g`` and ``d`` keep their radial parts, ``w' = (w − η d)/‖w − η d‖`` and ``b' = p``.
    """
    keep, take, _, _ = moments
    d_b, d_g = _direction(moments)
    taken = d_g * found.g_taken
    radial = d_b * found.b_slope + d_g * found.g_slope + taken  # of d, as a multiple of w
    length = direction_length(found, moments)
    # w − η d has a part along w and a tangential part; they are orthogonal.
    squared = (1.0 - lr * radial).square() * found.ww + (lr * length).square()
    # Of a step that cancels the weight itself only rounding remains: the group stays where it is.
    lr = lr * torch.ones_like(squared).masked_fill(squared <= (4.0 * found.eps) ** 2, 0.0)
    scale = where_moved(lr, (1.0 + 0.0 * squared) / squared.sqrt())
    w_w, w_b, w_g = scale * (1.0 - lr * taken), -lr * scale * d_b, -lr * scale * d_g
    far = w_b * w_b * found.b_total + w_g * w_g * found.g_total > 1
    return Coefficients(w_w, w_b, w_g, take * found.g_taken, keep, take, far, carried=False)


def scaled_coefficients(found: Tangential, moments: Moments, lr: Scalar) -> Coefficients:
    r"""Return the coefficients of a step in the scaled metric, ``p = keep b + take ‖w‖ g`` and ``w' = w − η ‖w‖ d``."""
    keep, take, _, _ = moments
    d_b, d_g = _direction(moments)
    norm = found.ww.sqrt()
    return Coefficients(
        1.0, -lr * norm * d_b, -lr * found.ww * d_g, 0.0, keep, take * norm, torch.zeros_like(norm, dtype=torch.bool)
    )


def _direction(moments: Moments) -> tuple[Scalar, Scalar]:
    """Coefficients of the old moment and of the gradient in d."""
    keep, take, follow, ahead = moments
    return follow * keep, follow * take + ahead
