"""Continue a plain model's run with the optimizer of the converted model, and back, in mid-training."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from manifold_nets.constraints import NEAR, constrained_weights, converted_norms, is_converted
from manifold_nets.errors import ArgumentTypeError, OptionError
from manifold_nets.gathered import held_as, whole, write_whole_
from manifold_nets.groups import accumulation_dtype, refuse_degenerate
from manifold_nets.joint_sphere import JointSphereMember, by_joint_sphere
from manifold_nets.manifold import SphereProduct
from manifold_nets.optim.adam import RiemannianAdam
from manifold_nets.optim.backends.sharded import zero_scalars
from manifold_nets.optim.base import SphereOptimizer
from manifold_nets.optim.param_groups import Group, name_of
from manifold_nets.optim.plain_run import NORM, SCALED_WITH, TRANSFERS
from manifold_nets.optim.sgd import RiemannianSGD
from manifold_nets.optim.state import without_wrappers

__all__ = ["from_torch", "plain_norms", "to_torch"]

Transfer = Literal["follow", "step", "equilibrium"]
# What a plain state is called in that of a weight on spheres.
_NAMES = {"exp_avg_sq": "entry_sq", "max_exp_avg_sq": "max_entry_sq"}
_PLAIN_NAMES = {new: old for old, new in _NAMES.items()}
# What each optimizer has of its own in its groups.
_OWN = ("params", "param_names", "manifolds", "transfer", "compile", "master_weights", SCALED_WITH)


def from_torch(
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    converted: nn.Module,
    *,
    transfer: Transfer = "follow",
    scheduler: Any = None,
) -> RiemannianSGD | RiemannianAdam:
    r"""Return an optimizer with which a converted model continues the run of a plain optimizer.

    The groups, their order and all their options stay the same, with ``lr`` the plain learning rate, so every scheduler
    of torch continues unchanged. Plain parameters keep their states and take the steps of the torch optimizer, bit for
    bit.

    A weight on spheres represents the plain run in polar coordinates. The function does not depend on the norm n of a
    scale-invariant group ``w = n u``, and ``∂L/∂w = (∂L/∂u)/n`` is orthogonal to w. So the gradient at the point of
    the sphere, divided by n, is the plain gradient; with it the plain optimizer's step (its momentum or moments in the
    state, weight decay included) leads from w to ``w'``. The weight becomes the direction of w' on its sphere, and
    the state stores one number per sphere, ``n' = ‖w'‖``; without momentum

    .. math:: n'^2 = (1 - η λ)^2 n^2 + η^2 ‖∇f(w)‖^2, \quad \tan θ = \frac{η ‖∇f(w)‖}{(1 - η λ) n}.

    - ``"follow"``: n follows the plain run, and the path of functions is that of the plain run, up to rounding. The
      learning rates on the sphere are η/n² for SGD and η/n for Adam, controlled by weight decay as before.
    - ``"step"``: n is fixed. The next step is that of the plain run; after that, rates change only with the schedule.
    - ``"equilibrium"``: n is fixed where decay and growth balance at the present rate: for SGD with momentum μ at
      ``n⁴ = η G²/(2 λ (1 − μ))``, where G² is the mean squared gradient of u over the spheres of a weight, estimated
      from the momentum; for AdamW at ``n² = η d/(2 λ)`` for spheres of d entries. This gives the rates of the long run
      at once.

    The state's ``"norm"`` holds n, in float64; it is saved and loaded with the rest. A script may also load the state
    of the converted run into the plain optimizer, and its weights into the plain model, before it converts: the run
    continues from there, to rounding, as torch casts the norms to the dtype of the weights.

    Args:
        optimizer: the running `torch.optim.SGD`, `Adam` or `AdamW`; not changed.
        model: the model that it trains, before the conversion; not changed.
        converted: the model that `manifold_nets.convert` made of it. Either may be sharded; states are sharded like the
            converted model.
        transfer: ``"follow"``, ``"step"`` or ``"equilibrium"``.
        scheduler: a learning-rate scheduler of the optimizer, or several; they are attached to the new optimizer. A
            newly made scheduler continues with its ``load_state_dict``.

    Returns:
        A `RiemannianSGD` or `RiemannianAdam` of the converted model; Adam keeps its second moment of each entry.

    Raises:
        OptionError: the optimizer is of another class or has other parameters, the converted model is another one or
            has weights that `constrain` put on spheres, ``transfer`` is unknown, or there is no equilibrium, for
            instance without weight decay.
        DegenerateGroupError: a group of a weight is zero or not finite.
        ParameterGroupError: an option such as ``differentiable`` does not work on spheres.

    References:
        Derived above; the rates are those of Hoffer et al., arXiv:1803.01814, the equilibria those of Wan et al.,
        arXiv:2006.08419, and Kosson et al., arXiv:2305.17212.

    Example:
        >>> import manifold_nets as mn
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
        >>> sgd, x = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4), torch.randn(16, 4)
        >>> net(x).square().mean().backward(); sgd.step()
        >>> converted = mn.convert(net, x)
        >>> optimizer = mn.optim.from_torch(sgd, net, converted)
        >>> type(optimizer).__name__, optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["weight_decay"]
        ('RiemannianSGD', 0.1, 0.0005)
        >>> optimizer.state[converted[0].weight]["norm"].shape
        torch.Size([8, 1])
    """
    kind = _kind_of(optimizer)
    if transfer not in TRANSFERS:
        raise OptionError("transfer", transfer, "'follow', 'step' or 'equilibrium'")
    _check_models(model=model, converted=converted)
    _check_conversion(converted)
    manifolds = {id(weight.parameter): weight.manifold for weight in constrained_weights(converted)}
    groups, pairs = _other_groups(optimizer, model, converted, "converted")
    for group in groups:
        group.update(manifolds=[manifolds.get(id(p)) for p in group["params"]], transfer=transfer)
    _scale_biases_along(groups, converted)
    _check_plain_values(optimizer, groups, pairs, converted, manifolds)
    made = kind(groups, lr=optimizer.defaults["lr"])
    made.defaults.update({key: _copied(value) for key, value in optimizer.defaults.items()}, transfer=transfer)
    norms = _plain_norms_of({name: (source, manifolds.get(id(target))) for _, name, source, target in pairs})
    for group, name, source, target in pairs:
        state, manifold = optimizer.state.get(source, {}), manifolds.get(id(target))
        if manifold is None:
            made.state[target].update({key: _copied(value, target) for key, value in state.items()})
            continue
        if NORM in state:  # loaded from a checkpoint of the converted run
            norms[name] = whole(state[NORM]).double()
            state = _off_spheres(state, manifold, norms[name])
        made.state[target].update(_on_spheres(group, target, manifold, state, norms[name]))
        if transfer == "equilibrium":
            _to_equilibrium(group, name, source, manifold, state, made.state[target])
    _reattach(scheduler, optimizer, made)
    return made


def plain_norms(optimizer: torch.optim.Optimizer, converted: nn.Module) -> dict[str, Tensor]:
    r"""Return the norms at which plain weights would take the same steps as an optimizer takes on spheres.

    For an optimizer of `from_torch` these are the norms in its state. For another `RiemannianSGD` with learning rate η
    they are 1, as its steps match η/n²; for `RiemannianAdam` √d for spheres of d entries, to match η√d/n. A weight that
    the optimizer does not hold stays as it is.

    Args:
        optimizer: a `RiemannianSGD` or `RiemannianAdam` of the model.
        converted: its model.

    Returns:
        The norm of each group, float64, by the names of the weights on spheres, for ``manifold_nets.revert(converted,
        norms=…)``.

    Example:
        >>> import manifold_nets as mn
        >>> layer = mn.layers.UnitNormLinear(4, 3)
        >>> optimizer = mn.optim.RiemannianAdam(mn.param_groups(layer), lr=0.1)
        >>> {name: norms.tolist() for name, norms in mn.optim.plain_norms(optimizer, layer).items()}
        {'weight': [2.0, 2.0, 2.0]}
    """
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    return {
        w.name: whole(_norms_in(optimizer, w.parameter, w.manifold)).flatten()
        if id(w.parameter) in held
        else w.manifold.radii.to(w.parameter.device, copy=True)
        for w in constrained_weights(converted)
    }


def to_torch(
    optimizer: RiemannianSGD | RiemannianAdam, converted: nn.Module, plain: nn.Module, *, scheduler: Any = None
) -> torch.optim.SGD | torch.optim.Adam:
    r"""Return a torch optimizer with which a reverted model continues the run on spheres.

    The inverse of `from_torch`: groups, options and states are those of the plain run. After ``transfer="follow"`` they
    are those that the plain run would have, up to rounding. For an optimizer that was not made by `from_torch`, the
    next step of the plain one turns each group by the same angle, except that Adam's second moments per entry start
    from their mean over each sphere.

    Args:
        optimizer: the running `RiemannianSGD` or `RiemannianAdam`; not changed.
        converted: its model; not changed.
        plain: ``manifold_nets.revert(converted, norms=manifold_nets.optim.plain_norms(optimizer, converted))``, whose
            weights have the norms of the plain run, with biases and running statistics rescaled accordingly.
        scheduler: a learning-rate scheduler of the optimizer, or several; they are attached to the new optimizer.

    Returns:
        A `torch.optim.SGD`, `Adam` or `AdamW` of the plain model. Biases that the conversion removed have no effect and
        are in none of its groups.

    Raises:
        OptionError: the optimizer is of another class or has other parameters, the plain model is another one, or its
            weights have other norms.

    Example:
        >>> import manifold_nets as mn
        >>> net = mn.layers.UnitNormLinear(4, 3)
        >>> optimizer = mn.optim.RiemannianSGD(mn.param_groups(net), lr=0.1, momentum=0.9)
        >>> mn.optim.to_torch(optimizer, net, mn.revert(net)).param_groups[0]["lr"]
        0.1
    """
    if type(optimizer) not in (RiemannianSGD, RiemannianAdam):
        raise OptionError("optimizer", type(optimizer).__name__, "a RiemannianSGD or RiemannianAdam")
    _check_models(converted=converted, plain=plain)
    constrained = {id(weight.parameter): weight for weight in constrained_weights(converted)}
    groups, pairs = _other_groups(optimizer, converted, plain, "plain")
    decoupled = [group.get("decoupled_weight_decay") for group in groups]
    adam = torch.optim.AdamW if all(decoupled) else torch.optim.Adam
    made = (torch.optim.SGD if isinstance(optimizer, RiemannianSGD) else adam)(groups, lr=optimizer.defaults["lr"])
    for _, name, source, target in pairs:
        state, weight = optimizer.state.get(source, {}), constrained.get(id(source))
        if weight is not None:
            norms = whole(_norms_in(optimizer, source, weight.manifold))
            is_joint = isinstance(weight.manifold, JointSphereMember)
            found = norms if is_joint else weight.manifold.partition.norms(whole(target))
            off = float((found / norms - 1).abs().max())
            if not off <= NEAR:
                expected = (
                    "manifold_nets.revert(converted, norms=manifold_nets.optim.plain_norms(optimizer, converted))"
                )
                raise OptionError("plain", f"{name} with norms that are off by {off:.2g}", expected)
            state = _off_spheres(state, weight.manifold, norms)
        made.state[target].update({key: _copied(value, target) for key, value in state.items()})
    _reattach(scheduler, optimizer, made)
    return made


def _kind_of(optimizer: torch.optim.Optimizer) -> type[RiemannianSGD] | type[RiemannianAdam]:
    expected = "a torch.optim.SGD, Adam or AdamW"
    if isinstance(optimizer, SphereOptimizer):
        expected += "; load the state of an optimizer on spheres with load_state_dict"
        raise OptionError("optimizer", type(optimizer).__name__, expected)
    for plain, kind in ((torch.optim.SGD, RiemannianSGD), (torch.optim.Adam, RiemannianAdam)):
        if isinstance(optimizer, plain):
            # torch wraps the step of each class, to profile it.
            if inspect.unwrap(type(optimizer).step) is inspect.unwrap(plain.step):
                return kind
            expected += " with its own step; for any other step use manifold_nets.optim.on_spheres"
    raise OptionError("optimizer", type(optimizer).__name__, expected)


def _check_models(**models: object) -> None:
    for role, model in models.items():
        if not isinstance(model, nn.Module):
            remedy = "Pass the model before the conversion, and the one that convert or revert returned."
            raise ArgumentTypeError(role, model, "a torch.nn.Module", remedy)


def _check_conversion(converted: nn.Module) -> None:
    """Refuse a model that no conversion made: the norms of its weights may mean something to its function."""
    weights = list(constrained_weights(converted))
    if not weights and _conversion_of(converted) is None:
        raise OptionError("converted", "a model without weights on spheres", "the result of manifold_nets.convert")
    other = next((weight.name for weight in weights if not is_converted(weight)), None)
    if other is not None:
        expected = (
            "weights that manifold_nets.convert put there. The norm of this one matters, so there is no plain run to "
            "follow: build the optimizer from the parameters of this model, and pass it to "
            "manifold_nets.optim.on_spheres; or use a Riemannian optimizer with manifold_nets.param_groups"
        )
        raise OptionError("converted", f"{other} on spheres without a conversion", expected)


def _check_plain_values(
    optimizer: torch.optim.Optimizer,
    groups: list[Group],
    pairs: list[tuple[Group, str, Tensor, Tensor]],
    converted: nn.Module,
    manifolds: Mapping[int, SphereProduct],
) -> None:
    """Refuse a model whose values were moved apart: states, and norms to follow, are those of the plain run.

    Without a state the values may yet be those of a checkpoint, in a conversion of this very model.
    """
    scaled = {group["param_names"][int(place)] for group in groups for place in group.get(SCALED_WITH, ())}
    of_plan = (module.__dict__.get("_manifold_nets_conversion") for module in converted.modules())
    is_balanced = any(found.plan.of("balance") for found in of_plan if found is not None)
    must_agree = is_balanced or any(optimizer.state.values())
    known = converted_norms(target for _, _, _, target in pairs)
    for _, name, source, target in pairs:
        old, new, manifold = whole(source.detach()), whole(target.detach()), manifolds.get(id(target))
        if manifold is not None:
            norm = float(manifold.partition.norms(old.double()).median())
            is_moved = (
                not must_agree
                and id(target) in known
                and not abs(norm / known[id(target)] - 1) <= NEAR
                and not float((manifold.projx(old.to(new)) - new).norm() / new.norm()) <= NEAR
            )
        else:
            is_moved = must_agree and name not in scaled and not _same(old.to(new), new)
        if is_moved:
            expected = (
                "the same values as in model, as the remedies 'spheres', 'joint-spheres' and 'dead-biases' keep them; "
                "use 'balance' only before training"
            )
            raise OptionError("converted", f"other values of {name}", expected)


def _same(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, rtol=0, atol=0, equal_nan=True)


def _conversion_of(converted: nn.Module) -> Any:
    """The record of `manifold_nets.conversion`, which lies beside this package."""
    records = (module.__dict__.get("_manifold_nets_moves") for module in converted.modules())
    return next((found for found in records if found is not None), None)


def _other_groups(
    optimizer: torch.optim.Optimizer, model: nn.Module, other: nn.Module, role: str
) -> tuple[list[Group], list[tuple[Group, str, Tensor, Tensor]]]:
    """Return the groups of an optimizer for another model of the same names, and who takes whose place.

    Biases that the other model does not have, as a conversion removes them, are left out.
    """
    # Names of the modules inside DistributedDataParallel and ``torch.compile``, of which either may be in one.
    names = {id(p): without_wrappers(name) for name, p in model.named_parameters()}
    biases = {without_wrappers(name) for name, p in model.named_parameters() if p.ndim < 2}
    targets = {without_wrappers(name): p for name, p in other.named_parameters(remove_duplicate=False)}
    groups: list[Group] = []
    pairs: list[tuple[Group, str, Tensor, Tensor]] = []
    for number, group in enumerate(optimizer.param_groups):
        new = {key: _copied(value) for key, value in group.items() if key not in _OWN}
        new.update(params=[], param_names=[])
        for index, p in enumerate(group["params"]):
            name = names.get(id(p))
            if name is None:
                expected = f"parameters of {'model, as it was before the conversion' if role == 'converted' else 'it'}"
                raise OptionError("optimizer", name_of(group, number, index), expected)
            if name not in targets and name in biases:
                continue
            if name not in targets or targets[name].shape != p.shape:
                raise OptionError(role, name, "the same model, converted or reverted")
            new["params"].append(targets[name])
            new["param_names"].append(name)
            pairs.append((new, name, p, targets[name]))
        groups.append(new)
    return groups, pairs


def _copied(value: Any, target: Tensor | None = None) -> Any:
    """A copy of an option or of a piece of a state; sharded as its parameter is, if it has that one's shape."""
    if not isinstance(value, Tensor):
        return copy.copy(value)
    has_entries = target is not None and value.shape == target.shape
    return (held_as(value, target) if has_entries else value.detach()).clone()  # type: ignore[arg-type]


