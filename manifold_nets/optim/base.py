"""The base of the optimizers on products of spheres: steps over a mix of parameters, and optimizer states."""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import _use_grad_for_differentiable

from manifold_nets.constraints import NEAR, converted_norms, holds_manifolds
from manifold_nets.errors import LearningRateWarning, OptimizerStateError, OptionError
from manifold_nets.gathered import is_sharded, whole, write_whole_
from manifold_nets.groups import accumulation_dtype
from manifold_nets.joint_sphere import JointSphereMember, by_joint_sphere
from manifold_nets.manifold import SphereProduct
from manifold_nets.optim.backends.dispatch import assign, in_motion, joined, run
from manifold_nets.optim.backends.graph import register, standing_in, step_group_
from manifold_nets.optim.backends.inputs import StepPlan, check
from manifold_nets.optim.backends.rule import Rule, StepInput
from manifold_nets.optim.param_groups import Group, constrained_of, name_at_step, name_of, resolve_manifolds
from manifold_nets.optim.plain_run import biases_of_the_plain_run, norms_of
from manifold_nets.optim.rows import by_rows, whole_rows
from manifold_nets.optim.state import (
    check_loaded,
    describe_manifolds,
    keep_precision,
    master_weight_of,
    ordered_by_name,
    write_master_weights,
)

__all__ = ["SphereOptimizer"]

# The options of a group that determine the inputs and backends of a step.
_DECIDING = ("foreach", "fused", "compile", "master_weights", "amsgrad", "transfer", "capturable")


def _deviation(group: Group, weight: Tensor, manifold: SphereProduct) -> float:
    """Largest relative deviation of a weight's groups from their radii; a joint group counts with its other weights."""
    if not isinstance(manifold, JointSphereMember):
        return float(manifold.deviations(weight).max())
    members = by_joint_sphere((other, point) for _, point, other in constrained_of(group))[manifold.joint]
    return float(manifold.joint.deviations(list(members.values())).max())


_version_of = attrgetter("_version")


