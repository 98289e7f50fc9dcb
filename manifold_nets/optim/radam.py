"""Adam on products of spheres and plain parameters."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.optim.adam import adam
from torch.optim.optimizer import ParamsT

from manifold_nets.groups import accumulation_dtype
from manifold_nets.manifold import SphereProduct
from manifold_nets.optim.base import SphereOptimizer
from manifold_nets.optim.executions.sharding import zero_scalars
from manifold_nets.optim.membership import Group
from manifold_nets.optim.rules.members import Member, Rule

__all__ = ["RiemannianAdam"]


_TORCH_OPTIONS = (
    *("foreach", "capturable", "differentiable", "fused", "grad_scale", "found_inf", "has_complex"),
    *("decoupled_weight_decay", "amsgrad", "beta1", "beta2", "lr", "weight_decay", "eps", "maximize"),
)


class RiemannianAdam(SphereOptimizer, torch.optim.Adam):
    r"""Adam, or AMSGrad, on any mix of products of spheres and plain parameters.

    Plain parameters take the steps of `torch.optim.Adam`, bit for bit. A weight on a `manifold_nets.SphereProduct`
    keeps a tangent first moment and *one second moment a sphere*: with radius r and Riemannian gradient ξ,

    .. math:: m ← β_1 m + (1-β_1) ξ, \quad v ← β_2 v + (1-β_2) ‖ξ‖^2/r^2, \quad
              d = \frac{m/(1-β_1^t)}{\sqrt{v/(1-β_2^t)} + ε}, \\
              w ← r (w - η d)/‖w - η d‖, \quad m ← m - ⟨w, m⟩ w/r^2 ,

    with the largest v so far in its place for AMSGrad: a step is of about η radians at every radius. By Cauchy's
    inequality step t turns no sphere by more than

    .. math:: η \, \frac{1-β_1}{1-β_1^t} \Big(\frac{1-β_2^t}{1-β_2} \sum_{j<t} (β_1^2/β_2)^j\Big)^{1/2} ,

    which is η in the first. A tangential part that is nothing but rounding (shorter than 1.5 machine epsilons of its
    gradient in float32 and float64, about one in half precision) counts as zero, in every execution. ``weight_decay``,
    decoupled or not, acts on plain parameters only: on a sphere it would pull along the radius, where nothing can
    move, and it costs nothing there.
    Half-precision weights are stepped in float32 and rounded once; their second moments stay in float32. Gradients
    are never written to. A gradient that is not finite makes its group NaN, as in torch, and so does one whose square
    is beyond the range of the dtype to compute in (in float32, a norm above about 1e19).

    By default weights on the CPU whose groups are runs of memory are stepped by a kernel in C, all in one call; it is
    compiled at first use (see `manifold_nets.optim.executions.native`). Other weights, and all without a compiler, are
    stepped by batches of torch's operations. All executions agree to rounding.

    Args:
        params: parameters, named parameters, or groups of them, best those of `manifold_nets.param_groups`.
        lr: learning rate η; on spheres, radians.
        betas: decays β1 and β2 of the moments.
        eps: ε, added to the root of the second moment.
        weight_decay: weight decay of the plain parameters.
        amsgrad: whether to use AMSGrad.
        foreach: True takes steps by batches of torch's operations, False by one weight after the other; for the plain
            parameters torch's choice.
        maximize: whether to ascend.
        capturable: torch's option; only for plain parameters.
        differentiable: torch's option; only for plain parameters.
        fused: True asks for the kernel in C where the weight is on the CPU, and is an error where there is no compiler;
            False does without; for the plain parameters torch's choice.
        compile: True lets `torch.compile` make the steps on spheres, one kernel for all sizes, on the CPU or a GPU.
        master_weights: whether half-precision weights on spheres keep a float32 copy in the state (``"master_weight"``)
            that takes the steps, with moments in float32: steps below the weights' last digit then add up.
        decoupled_weight_decay: whether plain parameters decay as in AdamW.

    Raises:
        NativeKernelError: in a step with ``fused=True``, there is no kernel for weights on the CPU.
        ManifoldNetsError: a weight cannot be trained on its spheres, or would be trained off them; see
            `manifold_nets.optim.membership.resolve_manifolds`.

    References:
        Bécigneul, Ganea, *Riemannian adaptive optimization methods*, ICLR 2019, arXiv:1810.00760.

    Example:
        >>> import geoopt, manifold_nets as mn
        >>> sphere = mn.SphereProduct((4, 3))
        >>> weight = geoopt.ManifoldParameter(sphere.random(), manifold=sphere)
        >>> optimizer = mn.optim.RiemannianAdam([weight], lr=1e-3)
        >>> weight.sum().backward()
        >>> optimizer.step()
        >>> optimizer.state[weight]["exp_avg_sq"].shape
        torch.Size([4, 1])
    """

    _moments = ("step", "exp_avg", "exp_avg_sq")

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        compile: bool | None = None,  # noqa: A002 - torch.compile, torch.nn.Module.compile
        master_weights: bool = False,
    ) -> None:
        self._prepare(compile=compile, master_weights=master_weights, fused=fused, foreach=foreach)
        torch.optim.Adam.__init__(
            self,
            params,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            amsgrad=amsgrad,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            decoupled_weight_decay=decoupled_weight_decay,
        )
        if type(self) is RiemannianAdam:
            formula = "η√d/n for filters of d entries and norm n before the conversion"
            self._warn_of_plain_rates(lambda norm, size: math.sqrt(size) / norm, formula)

    def _before_step(self) -> None:
        self._accelerator_graph_capture_health_check()

    def _step_plain(self, group: Group) -> None:
        params: list[Tensor] = []
        gradients: list[Tensor] = []
        moments: tuple[list[Tensor], list[Tensor], list[Tensor]] = ([], [], [])
        steps: list[Tensor] = []
        has_complex = self._init_group(group, params, gradients, *moments, steps)  # type: ignore[no-untyped-call]
        options = dict(group, beta1=group["betas"][0], beta2=group["betas"][1], has_complex=has_complex)
        for name in ("grad_scale", "found_inf"):
            options[name] = getattr(self, name, None)
        adam(params, gradients, *moments, steps, **{name: options[name] for name in _TORCH_OPTIONS})

    def _rule(self, group: Group) -> Rule:
        beta1, beta2 = (float(beta) for beta in group["betas"])
        return Rule("adam", group["lr"], beta1, maximize=group["maximize"], beta2=beta2, eps=group["eps"])

    def _member(
        self, group: Group, state: dict[str, Any], weight: Tensor, gradient: Tensor, manifold: SphereProduct
    ) -> Member:
        if "exp_avg" not in state:
            state.update(initial_state(weight, manifold, group["amsgrad"]))
        state["step"] += 1
        second = (state["exp_avg_sq"], state["max_exp_avg_sq"] if group["amsgrad"] else None)
        return Member(weight, gradient, manifold, state["exp_avg"], second, step=float(state["step"]))


def initial_state(weight: Tensor, manifold: SphereProduct, amsgrad: bool) -> dict[str, Any]:
    """Return zero moments: the first of the weight's shape and dtype, the second one a sphere in float32 or better."""
    per_sphere = zero_scalars(weight, manifold, accumulation_dtype(weight.dtype))
    state = {
        # On the CPU, as torch keeps it, wherever the weight is: reading it there waits for nothing.
        "step": torch.tensor(0.0, dtype=torch.float32, device="cpu"),
        "exp_avg": torch.zeros_like(weight, memory_format=torch.preserve_format, requires_grad=False),
        "exp_avg_sq": per_sphere,
    }
    if amsgrad:
        state["max_exp_avg_sq"] = per_sphere.clone()
    return state