def _plain_norms_of(weights: dict[str, tuple[Tensor, SphereProduct | None]]) -> dict[str, Tensor]:
    """Norms of the groups of plain weights that go on spheres, in ``spread_shape``; of joint spheres the joint ones.

    Raises:
        DegenerateGroupError: a group is zero or not finite.
    """
    found = {}
    for name, (source, manifold) in weights.items():
        if manifold is not None:
            found[name] = manifold.partition.norms(whole(source.detach()).double())
    joints = by_joint_sphere((manifold, name) for name, (_, manifold) in weights.items())
    for members in joints.values():
        squares = torch.stack([found[name].flatten().square() for name in members.values()]).sum(0)
        found.update((name, squares.sqrt().reshape(found[name].shape)) for name in members.values())
    for name, norms in found.items():
        refuse_degenerate(norms, name)
    return found


def _on_spheres(
    group: Group, target: Tensor, manifold: SphereProduct, state: dict[str, Any], norms: Tensor
) -> dict[str, Any]:
    """The state of a weight on its spheres: the norms in the plain run, and the plain moments."""
    wide, radius = accumulation_dtype(target.dtype), manifold.radius_for(norms)
    made: dict[str, Any] = {NORM: zero_scalars(target, manifold, torch.float64)}
    write_whole_(made[NORM], norms.to(target.device))
    for key, value in state.items():
        if value is None or key == "step":
            made[key] = _copied(value) if value is None else torch.as_tensor(value).detach().float().cpu().clone()
        elif key in _NAMES:
            made[_NAMES[key]] = held_as(value, target).to(wide, copy=True)
        else:  # a momentum, in the scale of the weight on its spheres
            is_unit = manifold.uniform_radius == 1
            scaled = value if is_unit else manifold.partition.multiply(whole(value).double(), radius)
            made[key] = held_as(scaled, target).to(target.dtype, copy=True)
    if "betas" in group and "step" not in made:  # torch asks for all of a state or nothing of it
        made["step"], made["exp_avg"] = torch.zeros((), device="cpu"), torch.zeros_like(target, requires_grad=False)
        second = ("entry_sq", *(["max_entry_sq"] if group["amsgrad"] else []))
        made.update((key, torch.zeros_like(target, dtype=wide, requires_grad=False)) for key in second)
    return made