class SphereOptimizer(torch.optim.Optimizer):
    """Base of the optimizers that step on products of spheres and, like torch's, on plain parameters.

    Each of ``param_groups`` has a list ``"manifolds"`` parallel to its ``"params"``: a `SphereProduct` for each
    constrained weight, None for a plain parameter. It is taken from the added group (`manifold_nets.param_groups`
    writes it), otherwise from the `geoopt.ManifoldParameter`. In `state_dict` the list is plain data.
    """

    # Names the update rule; see `Rule.kind`.
    _kind: str

    # Keys in the state of a constrained weight after its first step.
    _moments: tuple[str, ...] = ()

    _sphere_defaults: Mapping[str, Any] = {"compile": None, "master_weights": False}

    # Numbers of the groups that were given a learning rate of their own.
    _own_rate: tuple[int, ...] = ()

    # Whether the weights that it steps lie on spheres.
    _on_spheres = True

    def _prepare(self, **options: Any) -> None:
        """Store the options that torch's optimizer does not have, before it makes the groups."""
        if options["compile"] and (options["fused"] or options["foreach"]):
            raise OptionError("compile", "True with fused or foreach", "one of the three")
        self._sphere_defaults = {name: options[name] for name in SphereOptimizer._sphere_defaults}
        self._number = register(self)
        self._forget()
        holds_manifolds(self)

    def _warn_of_plain_rates(self, ratio: Callable[[float, int], float], formula: str) -> None:
        """Warn if converted weights have no learning rate of their own beside plain parameters.

        Args:
            ratio: the matched rate on spheres over the plain rate, as a function of norm and number of entries.
            formula: the same in words.
        """
        plain = {float(g["lr"]) for g in self.param_groups if None in g["manifolds"]}
        shared = [
            (name_at_step(group, number, index), weight, manifold, float(group["lr"]))
            for number, group in enumerate(self.param_groups)
            if number not in self._own_rate and float(group["lr"]) in plain
            for index, weight, manifold in constrained_of(group)
        ]
        norms = converted_norms(weight for _, weight, _, _ in shared)
        found = [
            (name, ratio(norms[id(w)], m.partition.group_size), rate) for name, w, m, rate in shared if id(w) in norms
        ]
        # A factor of two in the rate is not worth a warning.
        if found and not 0.5 <= (middle := statistics.median(r for _, r, _ in found)) <= 2:
            rate = found[0][2]
            warning = LearningRateWarning([name for name, _, _ in found], rate, rate * middle, formula)
            warnings.warn(warning, stacklevel=3)  # who makes the optimizer

    def _before_step(self) -> None:
        """Check before a step what the torch optimizer of the same name checks."""

    def _step_plain(self, group: Group) -> None:
        """Step the plain parameters of a group as the torch optimizer of the same name does."""
        raise NotImplementedError

    def _rule(self, group: Group) -> Rule:
        """Return the update rule of a group."""
        raise NotImplementedError

    def _input(
        self, group: Group, state: dict[str, Any], weight: Tensor, gradient: Tensor, manifold: SphereProduct
    ) -> StepInput:
        """Return a constrained weight with its state, which is created if it does not exist."""
        raise NotImplementedError

    def _advance(self, group: Group, inputs: Sequence[StepInput]) -> None:
        """Make the inputs of the last step usable in the next one: advance the step count."""
        raise NotImplementedError

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Perform a single optimization step.

        Args:
            closure: reevaluates the model and returns the loss.

        Returns:
            What the closure returned, else None.

        Raises:
            StepInputError: a weight that torch does not step has a sparse gradient; nothing was changed.
            StepInputError: a constrained weight, its gradient or its state has another shape than the spheres, or no
                memory; nothing was changed.
        """
        if torch.compiler.is_compiling():
            # torch's wrapper would break the graph twice.
            with torch.set_grad_enabled(self.defaults["differentiable"]):
                return self._step(closure)
        return self._step_with_grad_mode(closure)

    @_use_grad_for_differentiable
    def _step_with_grad_mode(self, closure: Callable[[], Any] | None) -> Any:
        return self._step(closure)

    def _step(self, closure: Callable[[], Any] | None) -> Any:
        self._before_step()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with biases_of_the_plain_run(self.param_groups, self.state):
            self._step_groups()
        return loss

    def _step_groups(self) -> None:
        if torch.compiler.is_compiling():
            for number, group in enumerate(self.param_groups):
                given = {place: p for place, p in enumerate(group["params"]) if p.grad is not None}
                if given:
                    step_group_(list(given.values()), [p.grad for p in given.values()], given, self._number, number)
            return
        # All inputs are checked before anything is changed.
        gradients = [self._checked_gradients(number, group) for number, group in enumerate(self.param_groups)]
        for number, group in enumerate(self.param_groups):
            on_spheres = {place for place, _, _ in self._spheres_of(group)}
            plain = [p for place, p in enumerate(group["params"]) if place not in on_spheres]
            if plain:
                self._step_plain({**group, "params": plain})
            if on_spheres:
                self._step_spheres(number, group["params"], gradients[number])

    @torch.no_grad()
    def _step_places(self, number: int, given: Mapping[int, tuple[Tensor, Tensor]]) -> None:
        """Step some parameters of a group, with values and gradients supplied by a compiled graph."""
        group = self.param_groups[number]
        weights = [given.get(place, (p, None))[0] for place, p in enumerate(group["params"])]
        gradients = [given.get(place, (p, None))[1] for place, p in enumerate(group["params"])]
        self._check_inputs(number, weights, gradients)
        on_spheres = {place for place, _, _ in self._spheres_of(group)}
        plain = {group["params"][place]: pair for place, pair in given.items() if place not in on_spheres}
        with standing_in(plain):
            if plain:
                self._step_plain({**group, "params": list(plain)})
        self._step_spheres(number, weights, gradients)

    @torch.no_grad()
    def _step_spheres(self, number: int, weights: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
        """Step the constrained weights of a group, given the tensors that hold their values."""
        group = self.param_groups[number]
        self._warn_of_moved(number, weights)
        plan = self._plans.get(number)
        if plan is None:
            self._step_anew(number, weights, gradients)
        else:
            self._advance(group, plan.inputs)
            run(self._rule(group), plan.batches)
            plan.let_go()
        self._versions[number] = self._count_versions(group)

    def _step_anew(self, number: int, weights: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
        """Step constrained weights without a cached plan, and cache one if the next step may be alike."""
        group, rule = self.param_groups[number], self._rule(self.param_groups[number])
        inputs, places, idle, master_weights = [], [], [], {}
        moving = in_motion(group["manifolds"], {k for k, gradient in enumerate(gradients) if gradient is not None})
        for place, parameter, manifold in self._spheres_of(group):
            weight, gradient = weights[place], gradients[place]
            if gradient is None:
                if not (isinstance(manifold, JointSphereMember) and manifold.joint in moving):
                    idle.append(place)
                    continue
                gradient = torch.zeros_like(weight)
            is_kept = group.get("momentum") != 0 or rule.is_plain
            state, point = self.state[parameter] if is_kept else {}, weight
            if group.get("master_weights") and accumulation_dtype(weight.dtype) != weight.dtype:
                state = self.state[parameter]
                point = master_weights[weight] = master_weight_of(weight, state)
            places.append(place)
            inputs.append(self._input(group, state, point, gradient, manifold))
            if rule.is_plain:
                inputs[-1].norms = norms_of(state, weight, manifold)
        # A sphere of one entry is two points: there is nowhere to go. Its state is made, as torch's checkpoints ask for
        # one of every parameter.
        able = [m for m in inputs if self._can_move(m.manifold)]
        options = {"foreach": group["foreach"], "fused": group["fused"], "compiled": group.get("compile")}
        with (
            joined(able, by_entries=rule.by_entries) if moving else nullcontext(able) as together,
            by_rows(rule, together) as stepped,
        ):
            batches = assign(rule, stepped, **options) if stepped else []
            run(rule, batches)
        write_master_weights(master_weights)
        if (
            inputs
            and not moving
            and not master_weights
            and whole_rows(inputs)
            and all(weights[place] is group["params"][place] for place in places)
        ):
            plan = StepPlan(self._deciding(group), places, idle, inputs, self.state, batches)
            if plan.can_last:
                self._plans[number] = plan
                plan.let_go()

    def _can_move(self, manifold: SphereProduct) -> bool:
        return not self._on_spheres or manifold.partition.group_size > 1 or isinstance(manifold, JointSphereMember)

    def _deciding(self, group: Group) -> list[Any]:
        groups = group.get("partitions") or group["manifolds"]
        return [*map(group.get, _DECIDING), group.get("momentum") == 0, len(group["params"]), *groups]

    def _spheres_of(self, group: Group) -> Iterator[tuple[int, Tensor, SphereProduct]]:
        """Yield position, weight and groups of all weights that torch's step does not move."""
        return constrained_of(group)

    def _checked_gradients(self, number: int, group: Group) -> list[Tensor | None]:
        # The checks look at what a tensor is, for which its class need not be asked every time.
        with torch._C.DisableTorchFunctionSubclass():
            gradients = [p.grad for p in group["params"]]
        self._check_inputs(number, group["params"], gradients)
        return gradients

    def _check_inputs(self, number: int, weights: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
        """Check what a step of a group reads and writes; keep its plan if it is still valid."""
        group, plan = self.param_groups[number], self._plans.get(number)
        with torch._C.DisableTorchFunctionSubclass():
            if plan is not None and plan.holds(self._deciding(group), weights, gradients, self.state):
                return
            self._plans.pop(number, None)
            for index, parameter, manifold in self._spheres_of(group):
                weight, gradient = weights[index], gradients[index]
                if gradient is not None or isinstance(manifold, JointSphereMember):
                    name = partial(name_at_step, group, number, index)
                    check(weight, gradient, manifold.partition, self.state.get(parameter, {}), name)

    def _count_versions(self, group: Group) -> list[int]:
        """The version counter of each constrained weight; tensors made in inference mode have none."""
        weights = [p for p, manifold in zip(group["params"], group["manifolds"], strict=True) if manifold is not None]
        try:
            with torch._C.DisableTorchFunctionSubclass():
                return list(map(_version_of, weights))
        except RuntimeError:
            return [0 for _ in weights]

    def _warn_of_moved(self, number: int, weights: Sequence[Tensor]) -> None:
        """Warn if other code has moved weights off their spheres since the last step; this step puts them back."""
        group = self.param_groups[number]
        before, now = self._versions.get(number), self._count_versions(group)
        if before is None or before == now:
            return
        for (index, weight, manifold), old, new in zip(constrained_of(group), before, now, strict=True):
            # In a compiled graph, other tensors take the place of the weights.
            if old == new or weights[index] is not weight or weight.grad is None or is_sharded(weight):
                continue
            deviation = _deviation(group, weight, manifold)
            if deviation > NEAR:
                warnings.warn(
                    f"{name_at_step(group, 0, index)}: other code, such as weight averaging, moved it off its spheres "
                    f"by {deviation:.2g} of a radius. This step puts it back but does not rescale biases and running "
                    "statistics. Call manifold_nets.project(model) before the step to rescale them too.",
                    UserWarning,
                    stacklevel=2,
                )

    def _forget(self) -> None:
        """Drop cached information about the tensors of earlier steps."""
        self._plans: dict[int, StepPlan] = {}
        self._versions: dict[int, list[int]] = {}

    def add_param_group(self, param_group: Group) -> None:
        """Add a group of parameters, as `torch.optim.Optimizer.add_param_group` does.

        Args:
            param_group: ``"params"``, options, and optionally ``"manifolds"``, a `SphereProduct` or None for each.

        Raises:
            ManifoldNetsError: a weight or an option does not work on spheres, or a constrained weight would be trained
                as a Euclidean one; see `manifold_nets.optim.param_groups.resolve_manifolds`. The group is not added.
        """
        params = param_group["params"]
        if not isinstance(params, set):  # torch refuses sets
            param_group["params"] = [params] if isinstance(params, Tensor) else list(params)
            manifolds = resolve_manifolds({**self.defaults, **param_group}, len(self.param_groups))
            param_group["manifolds"] = manifolds
            if "lr" in param_group:
                self._own_rate = (*self._own_rate, len(self.param_groups))
            for name, default in self._sphere_defaults.items():
                param_group.setdefault(name, self.defaults.setdefault(name, default))
            if "transfer" in self.defaults and not any(isinstance(p, tuple) for p in param_group["params"]):
                # `from_torch` names the parameters of optimizers that have no names, where torch wants all or none.
                number = len(self.param_groups)
                names = [name_of(param_group, number, index) for index in range(len(param_group["params"]))]
                param_group.setdefault("param_names", names)
        super().add_param_group(param_group)
        self._versions[len(self.param_groups) - 1] = self._count_versions(self.param_groups[-1])

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether `torch.amp.GradScaler` may leave unscaling to the step, as it does for torch's fused optimizers.

        The steps of this package do not unscale, and neither do torch's without ``fused``.
        """
        return self._fused_unscales and all(
            group.get("fused") and next(self._spheres_of(group), None) is None for group in self.param_groups
        )

    @_step_supports_amp_scaling.setter
    def _step_supports_amp_scaling(self, value: bool) -> None:
        self._fused_unscales = value

    _fused_unscales = False

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain data, like torch; manifolds are described by `SphereProduct.to_dict`."""
        handle = self.register_state_dict_post_hook(describe_manifolds, prepend=True)
        try:
            return super().state_dict()
        finally:
            handle.remove()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state; the manifolds stay those of the live parameters, and the saved ones must agree with them.

        If both sides have names for all parameters, as with `manifold_nets.param_groups`, groups and parameters are
        matched by name, whatever their saved order; otherwise by order, as in torch. Second moments of half-precision
        weights stay in float32, while torch rounds a state to its parameter's dtype.

        Raises:
            OptimizerStateError: the state belongs to other parameters or spheres, or to another kind of optimizer;
                nothing was changed.
        """
        final: list[dict[str, Any]] = []

        def check(_: torch.optim.Optimizer, loaded: dict[str, Any]) -> dict[str, Any]:
            ordered = ordered_by_name(self, loaded)
            check_loaded(self, ordered, self._moments)
            for live, saved in zip(self.param_groups, ordered["param_groups"], strict=True):
                if live.get("transfer") and not saved.get("transfer"):
                    found = "the state of an optimizer that does not continue a plain run"
                    remedy = "Load a plain state into the plain optimizer, before from_torch."
                    raise OptimizerStateError("an optimizer of from_torch", found, "one that does", remedy)
            final.append(ordered)
            return ordered

        # Checked after, and completed before, any hook of the user's: they decide what is loaded and see the outcome.
        first = self.register_load_state_dict_pre_hook(check)
        second = self.register_load_state_dict_post_hook(lambda _: keep_precision(self, final[-1]), prepend=True)
        try:
            super().load_state_dict(state_dict)
        finally:
            first.remove()
            second.remove()

    def __setstate__(self, state: dict[str, Any]) -> None:
        # torch replaces the groups when it loads a state; a pickle or a deep copy brings its own manifolds along.
        live = self.__dict__.get("param_groups")
        super().__setstate__(state)
        self._number = register(self)
        self._forget()
        holds_manifolds(self)
        if live is not None:
            for group, old in zip(self.param_groups, live, strict=True):
                group["manifolds"] = old["manifolds"]

    def _change_manifolds(self, new: Mapping[int, SphereProduct]) -> None:
        """Replace manifolds by others with the same groups, by the `id` of the present ones; keep directions."""
        self._plans.clear()
        for group in self.param_groups:
            for index, weight, manifold in constrained_of(group):
                other = new.get(id(manifold))
                if other is None:
                    continue
                group["manifolds"][index] = other
                ratio = other.partition.spread((other.radii / manifold.radii).to(weight.device))
                for key in ("momentum_buffer", "exp_avg"):
                    moment = self.state.get(weight, {}).get(key)
                    if moment is not None:
                        write_whole_(moment, other.partition.multiply(whole(moment), ratio.to(moment.dtype)))
