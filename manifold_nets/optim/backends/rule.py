r"""Update rules: what a step writes, as a few coefficients for each group.

Every rule writes linear combinations of a weight w, its gradient g and its momentum b, with one number a group:

.. math:: w' = A w + B b + C g, \qquad b' = D w + E b + F g .

A rule is defined by how it makes its momentum and its direction (`MomentumUpdate`), how far it goes, and how it returns
to the sphere: by normalization (`normalized_step`), along the geodesic (`geodesic_step`), by a Euclidean step that is
normalized (`projected_step`), from a plain weight of another norm (`plain_step`), or not at all (`scaled_step`).

Rounding does not add up. ⟨w, w⟩ and ⟨w, b⟩ are measured in every step, and a step starts from the nearest point of the
sphere and the tangential part of the momentum. The norm after the step is predicted from the products, to a few machine
epsilons where no part of the step is longer than a radian; elsewhere the new point is measured before it is written.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from manifold_nets.manifold import SphereProduct
from manifold_nets.optim.backends.products import Scalar, TangentProducts

__all__ = [
    "Coefficients",
    "MomentumUpdate",
    "Rule",
    "StepInput",
    "adam_factor",
    "adam_update",
    "bias_corrections",
    "normalized_step",
    "sgd_update",
]


@dataclass(slots=True, eq=False)
class StepInput:
    """A weight in a step.

    Attributes:
        weight: the point; changed in place.
        gradient: the Euclidean gradient; only read.
        manifold: the spheres of the weight.
        moment: the momentum, changed in place; None without momentum.
        second: second moments, one for each sphere (or each entry; see `Rule.by_entries`), changed in place; None for
            SGD.
        largest: the largest second moments so far, changed in place; None without AMSGrad.
        dampening: share of the new gradient that is left out; 0 in the first step.
        step: number of this step, counted from 1; a tensor on the weight's device where a CUDA graph may hold the step.
        norms: those of the weight's groups in the run of a plain optimizer, float64, changed in place; None elsewhere.
        fits: whether the kernel in C can step the weight, and read the gradient where it lies; None until it is asked.
        rows: weight, momentum, second moments and radii as a matrix of the groups and columns beside it, made at first
            use by `manifold_nets.optim.backends.views.rows_of`.
        stride: that of the weight then.
    """

    weight: Tensor
    gradient: Tensor
    manifold: SphereProduct
    moment: Tensor | None = None
    second: Tensor | None = None
    largest: Tensor | None = None
    dampening: float = 0.0
    step: Any = 1.0
    norms: Tensor | None = None
    fits: tuple[bool, bool] | None = None
    rows: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, float | Tensor] | None = None
    stride: tuple[int, ...] = ()


class MomentumUpdate(NamedTuple):
    """How a step makes the new momentum p and its direction d of the old momentum b and the Riemannian gradient ξ.

    Attributes:
        beta: decay of the momentum, and
        gain: share of the gradient in it: ``p = beta b + gain ξ``.
        follow: factor of the momentum in the direction, and
        ahead: factor of the gradient in it: ``d = follow p + ahead ξ``.
    """

    beta: Scalar
    gain: Scalar
    follow: Scalar
    ahead: Scalar

    @property
    def direction(self) -> tuple[Scalar, Scalar]:
        """Factors of the old momentum and of the gradient in d."""
        return self.follow * self.beta, 0.0 if self.is_alone else self.follow * self.gain + self.ahead

    @property
    def is_alone(self) -> bool:
        """Whether the momentum, with whatever is in it, is all there is."""
        return _is_nothing(self.gain) and _is_nothing(self.ahead)


class Coefficients(NamedTuple):
    """What a step writes: ``w' = ww w + wb b + wg g`` and ``b' = bw w + bb b + bg g``, in unit-sphere coordinates.

    Attributes:
        far: where a part of the step is longer than a radian, so that the norm of w' is to be measured.
        carried: whether the momentum belongs in the tangent space of the new point, wherever that is measured.
    """

    ww: Scalar
    wb: Scalar
    wg: Scalar
    bw: Scalar
    bb: Scalar
    bg: Scalar
    far: Tensor
    carried: bool = True


@dataclass(frozen=True)
class Rule:
    """An update rule, with the options that all weights of a parameter group share.

    Attributes:
        kind: ``"sgd"``, ``"adam"``, ``"sgd-g"``, ``"adam-g"``, ``"angular"``, ``"angular-adam"``, ``"adam-entries"``,
            ``"projected"``, ``"scaled-metric"``, ``"plain-sgd"`` or ``"plain-adam"``.
        lr: learning rate.
        beta1: decay of the momentum; that of the first moment for variants of Adam.
        nesterov: whether to look ahead.
        maximize: whether to ascend.
        beta2: decay of the second moment.
        eps: what is added to the root of the second moment; under the root for Adam-G.
        clip: the largest length of a gradient, for SGD-G and Adam-G.
        per_weight: whether the groups of a weight turn by one angle in the mean, for angular steps.
        decay: weight decay of a plain optimizer in the gradient, and
        shrink: factor of the plain weight in each step, for a decay beside the gradient.
        follows: whether the norms of the plain run go on with each step, or stay.
    """

    kind: str
    lr: float | Tensor
    beta1: float
    nesterov: bool = False
    maximize: bool = False
    beta2: float = 0.0
    eps: float = 0.0
    clip: float = math.inf
    per_weight: bool = False
    decay: float = 0.0
    shrink: float = 1.0
    follows: bool = False

    @property
    def is_plain(self) -> bool:
        """Whether steps are those of a plain optimizer, from weights of other norms."""
        return self.kind in ("plain-sgd", "plain-adam")

    @property
    def is_native(self) -> bool:
        """Whether the kernel in C takes whole steps by the rule; for others it lends its passes."""
        return self.kind in ("sgd", "adam", "plain-sgd") or self.by_entries

    @property
    def has_kernel(self) -> bool:
        """Whether there is a kernel that torch compiles."""
        return self.kind in ("sgd", "adam")

    @property
    def follows_moment(self) -> bool:
        """Whether the direction of a step is the moment itself, times a number of each sphere."""
        return not self.nesterov and self.has_kernel

    @property
    def by_entries(self) -> bool:
        """Whether each entry has a second moment of its own, so that no coefficients of groups say all."""
        return self.kind in ("angular-adam", "adam-entries", "plain-adam")

    @property
    def needs_lengths(self) -> bool:
        """Whether the length of the tangential gradient matters by itself, and has to be exact where it is short."""
        return self.kind not in ("sgd", "scaled-metric", "plain-sgd")

    @property
    def by_groups(self) -> bool:
        """Whether the step of a group depends on no other group, so that weights may be cut and joined."""
        return not self.per_weight

    def coefficients(
        self,
        found: TangentProducts,
        second: tuple[Tensor, Tensor | None] | None,
        *,
        dampening: float,
        step: Any,  # a number, or a column of them
        elsewhere: Callable[[Tensor], Tensor] | None = None,
        norms: Tensor | None = None,
    ) -> Coefficients:
        """Return what to write, and update the second moments and the norms in place.

        Args:
            found: what the inner products of each group say.
            second: the second moment of each group, and the largest so far or None; None for SGD.
            dampening: share of the gradient that is left out of the momentum.
            step: number of the step, counted from 1.
            elsewhere: adds up sums over groups of which other processes hold others.
            norms: of the groups in the run of a plain optimizer.
        """
        if norms is not None:
            return plain_step(self, found, sgd_update(self.beta1, dampening, nesterov=self.nesterov), norms)
        clip = clip_factor(found, self.clip) if self.kind in ("sgd-g", "adam-g") else 1.0
        if second is None:
            update = sgd_update(self.beta1, dampening, nesterov=self.nesterov)
            if isinstance(clip, Tensor):
                update = update._replace(gain=update.gain * clip, ahead=update.ahead * clip)
        else:
            corrections = bias_corrections(self.beta1, self.beta2, step)
            if self.kind == "adam-g":
                v = second[0].lerp_(clip * clip * found.gg, 1 - self.beta2)
                factor: Scalar = corrections[0] / (v * corrections[1] + self.eps).sqrt()
            else:
                factor = adam_factor(found.gg, *second, beta2=self.beta2, eps=self.eps, corrections=corrections)
            update = adam_update(self.beta1, factor, clip)
        lr: Scalar = self.lr
        if self.kind == "angular":
            lr = angular_rate(found, update, lr, per_weight=self.per_weight, elsewhere=elsewhere)
        return _STEPS[self.kind](found, update, lr)


# ---- momentum and direction ------------------------------------------------------------------------------------------


def sgd_update(momentum: Scalar, dampening: Scalar, *, nesterov: bool) -> MomentumUpdate:
    """Return the update of stochastic gradient descent, with torch's semantics of dampening and Nesterov."""
    if _is_nothing(momentum):
        return MomentumUpdate(0.0, 0.0, 0.0, 1.0)
    return MomentumUpdate(momentum, 1.0 - dampening, *((momentum, 1.0) if nesterov else (1.0, 0.0)))


