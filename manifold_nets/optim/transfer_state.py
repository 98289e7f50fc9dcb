"""Transfer the moments of a plain model's optimizer to that of the converted model, in mid-training."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from manifold_nets.constraints import constrained_weights
from manifold_nets.errors import OptionError
from manifold_nets.manifold import SphereProduct
from manifold_nets.optim.adam import RiemannianAdam
from manifold_nets.optim.sgd import RiemannianSGD

__all__ = ["carry_momentum"]

_MOMENTS = {"momentum_buffer": RiemannianSGD, "exp_avg": RiemannianAdam}


def carry_momentum(
    plain: nn.Module, optimizer: torch.optim.Optimizer, converted: nn.Module, target: torch.optim.Optimizer
) -> None:
    r"""Transfer the moments of a running optimizer to the optimizer of the converted model.

    For a filter w = n u and its point W = r u on a sphere of radius r, ∂L/∂u = n ∂L/∂w, and the Riemannian gradient at
    W is ξ = r² P ∂L/∂W = r P ∂L/∂u = n r P ∂L/∂w, with P the projection onto the tangent space. Moments are sums of
    gradients, and n hardly changes over the steps that they remember, so

    .. math:: b_{sphere} = n r P b, \qquad m_{sphere} = n r P m, \qquad v_{sphere} = n^2 \sum_i v_i ,

    with one second moment per sphere, the mean of ‖ξ‖²/r². P removes the part along w that weight decay left. With the
    learning rate η/n² the next step of SGD turns u as the plain step does, to first order in its length; that of Adam
    has the direction of its first moment. Moments of plain parameters are copied; those of weights on a joint sphere
    start from zero.

    Args:
        plain: the model before the conversion.
        optimizer: its `torch.optim.SGD`, `Adam` or `AdamW`.
        converted: the model that `manifold_nets.convert` made of it.
        target: a `RiemannianSGD` or `RiemannianAdam` of the converted model, changed in place.

    Raises:
        OptionError: the optimizers are of different kinds, or a parameter of the converted model is missing or has
            another shape in the plain one.

    References:
        Derived above; the metric ⟨ξ, η⟩/r² is that of `manifold_nets.SphereProduct`.

    Example:
        >>> import manifold_nets as mn
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
        >>> sgd, x = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9), torch.randn(16, 4)
        >>> net(x).square().mean().backward(); sgd.step()
        >>> converted = mn.convert(net, x)
        >>> target = mn.optim.RiemannianSGD(mn.param_groups(converted), lr=0.1, momentum=0.9)
        >>> mn.optim.carry_momentum(net, sgd, converted, target)
        >>> target.state[converted[0].weight]["momentum_buffer"].shape
        torch.Size([8, 4])
    """
    parameters = dict(plain.named_parameters())
    manifolds = {weight.name: weight.manifold for weight in constrained_weights(converted)}
    for name, parameter in converted.named_parameters():
        source = parameters.get(name)
        if source is None or source.shape != parameter.shape:
            raise OptionError("converted", name, "a model that was converted from the plain one")
        state = optimizer.state.get(source)
        if not state:
            continue
        for moment, kind in _MOMENTS.items():
            if moment in state and not isinstance(target, kind):
                raise OptionError("target", type(target).__name__, f"a {kind.__name__}, for an optimizer with {moment}")
        manifold = manifolds.get(name)
        if manifold is None:
            target.state[parameter].update({k: _copied(v) for k, v in state.items()})
        elif isinstance(manifold, SphereProduct):
            target.state[parameter].update(_on_spheres(state, source.detach(), parameter.detach(), manifold))


def _copied(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


def _on_spheres(state: dict[str, Any], weight: Tensor, point: Tensor, manifold: SphereProduct) -> dict[str, Any]:
    """The state of a weight on its spheres."""
    partition = manifold.partition
    norms = partition.norms(weight)
    found: dict[str, Any] = {}
    for key, value in state.items():
        if value is None or key == "step":
            found[key] = _copied(value)
        elif key in _MOMENTS:
            scaled = partition.multiply(value, norms * manifold.radius_for(point)).to(value.dtype)
            found[key] = manifold.proju(point, scaled)
        elif key in ("exp_avg_sq", "max_exp_avg_sq"):
            found[key] = (norms.square() * partition.sum(value)).to(value.dtype)
    return found