def _to_equilibrium(
    group: Group, name: str, source: Tensor, manifold: SphereProduct, state: dict[str, Any], made: dict[str, Any]
) -> None:
    """Replace the norms by those at which growth and decay balance; gradients, and so moments, are as 1/n."""
    partition, norms = manifold.partition, whole(made[NORM])
    lr, decay = float(group["lr"]), float(group["weight_decay"])
    if isinstance(manifold, JointSphereMember):
        raise OptionError("transfer", f"'equilibrium' for {name} on a joint sphere", "'follow' or 'step'")
    if not lr * decay > 0 or ("betas" in group and not group.get("decoupled_weight_decay")):
        found = f"'equilibrium' with weight_decay={decay:g} and lr={lr:g} for {name}"
        expected = "weight decay of SGD or AdamW and a learning rate above 0; or take 'follow' or 'step'"
        raise OptionError("transfer", found, expected)
    if "betas" in group:
        new = torch.full_like(norms, (lr * partition.group_size / (2 * decay)) ** 0.5)
    else:
        mu, buffer = float(group["momentum"]), state.get("momentum_buffer")
        gradient = source.grad if buffer is None else buffer
        if gradient is None:
            raise OptionError("transfer", f"'equilibrium', but {name} has neither momentum nor gradient", "one of them")
        # Of independent gradients G/n, (1 − τ)² Σ μ^{2k} = (1 − τ)²/(1 − μ²) are in the squared length of the momentum.
        tangent = manifold.proju(manifold.projx(whole(source)), whole(gradient))
        share = 1.0 if buffer is None else (1 - mu**2) / (1 - float(group["dampening"])) ** 2
        squared = share * (norms.square() * partition.inner(tangent, tangent).double()).mean()
        new = torch.full_like(norms, float(lr * squared / (2 * decay * (1 - mu))) ** 0.25)
        refuse_degenerate(new, name)
    ratio = norms / new
    write_whole_(made[NORM], new)
    for key, power in (("momentum_buffer", 1), ("exp_avg", 1), ("entry_sq", 2), ("max_entry_sq", 2)):
        if isinstance(made.get(key), Tensor):
            scaled = partition.multiply(whole(made[key]), ratio.pow(power).to(made[key].dtype))
            made[key] = held_as(scaled, made[key])