def adam_update(beta1: Scalar, factor: Scalar, share: Scalar = 1.0) -> MomentumUpdate:
    """Return the update of Adam: the first moment times a factor; a share of the gradient enters it."""
    return MomentumUpdate(beta1, (1 - beta1) * share, factor, 0.0)


def adam_factor(
    square: Tensor,
    exp_avg_sq: Tensor,
    max_exp_avg_sq: Tensor | None,
    *,
    beta2: Scalar,
    eps: Scalar,
    corrections: tuple[Scalar, Scalar],
) -> Tensor:
    """Return Adam's factor of the first moment, and update the second ones by the gradient's squared length."""
    second = exp_avg_sq.lerp_(square, 1 - beta2)
    if max_exp_avg_sq is not None:
        second = max_exp_avg_sq.copy_(torch.maximum(max_exp_avg_sq, second))
    return corrections[0] / ((second * corrections[1]).sqrt() + eps)


def bias_corrections(beta1: Scalar, beta2: Scalar, step: Scalar) -> tuple[Scalar, Scalar]:
    """Return what Adam multiplies the first and the second moment by, as both started at zero."""
    return 1 / (1 - beta1**step), 1 / (1 - beta2**step)


def clip_factor(found: TangentProducts, limit: float) -> Tensor:
    """Return the factor, at most 1, that shortens the Riemannian gradient of each group to ``limit``."""
    length = found.gg.sqrt()
    # 0/0 where there is nothing to clip; a gradient that is not a number stays one.
    return torch.where(length > limit, limit / length, 1.0 + 0.0 * length)


