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
from manifold_nets.optim.plain_run import norms_of, scaled_biases

__all__ = ["clip_plain_grad_norm_", "clip_sphere_grad_norm_"]


@torch.no_grad()
def clip_sphere_grad_norm_(model: nn.Module, max_norm: float) -> Tensor:
    r"""Clip the Riemannian gradient of every sphere of a model to a length, in place.

    With the Riemannian gradient :math:`ξ_G = r^2 (g_G - ⟨w_G, g_G⟩ w_G/r^2)` of group G, whose length is
    :math:`‖ξ_G‖/r`,

    .. math:: g_G ← g_G · \min(1, ν / (‖ξ_G‖/r)) .

    Each sphere is clipped separately, so one filter's large gradient does not affect the others. The bound means the
    same at every radius: it is in units of the loss per radian, and a step of `RiemannianSGD` without momentum turns a
    filter by at most lr·ν radians. Gradients of plain parameters are not changed; for them use
    `torch.nn.utils.clip_grad_norm_`, which scales all gradients by one number. Call this after
    `torch.amp.GradScaler.unscale_`.

    Args:
        model: a model; its constrained weights without a gradient are skipped.
        max_norm: the bound ν, positive.

    Returns:
        The largest length before clipping, a scalar in float32 or better; 0 if no constrained weight has a gradient. An
        infinite or NaN gradient makes its own group NaN and this value infinite or NaN.

    Raises:
        OptionError: ``max_norm`` is not positive.

    References:
        Cho, Lee, *Riemannian approach to batch normalization*, NeurIPS 2017, arXiv:1709.09603, whose SGD-G clips
        the projected gradient of each weight vector separately.

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
    r"""Clip all gradients together, as `torch.nn.utils.clip_grad_norm_` would in the plain run that continues here.

    An optimizer of `from_torch` holds a weight ``r u`` in place of the plain weight ``n u``, whose gradient is r/n
    times that of ``r u``; the gradients of the biases that were rescaled with it change accordingly. With g all
    gradients of the plain run,

    .. math:: g ← g · \min(1, ν / (‖g‖ + 10^{-6})) .

    torch's own function would use the gradients at the norms on the spheres, and clip other steps. Call this after
    `torch.amp.GradScaler.unscale_`.

    Args:
        optimizer: an optimizer made by `from_torch`; parameters without a gradient are skipped.
        max_norm: the bound ν, positive.

    Returns:
        ‖g‖ before clipping, a scalar in float32 or better; 0 if no parameter has a gradient.

    Raises:
        OptionError: ``max_norm`` is not positive, or the optimizer does not continue a plain run.

    References:
        Pascanu, Mikolov, Bengio, *On the difficulty of training recurrent neural networks*, ICML 2013, arXiv:1211.5063.

    Example:
        >>> import manifold_nets as mn
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
        >>> sgd, x = torch.optim.SGD(net.parameters(), lr=0.1), torch.randn(16, 4)
        >>> converted = mn.convert(net, x)
        >>> optimizer = mn.optim.from_torch(sgd, net, converted)
        >>> converted(x).square().mean().backward()
        >>> total = clip_plain_grad_norm_(optimizer, 1e-3)
        >>> total > 1e-3, clip_plain_grad_norm_(optimizer, 1.0) <= 1e-3
        (tensor(True), tensor(True))
    """
    if not max_norm > 0:
        raise OptionError("max_norm", max_norm, "a positive number")
    if not all(group.get("transfer") for group in optimizer.param_groups):
        expected = "an optimizer made by manifold_nets.optim.from_torch; for others use torch.nn.utils.clip_grad_norm_"
        raise OptionError("optimizer", type(optimizer).__name__, expected)
    of_biases = dict(scaled_biases(optimizer.param_groups, optimizer.state))
    squares = []
    for group in optimizer.param_groups:
        for weight, manifold in zip(group["params"], group["manifolds"], strict=True):
            if weight.grad is None:
                continue
            gradient = wide(whole(weight.grad))
            if manifold is not None:
                norms = whole(norms_of(optimizer.state[weight], weight, manifold))
                ratio = manifold.radius_for(norms) / norms
                gradient = manifold.partition.multiply(gradient, ratio.to(gradient.dtype))
            elif weight in of_biases:
                gradient = gradient / whole(of_biases[weight]())
            squares.append(gradient.square().sum())
    if not squares:
        return torch.zeros(())
    total = torch.stack([square.to(squares[0].device) for square in squares]).sum().sqrt()
    factor = (max_norm / (total + 1e-6)).clamp(max=1.0)
    for weight in (p for group in optimizer.param_groups for p in group["params"] if p.grad is not None):
        weight.grad.mul_(factor.to(weight.grad.device, weight.grad.dtype))
    return total


def _clipped(weight: Tensor, gradient: Tensor, manifold: SphereProduct, max_norm: float) -> tuple[Tensor, Tensor]:
    """Return the clipped gradient, and the largest length ``‖ξ_G‖/r`` before, in float32 or better."""
    # r times the tangential part of g, rather than ξ, whose factor r² may leave the range.
    lengths = manifold.partition.norms(manifold.proju(wide(weight), gradient)) * manifold.radius_for(weight)
    return manifold.partition.multiply(gradient, max_norm / lengths.clamp(min=max_norm)), lengths.amax()