def _scale_biases_along(groups: list[Group], converted: nn.Module) -> None:
    """Note which biases the conversion scaled with which weight: in the plain run they are longer with it."""
    record = _conversion_of(converted)
    places = {name: (k, i) for k, group in enumerate(groups) for i, name in enumerate(group["param_names"])}
    present = {without_wrappers(name) for name, _ in converted.named_parameters(remove_duplicate=False)}
    for of_record, move in (record.weights if record is not None else {}).items():
        weight = without_wrappers(of_record)
        # In front of these a bias does nothing; joint spheres have no absorbers of their own.
        is_dead = bool(move.absorbers) and all(absorber.kind in ("batch", "instance") for absorber in move.absorbers)
        for bias in move.biases if weight in places else ():
            name = without_wrappers(bias.name)
            if name not in places and name in present and not is_dead:
                found = f"{weight} without {name}, which is rescaled with it"
                raise OptionError("optimizer", found, f"{name} in a group too, possibly with requires_grad=False")
            if name in places:
                number, place = places[name]
                known = groups[number].setdefault(SCALED_WITH, {})
                known[str(place)] = [*places[weight], list(bias.groups)]


def _norms_in(optimizer: torch.optim.Optimizer, weight: Tensor, manifold: SphereProduct) -> Tensor:
    """Norms at which plain steps are those of the spheres."""
    norms: Tensor | None = optimizer.state.get(weight, {}).get(NORM)
    if norms is not None:
        return norms
    partition = manifold.partition
    value = math.sqrt(partition.group_size) if isinstance(optimizer, RiemannianAdam) else 1.0
    return torch.full(partition.spread_shape, value, dtype=torch.float64, device=weight.device)


