"""Any torch optimizer on products of spheres: its own step, projected to the tangent space, then to the spheres."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from typing import Any, Literal, TypeVar

import torch
from geoopt.optim.mixin import OptimMixin
from torch import Tensor, nn

from manifold_nets.constraints import constrained_weights
from manifold_nets.errors import ArgumentTypeError, OptionError, ParameterGroupError
from manifold_nets.gathered import local_part, whole, write_whole_
from manifold_nets.joint_sphere import JointSphereMember
from manifold_nets.manifold import SphereProduct
from manifold_nets.optim.backends.dispatch import assign, run
from manifold_nets.optim.backends.inputs import StepPlan, check
from manifold_nets.optim.backends.products import TangentProducts
from manifold_nets.optim.backends.rule import Coefficients, Rule, StepInput
from manifold_nets.optim.base import SphereOptimizer
from manifold_nets.optim.guard import allow_euclidean
from manifold_nets.optim.param_groups import Group, name_of, resolve_manifolds
from manifold_nets.optim.rows import by_rows, whole_rows
from manifold_nets.padded import PaddedSphereProduct

__all__ = ["on_spheres"]

T = TypeVar("T", bound=torch.optim.Optimizer)

# What optimizers call the running means of their directions; second moments are no vectors, and stay as they are.
_BUFFERS = re.compile(
    r"((neg_|pos_)?momentum|momentum_buffer|moment|mu|m|(mov_)?avg_grad"
    r"|(neg_|grok_)?exp_avg|exp_avg_(slow|fast|diff|grad|[0-9]+))"
)


def on_spheres(
    optimizer: T, model: nn.Module, *, radial: Literal["project", "brake"] = "project", buffers: Collection[str] = ()
) -> T:
    r"""Let any torch optimizer train weights on spheres.

    The optimizer takes its own step from w to w + δ, whatever its rule and its buffers are. Then, for each group of
    radius r, the step is projected to the tangent space and the weight to its sphere, and so is every buffer b that is
    a running mean of directions, in one pass over memory:

    .. math:: δ_t = δ - ⟨w, δ⟩ w/r^2, \quad w' = r (w + δ_t)/‖w + δ_t‖, \quad b' = b - ⟨w', b⟩ w'/r^2 .

    So a weight turns by arctan(‖δ_t‖/r), and the part of a step along the radius, such as weight decay, has no effect.
    ``radial="brake"`` keeps the inward part and halves the outward part instead: with α = ⟨w, δ⟩/r²,
    w' = r z/‖z‖ for z = w + δ − max(α, 0) w/2, so that steps that increase the norm turn the weight a little less.

    The optimizer is changed in place by two step hooks and returned; schedulers, closures, `GradScaler`, parameter
    groups and `state_dict` work as before. A copy or a pickle loses the hooks, as always in torch, and raises an error
    before its first step: call `on_spheres` again. Loading a state continues the run. Tune the optimizer's own learning
    rate: with radius 1 it moves the weight as far as without spheres. Under `DistributedDataParallel` and
    ``fully_shard`` every process does the same, with one all-reduce of a few scalars per sphere if spheres cross
    processes. One copy of the weights on spheres is kept in memory.

    Args:
        optimizer: any `torch.optim.Optimizer` that holds weights on spheres and perhaps others, such as
            `torch.optim.Muon`, Lion, or those of timm. Preferably with the groups of `manifold_nets.param_groups`,
            which give no decay to weights on spheres; their lists ``"manifolds"`` are removed, so that its state is
            plain.
        model: the model of these weights. Norms are fixed per group as the weights were put on spheres; for one norm
            per matrix use ``manifold_nets.constrain(model, names, per="tensor", radius="keep")``.
        radial: ``"project"`` or ``"brake"``.
        buffers: names of further tensors in its state that are means of directions, in addition to ``momentum_buffer``,
            ``exp_avg`` and similar ones.

    Returns:
        The optimizer.

    Raises:
        ArgumentTypeError: it is not a `torch.optim.Optimizer`, or it steps on spheres itself.
        OptionError: ``radial`` has another value, no weight of the optimizer lies on spheres, or it is
            `torch.optim.LBFGS`.
        ManifoldNetsError: a weight cannot be trained on its spheres; see
            `manifold_nets.optim.param_groups.resolve_manifolds`.

    References:
        The tangent step: Heo et al., *AdamP*, ICLR 2021, arXiv:2006.08217; matrices of fixed norm: arXiv:2606.16899.

    Example:
        >>> import manifold_nets as mn
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
        >>> _ = mn.constrain(net, "2.weight", per="column")
        >>> optimizer = mn.optim.on_spheres(torch.optim.AdamW(net.parameters(), lr=1e-2), net)
        >>> net(torch.randn(5, 4)).square().mean().backward()
        >>> optimizer.step()
        >>> torch.allclose(net[2].weight.norm(dim=0), torch.ones(8))
        True
    """
    given: object = optimizer
    if not isinstance(given, torch.optim.Optimizer) or isinstance(given, SphereOptimizer | OptimMixin):
        expected = "a torch.optim.Optimizer without support for spheres"
        remedy = "Use the optimizers of manifold_nets.optim directly; others cannot be wrapped."
        raise ArgumentTypeError("optimizer", optimizer, expected, remedy)
    if isinstance(given, torch.optim.LBFGS):
        expected = "an optimizer without line searches, which leave the spheres"
        raise OptionError("optimizer", "LBFGS", expected)
    if radial not in ("project", "brake"):
        raise OptionError("radial", radial, "'project' or 'brake'")
    hooks = _Hooks(model, _PutBack("put-back", 0.0, 0.0, nesterov=radial == "brake"), frozenset(buffers))
    # Called again, it takes the place of what it did before.
    for registered in (optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks):
        for number, hook in list(registered.items()):
            former = getattr(hook, "__self__", None)
            if isinstance(former, _Hooks):
                hooks.manifolds.update(former.manifolds)
                del registered[number]
    hooks.find_weights(optimizer)
    if not hooks.manifolds:
        expected = "an optimizer with weights of the model on spheres, built after they were put there"
        raise OptionError("optimizer", type(optimizer).__name__, expected)
    allow_euclidean(optimizer)
    optimizer.register_step_pre_hook(hooks.before_step)
    optimizer.register_step_post_hook(hooks.after_step)
    return optimizer


class _PutBack(Rule):
    """What becomes of a weight that an optimizer has moved: the weight is w + δ, and its "gradient" is w.

    ``nesterov`` says whether the outward part of δ is halved, instead of all of the radial part being taken off.
    """

    @property
    def is_native(self) -> bool:
        """The kernel in C takes whole steps by this rule."""
        return True

    @property
    def needs_lengths(self) -> bool:
        """Nothing is to be taken off the "gradient", which is nearly the weight."""
        return False

    def coefficients(
        self,
        found: TangentProducts,
        second: tuple[Tensor, Tensor | None] | None,
        *,
        dampening: float,
        step: float,
        elsewhere: Callable[[Tensor], Tensor] | None = None,
        norms: Tensor | None = None,
    ) -> Coefficients:
        """Return what to write, with x = (w + δ)/r and y = w/r."""
        # The "gradient" counts r times: it is r² y, of which y is taken to be of norm 1 exactly.
        square = found.g_total.sqrt()
        xy = found.g_slope * found.ww / square
        outward = xy - 1.0
        taken = outward.clamp_min(0) / 2 if self.nesterov else outward
        norm = found.ww - 2.0 * taken * xy + taken * taken
        # Of a step that cancels the weight itself only rounding remains: the weight stays where it was.
        is_lost = norm <= (4.0 * found.eps) ** 2
        scale = norm.masked_fill(is_lost, 1.0).rsqrt()
        w_w, w_y = scale.masked_fill(is_lost, 0.0), (-scale * taken).masked_fill(is_lost, 1.0)
        b_y = (found.gb + found.b_slope * found.g_slope * found.ww) / square
        overlap = w_w * found.b_slope * found.ww + w_y * b_y
        # Where much is taken off, the difference loses digits, and is measured before it is written.
        far = taken.abs() > 0.5
        return Coefficients(w_w, 0.0, w_y / square, -overlap * w_w, 1.0, -overlap * w_y / square, far)


class _Hooks:
    """What is done before and after the steps of one optimizer.

    Args:
        model: where the manifolds are found, also of parameters that were sharded.
        rule: how weights are put back.
        buffers: further names of means of directions.
    """

    def __init__(self, model: nn.Module, rule: _PutBack, buffers: frozenset[str]) -> None:
        self.model, self.rule, self.buffers = model, rule, buffers
        self.manifolds: dict[Tensor, tuple[SphereProduct, str]] = {}
        self._known: list[int] = []
        self._before: dict[Tensor, Tensor] = {}
        self._moving: list[Tensor] = []
        self._plans: dict[tuple[int, ...], StepPlan] = {}
        # Names of the buffers among those of a state.
        self._names: dict[tuple[str, ...], list[str]] = {}

    def find_weights(self, optimizer: torch.optim.Optimizer) -> None:
        """Find the manifolds of all weights of an optimizer, again where it has others than last time."""
        held = [id(p) for group in optimizer.param_groups for p in group["params"]]
        if held == self._known:
            return
        of_model = {id(weight.parameter): weight.manifold for weight in constrained_weights(self.model)}
        found = {}
        for number, group in enumerate(optimizer.param_groups):
            # Of groups that `manifold_nets.param_groups` made; they do not belong in the state of other optimizers.
            given = group.pop("manifolds", None) or [None] * len(group["params"])
            known: Group = {key: group[key] for key in ("params", "param_names") if key in group}
            known["manifolds"] = [
                self.manifolds[p][0] if p in self.manifolds else of_model.get(id(p), own)
                for p, own in zip(group["params"], given, strict=True)
            ]
            for place, manifold in enumerate(resolve_manifolds(known, number)):
                name = name_of(group, number, place)
                if isinstance(manifold, JointSphereMember):
                    raise ParameterGroupError.on_spheres(
                        name, "a joint sphere", "a sphere of its own; use RiemannianAdam or RiemannianSGD"
                    )
                if manifold is not None and manifold.partition.group_size > 1:
                    found[group["params"][place]] = manifold, name
        self.manifolds, self._known = found, held
        self._before, self._plans = {p: x for p, x in self._before.items() if p in found}, {}

    @torch.no_grad()
    def before_step(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Keep the weights that are about to move."""
        self.find_weights(optimizer)
        # A closure may yet compute gradients.
        closure = len(args) > 1 or bool(kwargs)
        self._moving = [p for p in self.manifolds if p.grad is not None or (closure and p.requires_grad)]
        with torch._C.DisableTorchFunctionSubclass():
            for p in self._moving:
                kept = self._before.get(p)
                if kept is None or kept.dtype != p.dtype or kept.device != p.device or kept.stride() != p.stride():
                    self._before[p] = torch.empty_like(p, requires_grad=False)
            if self._moving:
                kept_parts = [local_part(self._before[p]) for p in self._moving]
                torch._foreach_copy_(kept_parts, [local_part(p.detach()) for p in self._moving])

    @torch.no_grad()
    def after_step(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Put weights and buffers back."""
        if not self._moving:
            return
        before = [self._before[p] for p in self._moving]
        buffers = {p: self._buffers_of(p, optimizer.state.get(p, {})) for p in self._moving}
        firsts = {p: {"buffer": own[0]} for p, own in buffers.items() if own}
        key = tuple(map(id, self._moving))
        plan = self._plans.get(key)
        options = [self.manifolds[p][0] for p in self._moving]
        with torch._C.DisableTorchFunctionSubclass():
            lasts = plan is not None and plan.holds(options, self._moving, before, firsts)
        if plan is not None and lasts:
            run(self.rule, plan.batches)
            plan.let_go()
        else:
            self._put_back_anew(key, options, before, firsts)
        for p, own in buffers.items():
            manifold = self.manifolds[p][0]
            for other in own[1:]:
                write_whole_(other, manifold.proju(whole(p), whole(other)))
            if isinstance(manifold, PaddedSphereProduct):
                for x in (p.detach(), *own[:1]):
                    x[manifold.padding] = 0.0

    def _put_back_anew(
        self,
        key: tuple[int, ...],
        options: list[SphereProduct],
        before: list[Tensor],
        firsts: Mapping[Tensor, dict[str, Tensor]],
    ) -> None:
        inputs = []
        for p, old in zip(self._moving, before, strict=True):
            manifold, name = self.manifolds[p]
            with torch._C.DisableTorchFunctionSubclass():
                check(p, old, manifold.partition, {}, lambda name=name: name)  # type: ignore[misc]
            inputs.append(StepInput(p, old, manifold, firsts.get(p, {}).get("buffer")))
        with by_rows(self.rule, inputs) as members:
            batches = assign(self.rule, members, foreach=None, fused=None, compiled=None)
            run(self.rule, batches)
        self._plans.pop(key, None)
        if whole_rows(inputs):
            plan = StepPlan(options, range(len(inputs)), (), inputs, firsts, batches)
            if plan.can_last:
                self._plans = {key: plan}
                plan.let_go()

    def _buffers_of(self, weight: Tensor, state: Mapping[str, Any]) -> list[Tensor]:
        """The tensors of a weight's state that are means of its directions."""
        key = tuple(state)
        names = self._names.get(key)
        if names is None:
            names = self._names[key] = [n for n in key if _BUFFERS.fullmatch(n) or n in self.buffers]
        found = [state[name] for name in names]
        return [x for x in found if isinstance(x, Tensor) and x.shape == weight.shape and x.is_floating_point()]
