"""The update rules of the optimizers on products of spheres: pure functions of tensors, in place.

A rule sees a weight in the view of its partition, in the dtype to compute in; `Spheres` says which axes of the view
lie inside a group and how large the spheres are. It knows nothing of parameters, states, dtypes on disk or several
weights: `manifold_nets.optim.workspace` prepares its arguments and takes its results back. With ``r`` the radius and
``g`` the Euclidean gradient, the metric ⟨ξ, η⟩/r² of `manifold_nets.SphereProduct` makes the Riemannian gradient
``ξ = r² g − ⟨w, g⟩ w``, and every rule moves a weight of radius ``r`` as it moves ``u = w/r`` on unit spheres.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Spheres", "riemannian_adam_", "riemannian_sgd_"]


class Spheres(NamedTuple):
    """The groups of a viewed weight: the axes inside a group, and the radius, or one a group that broadcasts."""

    axes: tuple[int, ...]
    radius: float | Tensor

    def dot(self, x: Tensor, y: Tensor) -> Tensor:
        """Return ⟨x, y⟩ of each group, with size 1 along the axes inside a group.

        The products are added by torch's cascade summation: those of `torch.linalg.vector_norm` and of a batched
        matrix product are added in sequence, and are off by hundreds of machine epsilons on a million entries.
        """
        return (x * y).sum(self.axes, keepdim=True)


def riemannian_sgd_(
    weight: Tensor,
    gradient: Tensor,
    buffer: Tensor | None,
    spheres: Spheres,
    *,
    lr: float | Tensor,
    momentum: float = 0.0,
    dampening: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
) -> Tensor | None:
    r"""Take one step of stochastic gradient descent with momentum on a product of spheres.

    With momentum μ, dampening τ, learning rate η and the Riemannian gradient ξ (minus ξ to maximize),

    .. math:: b ← μ b + (1-τ) ξ, \quad d = b \text{ or } ξ + μ b, \quad
              w' = r (w - η d)/‖w - η d‖, \quad b' = b - ⟨w', b⟩ w'/r^2 ,

    where the first b is ξ, as in `torch.optim.SGD`, and d = ξ + μ b is Nesterov's. The norm is measured after the
    step, not predicted: rounding does not add up. A learning rate of 0 leaves the weight as it is.

    Args:
        weight: the point ``w``, in the view of its partition; changed in place.
        gradient: the Euclidean gradient, of the same shape; only read.
        buffer: the momentum, tangent at ``w``, changed in place; None before the first step.
        spheres: the groups and their radii.
        lr: learning rate in radians per unit of momentum.
        momentum: factor μ.
        dampening: τ.
        nesterov: whether to look ahead.
        maximize: whether to ascend.

    Returns:
        The momentum, tangent at the new point; None where ``momentum`` is 0.

    Example:
        >>> w = torch.tensor([[1.0, 0.0]])
        >>> _ = riemannian_sgd_(w, torch.tensor([[5.0, -1.0]]), None, Spheres((1,), 1.0), lr=1.0)
        >>> w
        tensor([[0.7071, 0.7071]])
    """
    sign = -1.0 if maximize else 1.0
    radial = spheres.dot(weight, gradient)
    square = spheres.radius * spheres.radius
    if momentum != 0:
        fresh = sign if buffer is None else sign * (1 - dampening)
        if buffer is None:
            buffer = weight * (-sign * radial)
        else:
            buffer.mul_(momentum).addcmul_(weight, radial, value=-fresh)
        _add_scaled(buffer, gradient, fresh * square)
    if _is_zero(lr):
        return buffer if momentum != 0 else None
    if momentum == 0 or nesterov:
        # The two terms of −η ξ, without a tensor for ξ.
        weight.mul_(1 + (lr * sign) * radial)
        _add_scaled(weight, gradient, -lr * sign * square)
    if momentum == 0 or buffer is None:
        _retract(weight, spheres)
        return None
    _add_scaled(weight, buffer, -lr * momentum if nesterov else -lr)
    _retract(weight, spheres)
    _transport(buffer, weight, spheres)
    return buffer


def riemannian_adam_(
    weight: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    max_exp_avg_sq: Tensor | None,
    spheres: Spheres,
    *,
    lr: float | Tensor,
    beta1: float | Tensor = 0.9,
    beta2: float | Tensor = 0.999,
    eps: float = 1e-8,
    step: float | Tensor = 1,
    maximize: bool = False,
) -> None:
    r"""Take one step of Adam, or of AMSGrad, on a product of spheres: one second moment a sphere.

    With the Riemannian gradient ξ (minus ξ to maximize), in step t,

    .. math:: m ← β_1 m + (1-β_1) ξ, \quad v ← β_2 v + (1-β_2) ‖ξ‖^2/r^2, \quad
              d = \frac{m/(1-β_1^t)}{\sqrt{v/(1-β_2^t)} + ε}, \\
              w' = r (w - η d)/‖w - η d‖, \quad m' = m - ⟨w', m⟩ w'/r^2 ,

    with the largest v so far in its place for AMSGrad. Where the gradients agree a step is of about η radians.

    Args:
        weight: the point ``w``, in the view of its partition; changed in place.
        gradient: the Euclidean gradient, of the same shape; only read.
        exp_avg: the first moment ``m``, tangent at ``w``; changed in place.
        exp_avg_sq: the second moment ``v``, one a sphere, with size 1 along the axes inside a group; changed in place.
        max_exp_avg_sq: the largest ``v`` so far, changed in place, for AMSGrad; None for Adam.
        spheres: the groups and their radii.
        lr: learning rate in radians.
        beta1: decay of the first moment.
        beta2: decay of the second moment.
        eps: added to the root of the second moment.
        step: number of this step, counted from 1.
        maximize: whether to ascend.

    References:
        Bécigneul, Ganea, *Riemannian adaptive optimization methods*, ICLR 2019, arXiv:1810.00760.

    Example:
        >>> w, m, v = torch.tensor([[1.0, 0.0]]), torch.zeros(1, 2), torch.zeros(1, 1)
        >>> riemannian_adam_(w, torch.tensor([[5.0, -1.0]]), m, v, None, Spheres((1,), 1.0), lr=1.0)
        >>> w
        tensor([[0.7071, 0.7071]])
    """
    square = spheres.radius * spheres.radius
    scaled = gradient if isinstance(square, float) and square == 1.0 else gradient * square
    rgrad = torch.addcmul(scaled, weight, spheres.dot(weight, gradient), value=-1)
    if maximize:
        rgrad.neg_()
    exp_avg.lerp_(rgrad, 1 - beta1)
    exp_avg_sq.lerp_(spheres.dot(rgrad, rgrad) / square, 1 - beta2)
    second = exp_avg_sq
    if max_exp_avg_sq is not None:
        second = max_exp_avg_sq.copy_(torch.maximum(max_exp_avg_sq, exp_avg_sq))
    if _is_zero(lr):
        return
    root = (second.sqrt() / (1 - beta2**step) ** 0.5).add_(eps)
    weight.addcmul_(exp_avg, (-lr / (1 - beta1**step)) / root)
    _retract(weight, spheres)
    _transport(exp_avg, weight, spheres)


def _add_scaled(x: Tensor, y: Tensor, factor: float | Tensor) -> None:
    """Add ``factor · y`` to ``x`` in place and in one pass, for a number or for one factor a group."""
    if isinstance(factor, Tensor):
        x.addcmul_(y, factor)
    else:
        x.add_(y, alpha=factor)


def _retract(weight: Tensor, spheres: Spheres) -> None:
    """Scale each group to its radius, in place."""
    squares = spheres.dot(weight, weight)
    # Squares out of range would send the group to zero without a word; 0·∞ makes it NaN, as a diverged step should.
    weight.mul_((squares * 0 + spheres.radius) / squares.sqrt())


def _transport(vector: Tensor, weight: Tensor, spheres: Spheres) -> None:
    """Project a vector on the tangent space at the weight, in place."""
    vector.addcmul_(weight, spheres.dot(weight, vector) / (spheres.radius * spheres.radius), value=-1)


def _is_zero(lr: float | Tensor) -> bool:
    return not isinstance(lr, Tensor) and lr == 0
