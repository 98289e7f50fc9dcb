"""Stochastic gradient descent on products of spheres and plain parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from torch.optim.sgd import sgd

from manifold_nets.manifold import SphereProduct
from manifold_nets.optim.backends.rule import Rule, StepInput
from manifold_nets.optim.base import SphereOptimizer
from manifold_nets.optim.param_groups import Group
from manifold_nets.optim.plain_run import of_plain_run

__all__ = ["RiemannianSGD"]


class RiemannianSGD(SphereOptimizer, torch.optim.SGD):
    r"""Stochastic gradient descent with momentum, on any mix of products of spheres and plain parameters.

    Plain parameters take the steps of `torch.optim.SGD`, bit for bit. A weight on a `manifold_nets.SphereProduct`
    takes the same steps on its spheres: with radius r, Riemannian gradient ξ, momentum μ and dampening τ,

    .. math:: b ← μ b + (1-τ) ξ, \quad d = b \text{ or, with Nesterov, } ξ + μ b, \quad
              w ← r (w - η d)/‖w - η d‖, \quad b ← b - ⟨w, b⟩ w/r^2 .

    The momentum stays tangent, a learning rate η means the same at every radius, and every step measures the norms, so
    they do not drift. ``weight_decay`` acts on plain parameters only: on a sphere it would pull along the radius, where
    it has no effect. Half-precision weights are stepped in float32 and rounded once. Gradients are never overwritten. A
    gradient with NaN or infinity makes its group NaN, as in torch, and so does one whose square overflows the compute
    dtype (in float32, a norm above about 1e19).

    By default, weights on the CPU whose groups are contiguous in memory are stepped by a C kernel, all in one call; it
    is compiled at first use (see `manifold_nets.optim.backends.native`). On CUDA and ROCm devices, Triton kernels do
    the same if Triton is installed (``manifold_nets/optim/backends/triton_kernel.py``). Other weights, and all weights
    without a kernel, are stepped by batched torch operations. All backends agree up to rounding.

    Args:
        params: parameters, named parameters, or parameter groups, preferably those of `manifold_nets.param_groups`.
        lr: learning rate η; on spheres, radians per unit of momentum.
        momentum: factor μ.
        dampening: τ, from the second step on, as in torch.
        weight_decay: L2 penalty of the plain parameters.
        nesterov: whether to use Nesterov's momentum.
        maximize: whether to ascend.
        foreach: True steps by batched torch operations, False one weight at a time; for plain parameters, torch's
            option.
        differentiable: torch's option; only for plain parameters.
        fused: True requires a compiled kernel (C for weights on the CPU, Triton on CUDA and ROCm devices) and raises an
            error if there is none; False disables it; for plain parameters, torch's option.
        compile: True compiles the steps on spheres with `torch.compile`, one kernel for all sizes, on the CPU or a GPU.
        master_weights: whether half-precision weights on spheres keep a float32 copy in the state (``"master_weight"``)
            that takes the steps, with moments in float32, so that steps below the weights' precision add up.

    Raises:
        NativeKernelError: in a step with ``fused=True``, if there is no kernel for a weight's device.
        ManifoldNetsError: a weight cannot be trained on its spheres, or would be trained as a Euclidean one; see
            `manifold_nets.optim.param_groups.resolve_manifolds`.

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

    _kind = "sgd"

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | Tensor = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        compile: bool | None = None,  # noqa: A002 - torch.compile, torch.nn.Module.compile
        master_weights: bool = False,
    ) -> None:
        self._prepare(compile=compile, master_weights=master_weights, fused=fused, foreach=foreach)
        torch.optim.SGD.__init__(
            self,
            params,
            lr=lr,
            momentum=momentum,
            dampening=dampening,
            weight_decay=weight_decay,
            nesterov=nesterov,
            maximize=maximize,
            foreach=foreach,
            differentiable=differentiable,
            fused=fused,
        )
        if type(self) is RiemannianSGD:
            self._warn_of_plain_rates(lambda norm, _: 1 / norm**2, "η/n² for filters of norm n before the conversion")

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

    def _rule(self, group: Group) -> Rule:
        rule = Rule(self._kind, group["lr"], group["momentum"], group["nesterov"], group["maximize"])
        return of_plain_run(rule, group)

    def _input(
        self, group: Group, state: dict[str, Any], weight: Tensor, gradient: Tensor, manifold: SphereProduct
    ) -> StepInput:
        if group["momentum"] == 0:
            return StepInput(weight, gradient, manifold)
        dampening = group["dampening"]
        if state.get("momentum_buffer") is None:
            # The first momentum is the gradient itself, as in torch.
            state["momentum_buffer"], dampening = torch.zeros_like(weight, requires_grad=False), 0.0
        return StepInput(weight, gradient, manifold, state["momentum_buffer"], dampening=dampening)

    def _advance(self, group: Group, inputs: Sequence[StepInput]) -> None:
        for member in inputs:
            member.dampening = group["dampening"]


def _multi_tensor(group: Group, params: list[Tensor]) -> bool:
    """Whether torch may use its multi-tensor implementation: on request, and by default unless on the CPU."""
    if group["foreach"] is None:
        return not group["fused"] and any(not parameter.is_cpu for parameter in params)
    return bool(group["foreach"])