def _off_spheres(state: dict[str, Any], manifold: SphereProduct, norms: Tensor) -> dict[str, Any]:
    """The state of a weight on spheres as that of the plain weight; the way back of `carry_momentum`."""
    partition, found, follows = manifold.partition, dict[str, Any](), NORM in state
    scale = manifold.radius_for(norms) * (torch.ones_like(norms) if follows else norms)
    for key, value in state.items():
        if key in ("momentum_buffer", "exp_avg") and value is not None:
            found[key] = partition.divide(whole(value), scale.to(value.dtype))
        elif key in _NAMES and not follows:
            mean = whole(value) / (norms.square() * partition.group_size)
            found[key] = partition.multiply(value.new_ones(partition.shape), mean.to(value.dtype))
        elif key not in (NORM, "master_weight"):
            found[_PLAIN_NAMES.get(key, key)] = value
    return found


# ---- schedulers ------------------------------------------------------------------------------------------------------


def _reattach(schedulers: Any, old: torch.optim.Optimizer, new: torch.optim.Optimizer) -> None:
    """Let schedulers, and those that they are made of, set the rates of another optimizer.

    Raises:
        OptionError: one of them is of another optimizer.
    """
    for scheduler in schedulers if isinstance(schedulers, (list, tuple)) else [schedulers]:
        parts = [] if scheduler is None else [part for part in _parts(scheduler) if part.optimizer is old]
        if scheduler is not None and not parts:
            raise OptionError("scheduler", type(scheduler).__name__, "a scheduler of the optimizer")
        for part in parts:
            part.optimizer = new
            if getattr(part, "_step_count", 0) == 1:
                # In its first step it would warn that no optimizer's step of this object came before.
                part._step_count = 2


def _parts(scheduler: Any) -> Iterator[Any]:
    """A scheduler and those that it chains."""
    if hasattr(scheduler, "optimizer"):
        yield scheduler
    for part in getattr(scheduler, "_schedulers", ()):
        yield from _parts(part)