# How often the machine epsilon of the products of b and g the squared norm of their sum has to be, so as to be known.
_KNOWN = 16.0


def angular_rate(
    found: TangentProducts,
    update: MomentumUpdate,
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
    square, (d_b, d_g) = _squares(found, update)[0], update.direction
    total = d_b * d_b * found.b_total + d_g * d_g * found.g_total
    square = torch.where(square <= _KNOWN * found.eps * total, 0.0, square)
    if per_weight:
        sums = torch.stack([square.sum(), square.new_tensor(float(square.numel()))])
        total, count = sums if elsewhere is None else elsewhere(sums)
        square = (total / count).expand_as(square)
    return torch.where(square == 0, 0.0, lr / square.sqrt())


def _squares(found: TangentProducts, update: MomentumUpdate) -> tuple[Tensor, Tensor]:
    """Return ‖d‖² and ⟨d, p⟩ of each group, in square radians per squared learning rate."""
    beta, gain, (d_b, d_g) = update.beta, update.gain, update.direction
    square, overlap = d_b * d_b * found.bb, d_b * beta * found.bb
    if not update.is_alone:
        square = square + 2.0 * d_b * d_g * found.gb + d_g * d_g * found.gg
        overlap = overlap + (d_b * gain + d_g * beta) * found.gb + d_g * gain * found.gg
    return square.clamp_min(0), overlap


def _is_nothing(factor: Scalar) -> bool:
    return isinstance(factor, float | int) and factor == 0


# ---- the way back to the sphere --------------------------------------------------------------------------------------


def _coefficients(
    found: TangentProducts, update: MomentumUpdate, lr: Scalar, keep: Scalar, reach: Scalar, along: Scalar, back: Scalar
) -> Coefficients:
    """Return what writes ``w' = keep u − reach d`` and ``p' = p + along d + back u``, of tangential parts, u = w/‖w‖.

    A learning rate of 0 leaves w bit for bit.
    """
    beta, gain, (d_b, d_g) = update.beta, update.gain, update.direction
    root = _where_moved(lr, found.ww.rsqrt())
    d_w, p_w = -d_b * found.b_slope, -beta * found.b_slope
    if not update.is_alone:
        d_w, p_w = d_w - d_g * found.g_slope, p_w - gain * found.g_slope
    w_b, w_g = -reach * d_b, 0.0 if update.is_alone else -reach * d_g
    moment = p_w + along * d_w + back * root, beta + along * d_b, gain + along * d_g
    return Coefficients(keep * root - reach * d_w, w_b, w_g, *moment, _is_far(found, w_b, w_g))


def _where_moved(lr: Scalar, factor: Tensor) -> Tensor:
    """Return a factor of the weight, and 1 where the learning rate is 0: there nothing is put back to its norm."""
    if isinstance(lr, Tensor):
        return torch.where(lr == 0, 1.0, factor)
    return factor if lr != 0 else torch.ones_like(factor)


def _is_far(found: TangentProducts, w_b: Scalar, w_g: Scalar) -> Tensor:
    return w_b * w_b * found.b_total + w_g * w_g * found.g_total > 1


def normalized_step(found: TangentProducts, update: MomentumUpdate, lr: Scalar) -> Coefficients:
    r"""Step and normalize, with transport of the momentum by projection.

    As d is orthogonal to w, ``‖w − η d‖² = 1 + η² ‖d‖²``; so ``w' = (w − η d)/(1 + η² ‖d‖²)^½``, and the transport
    ``b' = p − ⟨w', p⟩ w'`` has ``⟨w', p⟩ = −η ⟨d, p⟩/(1 + η² ‖d‖²)^½``.
    """
    square, overlap = _squares(found, update)
    # Products out of range would send the group to zero without a word; 0·∞ makes it NaN, as a diverged step should.
    scale = (1.0 + 0.0 * square) / (1.0 + lr * lr * square).sqrt()
    reach = lr * scale
    return _coefficients(found, update, lr, scale, reach, -reach * reach * overlap, reach * scale * overlap)


def geodesic_step(found: TangentProducts, update: MomentumUpdate, lr: Scalar) -> Coefficients:
    r"""Step along the geodesic, with parallel transport of the momentum.

    With ``θ = η‖d‖`` and ``e = d/‖d‖``, ``w' = cos θ w − sin θ e`` and
    ``p' = p + ⟨e, p⟩ ((cos θ − 1) e + sin θ w)``; where d is zero the momentum stays as it is.

    References:
        Absil, Mahony, Sepulchre, *Optimization Algorithms on Matrix Manifolds*, examples 5.4.1 and 8.1.1.
    """
    square, overlap = _squares(found, update)
    length = square.sqrt()
    inverse = torch.where(length == 0, 0.0, 1.0 / length)
    # Of one angle, so that their squares add up to 1: torch.sinc would round it once more.
    cosine, reach = torch.cos(lr * length), torch.where(length == 0, lr, torch.sin(lr * length) * inverse)
    along = overlap * inverse * inverse * (cosine - 1.0)
    return _coefficients(found, update, lr, cosine, reach, along, overlap * reach)


def projected_step(found: TangentProducts, update: MomentumUpdate, lr: Scalar) -> Coefficients:
    r"""Take a Euclidean step of which only the result is put on the sphere.

    ``p = beta b + gain g`` and ``d`` keep their radial parts, ``w' = (w − η d)/‖w − η d‖`` and ``b' = p``.
    """
    beta, gain, (d_b, d_g) = update.beta, update.gain, update.direction
    taken = d_g * found.g_taken
    radial = d_b * found.b_slope + d_g * found.g_slope + taken  # of d, as a multiple of w
    # w − η d has a part along w and a tangential part; they are orthogonal.
    squared = (1.0 - lr * radial).square() * found.ww + lr * lr * _squares(found, update)[0]
    # Of a step that cancels the weight itself only rounding remains: the group stays where it is.
    lr = lr * torch.ones_like(squared).masked_fill(squared <= (4.0 * found.eps) ** 2, 0.0)
    scale = _where_moved(lr, (1.0 + 0.0 * squared) / squared.sqrt())
    w_b, w_g = -lr * scale * d_b, -lr * scale * d_g
    weight = scale * (1.0 - lr * taken), w_b, w_g
    return Coefficients(*weight, gain * found.g_taken, beta, gain, _is_far(found, w_b, w_g), carried=False)


def plain_step(rule: Rule, found: TangentProducts, update: MomentumUpdate, norms: Tensor) -> Coefficients:
    r"""Take the step of plain SGD from the weight ``n u`` in the place of ``r u``, and normalize; update the norms.

    With ``k = ‖u‖/n``, where ``‖u‖ = 1`` to rounding, the plain gradient is ``k g + (λ/k) u`` and the plain weight
    ``u/k``. The norm after the step is computed in float64 from the products, exactly n where nothing moves.
    """
    lr, beta, gain, whole = float(rule.lr), update.beta, update.gain, update.follow * update.gain + update.ahead
    ww, g_slope, b_slope = found.ww.double(), found.g_slope.double(), found.b_slope.double()
    down = ww.sqrt() / norms
    stays = 1.0 - lr * whole * rule.decay
    w_w, w_b, w_g = stays / down, -lr * update.follow * beta, -lr * whole * down
    moved = w_b * w_b * found.b_total.double() + w_g * w_g * found.g_total.double()
    mixed = w_w * (w_b * b_slope + w_g * g_slope) + w_b * w_g * (found.gb.double() / ww + b_slope * g_slope)
    squared = (stays * norms).square() + moved + 2.0 * ww * mixed
    end = squared.sqrt()
    numbers: list[Scalar] = [
        _where_moved(lr, w_w / end),
        w_b / end,
        w_g / end,
        gain * rule.decay / down,
        beta,
        gain * down,
    ]
    if rule.follows:
        norms.copy_(end)
    dtype = found.ww.dtype
    ww_, wb, wg, bw, bb, bg = (x.to(dtype) if isinstance(x, Tensor) else x for x in numbers)
    return Coefficients(ww_, wb, wg, bw, bb, bg, moved > squared, carried=False)


def scaled_step(found: TangentProducts, update: MomentumUpdate, lr: Scalar) -> Coefficients:
    r"""Step in the scaled metric, ``p = beta b + gain ‖w‖ g`` and ``w' = w − η ‖w‖ d``."""
    (d_b, d_g), norm = update.direction, found.ww.sqrt()
    far = torch.zeros_like(norm, dtype=torch.bool)
    return Coefficients(1.0, -lr * norm * d_b, -lr * found.ww * d_g, 0.0, update.beta, update.gain * norm, far)


_STEPS: dict[str, Callable[[TangentProducts, MomentumUpdate, Scalar], Coefficients]] = {
    "sgd": normalized_step,
    "adam": normalized_step,
    "sgd-g": geodesic_step,
    "adam-g": geodesic_step,
    "angular": geodesic_step,
    "projected": projected_step,
    "scaled-metric": scaled_step,
}
