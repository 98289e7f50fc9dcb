"""Clipping of gradients sphere by sphere, in the metric in which the optimizers step."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from manifold_nets.constraints import constrained_weights, joint_spheres
from manifold_nets.errors import OptionError
from manifold_nets.gathered import whole, write_whole_
from manifold_nets.groups import wide
from manifold_nets.joint_sphere import JointSphereMember
from manifold_nets.manifold import SphereProduct
from manifold_nets.optim.plain_run import NORM, biases_of_the_plain_run

__all__ = ["clip_plain_grad_norm_", "clip_sphere_grad_norm_"]


@torch.no_grad()
def clip_sphere_grad_norm_(model: nn.Module, max_norm: float) -> Tensor:
    r"""Clip the Riemannian gradient of every sphere of a model to a length, in place.

    With the Riemannian gradient :math:`ξ_G = r^2 (g_G - ⟨w_G, g_G⟩ w_G/r^2)` of group G, whose length is
    :math:`‖ξ_G‖/r`,

    .. math:: g_G ← g_G · \min(1, ν / (‖ξ_G‖/r)) .

    Each sphere is clipped by itself, so that one filter's large gradient leaves the others as they are, and a bound
    means the same at every radius: it is in units of the loss per radian, and a step of `RiemannianSGD` without
    momentum is of at most lr·ν radians for a filter. Gradients of plain parameters are left to
    `torch.nn.utils.clip_grad_norm_`, which scales all gradients by one number. After `torch.amp.GradScaler.unscale_`.

    Args:
        model: a model; its constrained weights without a gradient are passed over.
        max_norm: the bound ν, positive.

    Returns:
        The largest length before clipping, a scalar in float32 or better; 0 where no constrained weight has a gradient.
        An infinite or NaN gradient makes its own group NaN and this infinite or NaN.

    Raises:
        OptionError: ``max_norm`` is not positive.

    References:
        Cho, Lee, *Riemannian approach to batch normalization*, NeurIPS 2017, arXiv:1709.09603, whose SGD-G clips
        the projected gradient of every weight vector by itself.

    Example:
        >>> import manifold_nets as mn
        >>> layer = mn.layers.UnitNormLinear(2, 2, bias=False)
        >>> _ = layer.load_state_dict({"weight": torch.eye(2)})
        >>> layer.weight.grad = torch.tensor([[7.0, 3.0], [0.05, 7.0]])
        >>> clip_sphere_grad_norm_(layer, 0.1)
        tensor(3.)
        >>> layer.weight.grad
        tensor([[0.2333, 0.1000],
                [0.0500, 7.0000]])
    """
    if not max_norm > 0:
        raise OptionError("max_norm", max_norm, "a positive number")
    largest: list[Tensor] = []
    for weight in constrained_weights(model):
        gradient = weight.parameter.grad
        if gradient is not None and not isinstance(weight.manifold, JointSphereMember):
            clipped, length = _clipped(whole(weight.parameter), wide(whole(gradient)), weight.manifold, max_norm)
            write_whole_(gradient, clipped)
            largest.append(length)
    for joint, weights in joint_spheres(model):
        points = [weight.parameter.detach() for weight in weights]
        gradients = [weight.parameter.grad for weight in weights]
        if any(gradient is not None for gradient in gradients):
            pairs = zip(points, gradients, strict=True)
            rows = joint.join([wide(torch.zeros_like(p) if g is None else g.detach()) for p, g in pairs])
            clipped, length = _clipped(joint.join(points), rows, joint.sphere, max_norm)
            for gradient, part in zip(gradients, joint.split(clipped), strict=True):
                if gradient is not None:
                    gradient.copy_(part)
            largest.append(length)
    return torch.stack([length.to(largest[0].device) for length in largest]).amax() if largest else torch.zeros(())


@torch.no_grad()
def clip_plain_grad_norm_(optimizer: torch.optim.Optimizer, max_norm: float) -> Tensor:
    r"""Clip as `torch.nn.utils.clip_grad_norm_` does in the plain run that an optimizer of `from_torch` follows.

    The gradient at ``r u`` is n/r times that of the plain weight ``n u``; the total norm here is that of the plain
    run, and all gradients are scaled by one number, as there.
    """
    if not max_norm > 0:
        raise OptionError("max_norm", max_norm, "a positive number")
    squares = []
    with biases_of_the_plain_run(optimizer.param_groups, optimizer.state):
        for group in optimizer.param_groups:
            for weight, manifold in zip(group["params"], group["manifolds"], strict=True):
                if weight.grad is None:
                    continue
                gradient = wide(whole(weight.grad))
                norms = optimizer.state[weight].get(NORM) if manifold is not None else None
                if norms is not None:
                    norms = whole(norms)
                    gradient = manifold.partition.multiply(
                        gradient, (manifold.radius_for(norms) / norms).to(gradient.dtype)
                    )
                squares.append(gradient.square().sum())
    if not squares:
        return torch.zeros(())
    total = torch.stack([square.to(squares[0].device) for square in squares]).sum().sqrt()
    factor = (max_norm / (total + 1e-6)).clamp(max=1.0)
    for group in optimizer.param_groups:
        for weight in group["params"]:
            if weight.grad is not None:
                weight.grad.mul_(factor.to(weight.grad.device, weight.grad.dtype))
    return total


def _clipped(weight: Tensor, gradient: Tensor, manifold: SphereProduct, max_norm: float) -> tuple[Tensor, Tensor]:
    """Return the clipped gradient, and the largest length ``‖ξ_G‖/r`` before, in float32 or better."""
    # r times the tangential part of g, rather than ξ, whose factor r² may leave the range.
    lengths = manifold.partition.norms(manifold.proju(wide(weight), gradient)) * manifold.radius_for(weight)
    return manifold.partition.multiply(gradient, max_norm / lengths.clamp(min=max_norm)), lengths.amax()
