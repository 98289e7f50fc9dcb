"""The update rules of the optimizers on products of spheres: pure functions of tensors, in place.

A step has four parts. `manifold_nets.optim.rules.products.tangential` takes all inner products of a weight, its
gradient and its moment; ``Spheres.combine`` adds what other parts of the same sphere have found;
`manifold_nets.optim.rules.coefficients` turns these numbers, a few for each group, into linear combinations; and
`write_` writes them.

A rule sees a weight in the view of its partition, in the dtype to compute in; `Spheres` says which axes of the view
lie inside a group and how large the spheres are. It knows nothing of parameters, states, dtypes on disk or several
weights: `manifold_nets.optim.executions.workspace` prepares its arguments and takes its results back. With ``r``
the radius and
``g`` the Euclidean gradient, the metric ⟨ξ, η⟩/r² of `manifold_nets.SphereProduct` makes the Riemannian gradient
``ξ = r² g − ⟨w, g⟩ w``, and every rule moves a weight of radius ``r`` as it moves ``u = w/r`` on unit spheres.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from manifold_nets.optim.rules.coefficients import Coefficients, adam_coefficients, bias_corrections, sgd_coefficients
from manifold_nets.optim.rules.products import Scalar, Spheres, some, tangential

__all__ = ["combine_", "riemannian_adam_", "riemannian_sgd_", "write_"]


def write_(
    weight: Tensor, gradient: Tensor, moment: Tensor | None, spheres: Spheres, move: Coefficients, *, maximize: bool
) -> None:
    """Write the new weight and the new moment, in place."""
    square = -spheres.square if maximize else spheres.square
    far = move.far if some(move.far) else None
    combine_(weight, gradient, moment, spheres, move._replace(wg=move.wg * square, bg=move.bg * square), far)


def combine_(
    weight: Tensor, gradient: Tensor, moment: Tensor | None, spheres: Spheres, move: Coefficients, far: Tensor | None
) -> None:
    """Write the linear combinations, with coefficients of the Euclidean gradient, and put far ones on their spheres."""
    new = (weight * move.ww).addcmul_(gradient, _tensor(move.wg, weight))
    transported = None
    if moment is not None:
        new.addcmul_(moment, _tensor(move.wb, weight))
        transported = (moment * move.bb).addcmul_(gradient, _tensor(move.bg, weight))
        transported.addcmul_(weight, _tensor(move.bw, weight))
    if far is not None:
        carried = transported if move.carried else None
        norm, *overlap = spheres.dots((new, new), *(() if carried is None else ((new, carried),)))
        if carried is not None:
            transported = torch.addcmul(carried, new, torch.where(far, overlap[0] / norm, 0.0), value=-1)
        norm = norm / spheres.square
        new = new * torch.where(far, (1.0 + 0.0 * norm) / norm.sqrt(), 1.0)
    weight.copy_(new)
    if moment is not None and transported is not None:
        moment.copy_(transported)


def riemannian_sgd_(
    weight: Tensor,
    gradient: Tensor,
    buffer: Tensor | None,
    spheres: Spheres,
    *,
    lr: Scalar,
    momentum: float = 0.0,
    dampening: Scalar = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
) -> None:
    r"""Take one step of stochastic gradient descent with momentum on a product of spheres.

    With momentum μ, dampening τ, learning rate η and the Riemannian gradient ξ (minus ξ to maximize),

    .. math:: b ← μ b + (1-τ) ξ, \quad d = b \text{ or } ξ + μ b, \quad
              w' = r (w - η d)/‖w - η d‖, \quad b' = b - ⟨w', b⟩ w'/r^2 ,

    where d = ξ + μ b is Nesterov's. A learning rate of 0 leaves the weight as it is.

    Args:
        weight: the point ``w``, in the view of its partition; changed in place.
        gradient: the Euclidean gradient, of the same shape; only read.
        buffer: the momentum, changed in place; its part along the weight counts for nothing. Zero before the first
            step, and None where ``momentum`` is 0.
        spheres: the groups and their radii.
        lr: learning rate in radians per unit of momentum.
        momentum: factor μ.
        dampening: τ; 0 in the first step, as in `torch.optim.SGD`.
        nesterov: whether to look ahead.
        maximize: whether to ascend.

    Example:
        >>> w = torch.tensor([[1.0, 0.0]])
        >>> riemannian_sgd_(w, torch.tensor([[5.0, -1.0]]), None, Spheres((1,), 1.0), lr=1.0)
        >>> w
        tensor([[0.7071, 0.7071]])
    """
    found, _ = tangential(weight, gradient, buffer, spheres, maximize=maximize, sharp=False)
    move = sgd_coefficients(found, lr=lr, momentum=momentum, dampening=dampening, nesterov=nesterov)
    write_(weight, gradient, buffer, spheres, move, maximize=maximize)


def riemannian_adam_(
    weight: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    max_exp_avg_sq: Tensor | None,
    spheres: Spheres,
    *,
    lr: Scalar,
    beta1: Scalar = 0.9,
    beta2: Scalar = 0.999,
    eps: float = 1e-8,
    step: Scalar = 1,
    maximize: bool = False,
    rounding: float | None = None,
) -> None:
    r"""Take one step of Adam, or of AMSGrad, on a product of spheres: one second moment a sphere.

    With the Riemannian gradient ξ (minus ξ to maximize), in step t,

    .. math:: m ← β_1 m + (1-β_1) ξ, \quad v ← β_2 v + (1-β_2) ‖ξ‖^2/r^2, \quad
              d = \frac{m/(1-β_1^t)}{\sqrt{v/(1-β_2^t)} + ε}, \\
              w' = r (w - η d)/‖w - η d‖, \quad m' = m - ⟨w', m⟩ w'/r^2 ,

    with the largest v so far in its place for AMSGrad. Where the gradients agree a step is of about η radians; see
    `manifold_nets.optim.RiemannianAdam` for the longest.

    Args:
        weight: the point ``w``, in the view of its partition; changed in place.
        gradient: the Euclidean gradient, of the same shape; only read.
        exp_avg: the first moment ``m``, changed in place; its part along the weight counts for nothing.
        exp_avg_sq: the second moment ``v``, one a sphere, with size 1 along the axes inside a group; changed in place.
        max_exp_avg_sq: the largest ``v`` so far, changed in place, for AMSGrad; None for Adam.
        spheres: the groups and their radii.
        lr: learning rate in radians.
        beta1: decay of the first moment.
        beta2: decay of the second moment.
        eps: added to the root of the second moment.
        step: number of this step, counted from 1.
        maximize: whether to ascend.
        rounding: how long a tangential part, relative to the gradient, counts as zero; by default
            `manifold_nets.optim.rules.products.rounding_of` the gradient's dtype.

    References:
        Bécigneul, Ganea, *Riemannian adaptive optimization methods*, ICLR 2019, arXiv:1810.00760.

    Example:
        >>> w, m, v = torch.tensor([[1.0, 0.0]]), torch.zeros(1, 2), torch.zeros(1, 1)
        >>> riemannian_adam_(w, torch.tensor([[5.0, -1.0]]), m, v, None, Spheres((1,), 1.0), lr=1.0)
        >>> w
        tensor([[0.7071, 0.7071]])
    """
    found, gradient = tangential(weight, gradient, exp_avg, spheres, maximize=maximize, sharp=True, rounding=rounding)
    corrections = bias_corrections(beta1, beta2, step)
    options: Any = {"lr": lr, "beta1": beta1, "beta2": beta2, "eps": eps, "corrections": corrections}
    move = adam_coefficients(found, exp_avg_sq, max_exp_avg_sq, **options)
    write_(weight, gradient, exp_avg, spheres, move, maximize=maximize)


def _tensor(value: Scalar, like: Tensor) -> Tensor:
    return value if isinstance(value, Tensor) else torch.full((), value, dtype=like.dtype, device=like.device)
