"""Adam on products of spheres and plain parameters: with one second moment per sphere, or one per entry."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adam import adam
from torch.optim.optimizer import ParamsT

from manifold_nets._torch import check_graph_capture
from manifold_nets.errors import OptionError, ParameterGroupError
from manifold_nets.groups import accumulation_dtype
from manifold_nets.joint_sphere import JointSphereMember
from manifold_nets.manifold import SphereProduct
from manifold_nets.optim.backends.rule import Rule, StepInput
from manifold_nets.optim.backends.sharded import zero_scalars
from manifold_nets.optim.base import SphereOptimizer
from manifold_nets.optim.param_groups import Group, constrained_of, name_of
from manifold_nets.optim.plain_run import of_plain_run

__all__ = ["AngularAdam", "RiemannianAdam"]


_TORCH_OPTIONS = (
    *("foreach", "capturable", "differentiable", "fused", "grad_scale", "found_inf", "has_complex"),
    *("decoupled_weight_decay", "amsgrad", "beta1", "beta2", "lr", "weight_decay", "eps", "maximize"),
)


class RiemannianAdam(SphereOptimizer, torch.optim.Adam):
    r"""Adam, or AMSGrad, on any mix of products of spheres and plain parameters.

    Plain parameters take the steps of `torch.optim.Adam`, bit for bit. A weight on a `manifold_nets.SphereProduct`
    has a tangent first moment and *one second moment per sphere*: with radius r and Riemannian gradient ξ,

    .. math:: m ← β_1 m + (1-β_1) ξ, \quad v ← β_2 v + (1-β_2) ‖ξ‖^2/r^2, \quad
              d = \frac{m/(1-β_1^t)}{\sqrt{v/(1-β_2^t)} + ε}, \\
              w ← r (w - η d)/‖w - η d‖, \quad m ← m - ⟨w, m⟩ w/r^2 ,

    where AMSGrad uses the largest v so far. A step is of about η radians at every radius. By Cauchy's inequality, step
    t turns no sphere by more than

    .. math:: η \, \frac{1-β_1}{1-β_1^t} \Big(\frac{1-β_2^t}{1-β_2} \sum_{j<t} (β_1^2/β_2)^j\Big)^{1/2} ,

    which is η in the first step. A tangential part that is only rounding error (shorter than 1.5 machine epsilons of
    its gradient in float32 and float64, about one in half precision) counts as zero, in every backend.
    ``weight_decay``, decoupled or not, acts on plain parameters only: on a sphere it would pull along the radius, where
    it has no effect. Half-precision weights are stepped in float32 and rounded once; their second moments stay in
    float32. Gradients are never overwritten. A gradient with NaN or infinity makes its group NaN, as in torch, and so
    does one whose square overflows the compute dtype (in float32, a norm above about 1e19).

    With ``per="entry"`` each entry has a second moment, as in plain Adam: with u = w/r, its Riemannian gradient ξ, and
    elementwise squares, quotients and roots,

    .. math:: v ← β_2 v + (1-β_2) ξ^2, \quad d = \frac{m/(1-β_1^t)}{\sqrt{v/(1-β_2^t)} + ε}, \quad
              e = d - ⟨u, d⟩ u, \quad u ← (u - η e)/‖u - η e‖ ,

    so that in the first step a sphere of k entries turns by about η√k radians. This is the usual recipe with Adam, a
    projected gradient and a division by the norm, but with a tangent direction. The state then has ``"entry_sq"``, as
    large as the weight, and the path depends on the coordinates. AMSGrad is not defined for it.

    By default, weights on the CPU whose groups are contiguous in memory are stepped by a C kernel, all in one call; it
    is compiled at first use (see `manifold_nets.optim.backends.native`). On CUDA and ROCm devices, Triton kernels do
    the same if Triton is installed (``manifold_nets/optim/backends/triton_kernel.py``). Other weights, and all weights
    without a kernel, are stepped by batched torch operations. All backends agree up to rounding.

    Args:
        params: parameters, named parameters, or parameter groups, preferably those of `manifold_nets.param_groups`.
        lr: learning rate η; on spheres, radians.
        betas: decay rates β1 and β2 of the moments.
        eps: ε, added to the root of the second moment.
        weight_decay: weight decay of the plain parameters.
        amsgrad: whether to use AMSGrad.
        foreach: True steps by batched torch operations, False one weight at a time; for plain parameters, torch's
            option.
        maximize: whether to ascend.
        capturable: whether a CUDA graph can hold the step, as in torch; weights on spheres have to be on a CUDA or ROCm
            device, with Triton installed. With ``lr`` a tensor on the device, its value is read in each replay.
        differentiable: torch's option; only for plain parameters.
        fused: True requires a compiled kernel (C for weights on the CPU, Triton on CUDA and ROCm devices) and raises an
            error if there is none; False disables it; for plain parameters, torch's option.
        compile: True compiles the steps on spheres with `torch.compile`, one kernel for all sizes, on the CPU or a GPU.
        master_weights: whether half-precision weights on spheres keep a float32 copy in the state (``"master_weight"``)
            that takes the steps, with moments in float32, so that steps below the weights' precision add up.
        decoupled_weight_decay: whether plain parameters decay as in AdamW.
        per: ``"sphere"``, or ``"entry"`` for one second moment per entry.

    Raises:
        OptionError: ``per`` has another value, or is ``"entry"`` with ``amsgrad`` or ``compile``.
        NativeKernelError: in a step with ``fused=True``, if there is no kernel for a weight's device.
        ManifoldNetsError: a weight cannot be trained on its spheres, or would be trained as a Euclidean one; see
            `manifold_nets.optim.param_groups.resolve_manifolds`.

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

    _kind = "adam"
    # Whether each entry has a second moment of its own.
    _per_entry = False

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
        per: str = "sphere",
    ) -> None:
        self._choose_moments(per, amsgrad=amsgrad, compiled=bool(compile))
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
            root, count = ("", 0.0) if self._per_entry else ("√d", 0.5)
            formula = f"η{root}/n for filters of d entries and norm n before the conversion"
            self._warn_of_plain_rates(lambda norm, size: size**count / norm, formula)

    def _choose_moments(self, per: str, *, amsgrad: bool, compiled: bool) -> None:
        if per not in ("sphere", "entry"):
            raise OptionError("per", per, "'sphere' or 'entry'")
        if per == "entry":
            if amsgrad or compiled:
                raise OptionError("per", per, f"'sphere' with {'amsgrad' if amsgrad else 'compile'}=True")
            self._per_entry, self._kind = True, "adam-entries"

    def __getstate__(self) -> dict[str, Any]:
        own: dict[str, Any] = {name: vars(self)[name] for name in ("_per_entry", "_kind") if name in vars(self)}
        state: dict[str, Any] = super().__getstate__()
        return {**state, **own}

    @property
    def _second(self) -> str:
        """The key of the second moments in the state."""
        return "entry_sq" if self._per_entry else "exp_avg_sq"

    @property
    def _moments(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("step", "exp_avg", self._second)

    def add_param_group(self, param_group: Group) -> None:
        """Add a group of parameters; with ``per="entry"`` no weight may share its sphere with others."""
        super().add_param_group(param_group)
        number, group = len(self.param_groups) - 1, self.param_groups[-1]
        for index, _, manifold in constrained_of(group) if self._per_entry else ():
            if isinstance(manifold, JointSphereMember):
                self.param_groups.pop()
                expected = "a sphere of its own; use RiemannianAdam or AngularSGD for joint spheres"
                raise ParameterGroupError.on_spheres(name_of(group, number, index), "a joint sphere", expected)

    def _before_step(self) -> None:
        check_graph_capture(self)

    def _step_plain(self, group: Group) -> None:
        for p in group["params"] if group["amsgrad"] else ():
            # Switched on in the middle of a run: the largest second moment is tracked from here on.
            state = self.state.get(p)
            if p.grad is not None and state and "max_exp_avg_sq" not in state:
                state["max_exp_avg_sq"] = torch.zeros_like(state["exp_avg_sq"])
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
        rule = Rule(self._kind, group["lr"], beta1, maximize=group["maximize"], beta2=beta2, eps=group["eps"])
        return of_plain_run(rule, group)

    def _input(
        self, group: Group, state: dict[str, Any], weight: Tensor, gradient: Tensor, manifold: SphereProduct
    ) -> StepInput:
        by_entries = self._rule(group).by_entries
        key, most = ("entry_sq", "max_entry_sq") if by_entries else ("exp_avg_sq", "max_exp_avg_sq")
        if "exp_avg" not in state:
            # The step on the CPU, as torch keeps it, wherever the weight is: reading it there waits for nothing.
            state["step"] = torch.tensor(0.0, dtype=torch.float32, device="cpu")
            state["exp_avg"] = torch.zeros_like(weight, memory_format=torch.preserve_format, requires_grad=False)
            state[key] = _zero_second_moments(weight, manifold, by_entries=by_entries)
        if group["amsgrad"] and most not in state:
            state[most] = torch.zeros_like(state[key])
        if group["capturable"]:  # there a graph can count, and read the count
            state["step"] = state["step"].to(weight.device)
        state["step"] += 1
        second, largest = state[key], state[most] if group["amsgrad"] else None
        step = _count_of(group, state["step"])
        return StepInput(weight, gradient, manifold, state["exp_avg"], second, largest, step=step)

    def _advance(self, group: Group, inputs: Sequence[StepInput]) -> None:
        steps = [self.state[member.weight]["step"] for member in inputs]
        torch._foreach_add_(steps, 1)
        for member, step in zip(inputs, steps, strict=True):
            member.step = _count_of(group, step)


def _count_of(group: Group, step: Tensor) -> float | Tensor:
    """Return the number of a step; where a CUDA graph may hold it the tensor itself, which nothing waits for."""
    return step if group["capturable"] else float(step)


class AngularAdam(RiemannianAdam):
    r"""The elementwise direction of Adam, in steps of fixed angle: each sphere turns by the learning rate in radians.

    With ``u = w/r``, the Riemannian gradient ξ at u, and elementwise squares, quotients and roots,

    .. math:: m ← β_1 m + (1-β_1) ξ, \quad v ← β_2 v + (1-β_2) ξ^2, \quad
              d = \frac{m}{\sqrt{v/(1-β_2^t)} + ε}, \\
              e = \frac{d - ⟨u, d⟩ u}{‖d - ⟨u, d⟩ u‖}, \quad u ← \cos η\, u - \sin η\, e,
              \quad m ← m - ⟨u, m⟩ u .

    As in the rotational form of AdamW and in methods that train matrices of fixed norm, the angle is prescribed and
    only the direction is learned; the radius and the size of the loss have no effect. Unlike `RiemannianAdam` it keeps
    one second moment per entry, ``"entry_sq"``, as large as the weight and in float32 or better, and depends on the
    coordinates, as Adam does. A sphere whose direction is zero or only rounding error does not move. At a constant rate
    the steps never become small, so use a schedule. Plain parameters take the steps of `torch.optim.Adam`.

    Args:
        params: preferably the groups of `manifold_nets.param_groups`.
        lr: η, the angle in radians.
        options: the other options of `RiemannianAdam`, except AMSGrad. The kernels step the spheres that they support,
            by default and with ``fused=True``; other steps are taken chunk by chunk.

    Raises:
        ParameterGroupError: a weight shares its sphere with other weights.

    References:
        The rotational form of AdamW: Kosson, Messmer, Jaggi, *Rotational equilibrium*, ICML 2024, arXiv:2305.17212;
        Adam's direction at fixed norm: arXiv:2606.16899.

    Example:
        >>> import geoopt, manifold_nets as mn
        >>> sphere = mn.SphereProduct((1, 2))
        >>> weight = geoopt.ManifoldParameter(torch.tensor([[1.0, 0.0]]), manifold=sphere)
        >>> optimizer = mn.optim.AngularAdam([weight], lr=torch.pi / 2)
        >>> (5 * weight[0, 1]).backward()
        >>> optimizer.step()
        >>> weight.data.round(decimals=4) + 0.0
        tensor([[ 0., -1.]])
    """

    _kind = "angular-adam"
    _per_entry = True

    def __init__(self, params: Any, lr: float = 1e-2, **options: Any) -> None:
        for name in ("amsgrad", "per"):
            if options.get(name):
                expected = "no such option, as steps of a given angle have no such variant"
                raise OptionError(name, options[name], expected)
        super().__init__(params, lr=lr, **options)


def _zero_second_moments(weight: Tensor, manifold: SphereProduct, *, by_entries: bool) -> Tensor:
    dtype = accumulation_dtype(weight.dtype)
    if by_entries:
        return torch.zeros_like(weight, dtype=dtype, requires_grad=False)
    return zero_scalars(weight, manifold, dtype)
