"""Stochastic gradient descent on products of spheres and plain parameters."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim.sgd import sgd

from manifold_nets.manifold import SphereProduct
from manifold_nets.optim.base import SphereOptimizer
from manifold_nets.optim.membership import Group
from manifold_nets.optim.updates import riemannian_sgd_
from manifold_nets.optim.workspace import Workspace

__all__ = ["RiemannianSGD"]


class RiemannianSGD(SphereOptimizer, torch.optim.SGD):
    r"""Stochastic gradient descent with momentum, on any mix of products of spheres and plain parameters.

    Plain parameters take the steps of `torch.optim.SGD`, bit for bit. A weight on a `manifold_nets.SphereProduct`
    takes the same steps on its spheres: with radius r, Riemannian gradient ξ, momentum μ and dampening τ,

    .. math:: b ← μ b + (1-τ) ξ, \quad d = b \text{ or, with Nesterov, } ξ + μ b, \quad
              w ← r (w - η d)/‖w - η d‖, \quad b ← b - ⟨w, b⟩ w/r^2 .

    The momentum stays tangent, a learning rate η means the same at every radius, and the norms are measured after
    each step, so that they do not drift. ``weight_decay`` acts on plain parameters only: on a sphere it would pull
    along the radius, where nothing can move, and it costs nothing there. ``foreach`` and ``fused`` choose torch's
    implementation for the plain parameters. Half-precision weights are stepped in float32 and rounded once. Gradients
    are never written to. A gradient that is not finite makes its group NaN, as in torch.

    Args:
        params: parameters, named parameters, or groups of them, best those of `manifold_nets.param_groups`.
        lr: learning rate η; on spheres, radians per unit of momentum.
        momentum: factor μ.
        dampening: τ, from the second step on, as in torch.
        weight_decay: L2 penalty of the plain parameters.
        nesterov: whether to use Nesterov's momentum.
        maximize: whether to ascend.
        foreach: torch's choice for the plain parameters.
        differentiable: torch's option; only for plain parameters.
        fused: torch's choice for the plain parameters.

    Raises:
        ManifoldNetsError: a weight cannot be trained on its spheres, or would be trained off them; see
            `manifold_nets.optim.membership.resolve_manifolds`.

    References:
        Badrinarayanan, Mishra, Cipolla, arXiv:1511.01029; Bonnabel, *Stochastic gradient descent on Riemannian
        manifolds*, IEEE Trans. Automatic Control 58(9), 2013, arXiv:1111.5280.

    Example:
        >>> import geoopt, manifold_nets as mn
        >>> sphere = mn.SphereProduct((4, 3))
        >>> weight = geoopt.ManifoldParameter(sphere.random(), manifold=sphere)
        >>> optimizer = mn.optim.RiemannianSGD([weight], lr=0.1, momentum=0.9)
        >>> weight.sum().backward()
        >>> optimizer.step()
        >>> sphere.check_point_on_manifold(weight)
        True
    """

    def _step_plain(self, group: Group) -> None:
        params: list[Tensor] = []
        gradients: list[Tensor] = []
        buffers: list[Tensor | None] = []
        sparse = self._init_group(group, params, gradients, buffers)  # type: ignore[no-untyped-call]
        if group["nesterov"] and _multi_tensor(group, params):
            # There torch adds the momentum to the gradients in place.
            gradients = [gradient.clone() for gradient in gradients]
        sgd(
            params,
            gradients,
            buffers,
            has_sparse_grad=sparse,
            foreach=group["foreach"],
            fused=group["fused"],
            grad_scale=getattr(self, "grad_scale", None),
            found_inf=getattr(self, "found_inf", None),
            **{key: group[key] for key in ("weight_decay", "momentum", "lr", "dampening", "nesterov", "maximize")},
        )
        if group["momentum"] != 0:
            for parameter, buffer in zip(params, buffers, strict=True):
                self.state[parameter]["momentum_buffer"] = buffer

    def _step_constrained(self, group: Group, weight: Tensor, gradient: Tensor, manifold: SphereProduct) -> None:
        momentum, dampening, buffer = group["momentum"], group["dampening"], None
        if momentum != 0:
            state = self.state[weight]
            if state.get("momentum_buffer") is None:
                # The first momentum is the gradient itself, as in torch.
                state["momentum_buffer"], dampening = torch.zeros_like(weight, requires_grad=False), 0.0
            buffer = state["momentum_buffer"]
        space = Workspace(manifold, weight)
        riemannian_sgd_(
            space.open(weight),
            space.read(gradient),
            None if buffer is None else space.open(buffer),
            space.spheres,
            lr=float(group["lr"]),
            momentum=momentum,
            dampening=dampening,
            nesterov=group["nesterov"],
            maximize=group["maximize"],
        )
        space.close()


def _multi_tensor(group: Group, params: list[Tensor]) -> bool:
    """Whether torch may take its multi-tensor implementation: on request, and by default off the CPU."""
    if group["foreach"] is None:
        return not group["fused"] and any(not parameter.is_cpu for parameter in params)
    return bool(group["foreach"])
