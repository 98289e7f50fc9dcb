"""Values of the plain network in a converted model: loaded, or moved off their spheres, they are converted once more.

A `state_dict` of the plain network has the keys and shapes of the converted model's. Loaded as it is, it computes the
plain network's function until the next optimizer step puts the weights on their spheres, and biases and running
statistics stay behind. So a hook of `load_state_dict` makes of such a state what `convert` makes of that network.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from manifold_nets.constraints import (
    NEAR,
    ConstrainedWeight,
    are_trusted,
    change_manifolds,
    check_values_last,
    constrained_weights,
    has_norms,
    joint_spheres,
    remove_load_hook,
    require_loadable,
)
from manifold_nets.conversion.biases import removed_biases
from manifold_nets.conversion.moves import ConvertedWeight, Moves, known_weights, moves_of, rescaled_along
from manifold_nets.conversion.spheres import why_norms_stay
from manifold_nets.errors import PlainStateError
from manifold_nets.errors.base import listed
from manifold_nets.gathered import whole, write_whole_
from manifold_nets.groups import refuse_degenerate
from manifold_nets.joint_sphere import JointSphere, JointSphereMember
from manifold_nets.manifold import SphereProduct

__all__ = ["Converted", "convert_values", "convert_when_loaded", "leave_as_loaded"]


@dataclass
class Converted:
    """What becomes of some values.

    Args:
        values: the tensors that change, float64, by name.
        manifolds: the manifolds that change, as the norms are their radii, by the `id` of the present ones.
        deviations: largest relative deviation of each constrained weight's groups from its radii, as it was given.
    """

    values: dict[str, Tensor] = field(default_factory=dict)
    manifolds: dict[int, SphereProduct] = field(default_factory=dict)
    deviations: dict[str, float] = field(default_factory=dict)


class _WhenLoaded:
    """The hook before `load_state_dict` of a converted model; knows its model, also after a deep copy or a pickle."""

    def __init__(self, model: nn.Module) -> None:
        self.model = weakref.ref(model)

    def __call__(self, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
        # A shallow copy may outlive the model; then each layer refuses what is off its spheres.
        model = self.model()
        record = None if model is None or are_trusted() else moves_of(model)
        if model is not None and record is not None:
            _convert_state(model, record, state_dict, prefix)

    def __getstate__(self) -> dict[str, Any]:
        return {"model": self.model()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        model = state["model"]
        self.model = weakref.ref(model) if model is not None else lambda: None  # type: ignore[assignment]


def convert_when_loaded(model: nn.Module) -> None:
    """Have `load_state_dict` convert the state of a plain network, from now on and in copies of the model."""
    leave_as_loaded(model)
    model._register_load_state_dict_pre_hook(_WhenLoaded(model))  # type: ignore[no-untyped-call]
    check_values_last(model)


def leave_as_loaded(model: nn.Module) -> None:
    """Take off what `convert_when_loaded` put on."""
    remove_load_hook(model, _WhenLoaded)


def _convert_state(model: nn.Module, record: Moves, state_dict: dict[str, Any], prefix: str) -> None:
    """Replace the values of a plain network by those of its converted form."""
    first = _first_names(model)
    given = {
        first.get(name[len(prefix) :], name[len(prefix) :]): value
        for name, value in state_dict.items()
        if name.startswith(prefix) and isinstance(value, Tensor)
    }
    without = _without_removed_biases(model, record, given, prefix)
    found = convert_values(model, record, {**given, **without}, prefix)
    for name in removed_biases(model).keys() & record.biases.keys():
        state_dict.pop(prefix + name, None)
    for name, value in (without | found.values).items():
        for alias in (alias for alias, other in first.items() if other == name and prefix + alias in state_dict):
            new = torch.empty_like(given[name])
            write_whole_(new, value.to(new.device))
            state_dict[prefix + alias] = new
    if found.manifolds:
        # A layer that refuses its values afterwards would leave weights on the new manifolds unloaded.
        require_loadable(model, state_dict, prefix, found.manifolds)
        change_manifolds(model, found.manifolds)


def _first_names(model: nn.Module) -> dict[str, str]:
    """The first name of every parameter and buffer, by all its names."""
    first: dict[int, str] = {}
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name: first.setdefault(id(tensor), name) for name, tensor in tensors}


def _without_removed_biases(
    model: nn.Module, record: Moves, given: Mapping[str, Tensor], prefix: str
) -> dict[str, Tensor]:
    """The running means of a state without the biases that conversion removed, float64."""
    changed: dict[str, Tensor] = {}
    for name in removed_biases(model).keys() & record.biases.keys() & given.keys():
        bias, means = whole(given[name]).double(), record.biases[name]
        if not bool(bias.any()):
            continue  # as revert gives it back
        if means is None:
            raise PlainStateError(
                prefix + name,
                "the conversion removed this bias, and what it adds to running means has to be measured",
                "Load the state into the plain network, and convert that with manifold_nets.convert.",
            )
        missing = [prefix + mean for mean in means if mean not in given]
        if missing:
            raise _partial(prefix + name, "the conversion removed this bias", missing)
        for mean in means:
            changed[mean] = changed.get(mean, whole(given[mean]).double()) - bias
    return changed


def _partial(name: str, found: str, missing: list[str]) -> PlainStateError:
    return PlainStateError(
        name,
        f"{found}, and the state lacks {listed(missing)}, which change with it",
        "Load all of them together, or load the state into the plain network, and convert that with "
        "manifold_nets.convert.",
    )


def convert_values(model: nn.Module, record: Moves, values: Mapping[str, Tensor], prefix: str = "") -> Converted:
    """Convert values of the plain network as its conversion did; those on their spheres to rounding stay as they are.

    Args:
        model: the converted model.
        record: what its conversion did.
        values: parameters and buffers by their first names, some or all.
        prefix: what to write in front of names in messages.

    Raises:
        DegenerateGroupError: a group is zero or not finite.
        PlainStateError: a weight is off its spheres, and what changes with it is not among the values.
    """
    found = Converted()

    def current(name: str) -> Tensor:
        value = found.values.get(name)
        return whole(values[name]).double() if value is None else value

    converted = known_weights(model, record)
    for weight in constrained_weights(model):
        known = converted.get(weight.name)
        if known is None or isinstance(weight.manifold, JointSphereMember):
            continue
        if has_norms(values.get(weight.name), weight.manifold):
            _convert_weight(weight, known, record.tolerance, values, current, found, prefix)
    _convert_joint(model, record, values, found)
    return found


def _convert_weight(
    weight: ConstrainedWeight,
    known: ConvertedWeight,
    tolerance: float,
    values: Mapping[str, Tensor],
    current: Callable[[str], Tensor],
    found: Converted,
    prefix: str,
) -> None:
    given, manifold = values[weight.name], weight.manifold
    dtype, partition = given.dtype, manifold.partition
    deviation = found.deviations[weight.name] = float(manifold.deviations(whole(given)).max())
    if deviation <= rounding_of(given, weight.parameter):
        return
    value = whole(given).double()
    refuse_degenerate(partition.norms(value), prefix + weight.name)
    norms = partition.norms(value).flatten()
    if known.radius is not None:
        missing = [prefix + name for name in known.along if name not in values]
        if missing and deviation > NEAR:
            raise _partial(prefix + weight.name, f"its norms are off its spheres by {deviation:.2g}", missing)
        if missing:
            return
        factors = known.radius / norms
        state = {name: current(name) for name in (*known.along, *_affine(known, values))}
        absorbers = [_with_variances(absorber, state) for absorber in known.absorbers]
        if why_norms_stay(absorbers, dtype, state, factors, tolerance)[0] is None:
            found.values[weight.name] = partition.multiply(value, partition.spread(factors))
            found.values.update(rescaled_along(known, factors, current))
            norms = torch.full_like(norms, known.radius)
    if not torch.equal(norms.cpu(), manifold.radii):
        found.manifolds[id(manifold)] = SphereProduct(partition, radius=norms)


def _affine(known: ConvertedWeight, values: Mapping[str, Tensor]) -> list[str]:
    """Names of the given scales and shifts of the normalizations behind a weight."""
    names = [name for absorber in known.absorbers for name in (absorber.weight, absorber.bias)]
    return [name for name in names if name is not None and name in values]


def _with_variances(absorber: Any, state: Mapping[str, Tensor]) -> Any:
    """A normalization whose batches have the running variance, and the affine parameters that are known."""
    variance = state.get(absorber.running_var)
    return replace(
        absorber,
        variances=() if variance is None else tuple(variance.tolist()),
        weight=absorber.weight if absorber.weight in state else None,
        bias=absorber.bias if absorber.bias in state else None,
    )


def rounding_of(*tensors: Tensor) -> float:
    """Relative deviation of a norm that rounding explains, for values of the coarsest of some dtypes.

    A point in half precision is one that was rounded once; the optimizers keep others within 4 machine epsilons.
    """
    eps = max(torch.finfo(tensor.dtype).eps for tensor in tensors)
    return eps if eps > torch.finfo(torch.float32).eps else 8 * eps


def _convert_joint(model: nn.Module, record: Moves, values: Mapping[str, Tensor], found: Converted) -> None:
    """Take the joint norms of the values for radii, with the present values of weights that are not given."""
    for joint, members in joint_spheres(model):
        names = [member.name for member in members]
        if not any(has_norms(values.get(member.name), member.manifold) for member in members):
            continue
        points = [whole(values.get(member.name, member.parameter)) for member in members]
        deviation = float(joint.deviations(points).max())
        found.deviations.update(dict.fromkeys(names, deviation))
        if deviation <= rounding_of(*points) or not record.weights.keys() >= set(names):
            continue
        joint.refuse_degenerate(points)
        parts = dict(zip(joint.names, joint.partitions, strict=True))
        new = JointSphere(parts, joint.norms(points))
        pairs = zip(members, new.manifolds, strict=True)
        found.manifolds.update((id(member.manifold), manifold) for member, manifold in pairs)
