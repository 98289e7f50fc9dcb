"""Convert values of the plain network inside a converted model, when they are loaded or were moved off their spheres.

A `state_dict` of the plain network has the keys and shapes of the converted model's. Loaded without change, it would
compute the plain network's function until the next optimizer step puts the weights on their spheres without rescaling
biases and running statistics. So a hook of `load_state_dict` converts such a state as `convert` converts that network,
and `project` does the same with the present values of a model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from manifold_nets.constraints import (
    NEAR,
    TRUSTED,
    ConstrainedWeight,
    LoadHook,
    change_manifolds,
    constrained_weights,
    has_norms,
    is_converted,
    joint_spheres,
    remove_load_hook,
    require_loadable,
)
from manifold_nets.conversion.moves import Moves, ScaledWeight, Values, moves_of, moves_within
from manifold_nets.conversion.remedies.dead_biases import removed_biases
from manifold_nets.errors import ProjectionError, listed
from manifold_nets.gathered import whole, write_whole_
from manifold_nets.joint_sphere import JointSphere, JointSphereMember
from manifold_nets.manifold import SphereProduct
from manifold_nets.models import named_tensors
from manifold_nets.symmetry import SymmetryReport, WeightFinding, diagnose

__all__ = ["project"]


# ---- converting values -----------------------------------------------------------------------------------------------


class _Converted(Values):
    """Converted values of the plain network.

    Args:
        given: the values by the first names of their tensors.
        prefix: what to write in front of names in messages.

    Attributes:
        manifolds: the manifolds that change because norms become radii, by the `id` of the present ones.
    """

    def __init__(self, given: Mapping[str, Tensor], prefix: str = "") -> None:
        super().__init__(given)
        self.prefix = prefix
        self.manifolds: dict[int, SphereProduct] = {}

    def missing(self, names: Sequence[str]) -> list[str]:
        return [self.prefix + name for name in names if name not in self.present]

    def partial(self, name: str, found: str, missing: list[str]) -> ProjectionError:
        return ProjectionError(
            self.prefix + name,
            f"{found}, and the state lacks {listed(missing)}, which must change with it. Load all of them together, or "
            "load the state into the plain network and convert that with manifold_nets.convert.",
        )


def _convert_values(model: nn.Module, record: Moves, found: _Converted) -> None:
    """Convert values of the plain network as its conversion did; values on their spheres stay the same.

    Raises:
        DegenerateGroupError: a group is zero or not finite.
        ProjectionError: a weight is off its spheres, and values that must change with it are missing.
    """
    known = record.present(removed_biases(model))
    for weight in constrained_weights(model):
        joint = isinstance(weight.manifold, JointSphereMember)
        if weight.name in known and not joint and has_norms(found.present.get(weight.name), weight.manifold):
            _convert_weight(weight, known[weight.name], record.tolerance, found)
    for sphere, members in joint_spheres(model):
        if not any(has_norms(found.present.get(member.name), member.manifold) for member in members):
            continue
        # The joint norms become the radii, with the present values of weights that are not given.
        points = [whole(found.present.get(member.name, member.parameter)) for member in members]
        deviation = float(sphere.deviations(points).max())
        if deviation > _rounding(*points) and record.weights.keys() >= {member.name for member in members}:
            sphere.refuse_degenerate(points)
            new = JointSphere(dict(zip(sphere.names, sphere.partitions, strict=True)), sphere.norms(points))
            found.manifolds |= {id(old.manifold): m for old, m in zip(members, new.manifolds, strict=True)}


def _convert_weight(weight: ConstrainedWeight, move: ScaledWeight, tolerance: float, found: _Converted) -> None:
    given, manifold = found.present[weight.name], weight.manifold
    deviation = float(manifold.deviations(whole(given)).max())
    if deviation <= _rounding(given, weight.parameter):
        return
    _, factors = replace(move, name=found.prefix + weight.name).factors(manifold.partition, whole(given))
    if move.radius is not None:
        missing = found.missing(move.along)
        if missing and deviation > NEAR:
            raise found.partial(weight.name, f"its norms are off its spheres by {deviation:.2g}", missing)
        if missing:
            return
        affine = [n for a in move.absorbers for n in (a.weight, a.bias) if n is not None and n in found.present]
        state = {name: found[name] for name in (*move.along, *affine)}
        if move.with_running_variances(state).why_norms_stay(given.dtype, state, factors, tolerance)[0] is not None:
            move = replace(move, radius=None)
    new = replace(move, name=weight.name).onto_spheres(manifold.partition, found)
    if not torch.equal(new.radii, manifold.radii):
        found.manifolds[id(manifold)] = new


def _rounding(*tensors: Tensor) -> float:
    """Largest relative deviation of a norm that rounding can cause, for values of the coarsest of some dtypes.

    A point in half precision was rounded once; the optimizers keep others within 4 machine epsilons.
    """
    eps = max(torch.finfo(tensor.dtype).eps for tensor in tensors)
    return eps if eps > torch.finfo(torch.float32).eps else 8 * eps


# ---- loading ---------------------------------------------------------------------------------------------------------


class _WhenLoaded(LoadHook):
    """Converts the values of a plain network before they are loaded into a converted model."""

    def __call__(self, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
        # A shallow copy may outlive the model; then each layer refuses what is off its spheres.
        model = self.module()
        record = None if model is None or TRUSTED.get() else moves_of(model)
        if model is not None and record is not None:
            _convert_state(model, record, state_dict, prefix)


class _TakesRadii(LoadHook):
    """Gives a weight its new radii right before its values are loaded: a hook of another layer may raise earlier."""

    def __init__(self, module: nn.Module, leaf: str, old: SphereProduct, new: SphereProduct) -> None:
        self.leaf, self.old, self.new = leaf, old, new
        super().__init__(module)

    def __call__(self, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
        module, value = self.module(), state_dict.get(prefix + self.leaf)
        # If loading fails it stays, and may later get other values.
        if module is None or not has_norms(value, self.new):
            return
        if float(self.new.deviations(whole(value)).max()) <= _rounding(value):
            change_manifolds(module, {id(self.old): self.new})


def convert_when_loaded(model: nn.Module) -> None:
    """Make `load_state_dict` convert the state of a plain network, from now on and in copies of the model."""
    leave_as_loaded(model)
    _WhenLoaded(model)


def leave_as_loaded(model: nn.Module) -> None:
    """Undo `convert_when_loaded`."""
    for kind in (_WhenLoaded, _TakesRadii):
        remove_load_hook(model, kind)


def _convert_state(model: nn.Module, record: Moves, state_dict: dict[str, Any], prefix: str) -> None:
    """Replace the values of a plain network by their converted form."""
    first: dict[int, str] = {}
    first_name = {name: first.setdefault(id(tensor), name) for name, tensor in named_tensors(model).items()}
    given = {
        first_name.get(name[len(prefix) :], name[len(prefix) :]): value
        for name, value in state_dict.items()
        if name.startswith(prefix) and isinstance(value, Tensor)
    }
    found = _Converted(given, prefix)
    removed = removed_biases(model).keys() & record.biases.keys()
    _remove_biases(record, sorted(removed & given.keys()), found)
    _convert_values(model, record, found)
    constrained = {id(weight.parameter): weight.manifold for weight in constrained_weights(model)}
    for name in removed:
        state_dict.pop(prefix + name, None)
    for alias, name in first_name.items():
        if name in found and prefix + alias in state_dict:
            new = torch.empty_like(given[name])
            write_whole_(new, found[name].to(new.device))
            state_dict[prefix + alias] = new
    if found.manifolds:
        # A layer that refuses its values afterwards would leave weights on the new manifolds unloaded.
        require_loadable(model, state_dict, prefix, found.manifolds)
    at_once = dict(found.manifolds)
    for module in model.modules():
        if module is model:
            continue  # its values come next
        remove_load_hook(module, _TakesRadii)
        for leaf, parameter in module._parameters.items():
            old = constrained.get(id(parameter))
            if old is not None and id(old) in found.manifolds and not isinstance(old, JointSphereMember):
                _TakesRadii(module, leaf, old, found.manifolds[id(old)])
                at_once.pop(id(old), None)
    if at_once:
        change_manifolds(model, at_once)


def _remove_biases(record: Moves, names: list[str], found: _Converted) -> None:
    """Subtract the effect of removed biases from the running means of a state."""
    for name in names:
        move = record.biases[name]
        if not bool(found[name].any()):
            continue  # as revert gives it back
        if not move.direct:
            raise ProjectionError(
                found.prefix + name,
                "the conversion removed this bias, and its effect on running means has to be measured. Load the state "
                "into the plain network and convert that with manifold_nets.convert.",
            )
        missing = found.missing(tuple(move.means))
        if missing:
            raise found.partial(name, "the conversion removed this bias", missing)
        move.take_out(found)


# ---- putting weights back on their spheres ---------------------------------------------------------------------------


def way_back(model: nn.Module, name: str) -> str:
    """Return what to do with a weight that is off its spheres, and how that changes the output of the model."""
    weight = next(weight for weight in constrained_weights(model) if weight.name == name)
    known = _followers(moves_within(model)).get(id(weight.parameter))
    if known is not None and not known[1]:
        return (
            "To put it back, call manifold_nets.project(model), which also scales biases and running statistics, so "
            "that the output stays the same."
        )
    if is_converted(weight):
        return (
            "It is not known which biases and statistics must be scaled with it. manifold_nets.revert(model) gives "
            "the plain network with the same output. If a normalization still absorbs its scale, "
            "manifold_nets.project(model, example_inputs) puts it back and keeps the output."
        )
    return (
        "To put it back, call manifold_nets.project(model); this changes the output unless a normalization absorbs its "
        "scale. To keep the output, use the plain network from manifold_nets.revert(model)."
    )


def _followers(records: Iterable[tuple[str, nn.Module, Moves]]) -> dict[int, tuple[str, list[str]]]:
    """The name of each weight with known moves, and the names that must change with it but are missing; by `id`."""
    found: dict[int, tuple[str, list[str]]] = {}
    for prefix, part, record in records:
        tensors = named_tensors(part)
        for name, move in record.present(removed_biases(part)).items():
            if name in tensors:
                gone = [prefix + along for along in move.along if along not in tensors]
                found.setdefault(id(tensors[name]), (prefix + name, gone))
    return found


@torch.no_grad()
def project(model: nn.Module, report_or_example_inputs: Any = None) -> dict[str, float]:
    """Put every constrained weight back on its spheres, in place.

    Use it for weights that other code moved off their spheres: averaged models, merged or rounded checkpoints, steps of
    other optimizers. The output of a converted model stays the same: biases and running statistics are rescaled as in
    `convert`. If that would not be exact, and for weights converted with ``radius="keep"`` or on joint spheres, the
    present norms become the radii instead. In a layer that was defined on spheres (`manifold_nets.layers`) only the
    weight is scaled, to the nearest point; its output changes unless a normalization absorbs the scale. With a report
    or example inputs, the biases and statistics behind such layers are rescaled too.

    Args:
        model: the model.
        report_or_example_inputs: the report of `diagnose` for this model in its present state, or example inputs.
            Needed for converted weights whose biases and statistics are unknown, for instance after `load` of a file
            from an older release.

    Returns:
        For each constrained weight, the largest relative deviation ``|‖w_G‖/r_G − 1|`` of its groups before the
        projection.

    Raises:
        DegenerateGroupError: a group is zero or not finite.
        ProjectionError: the output of the model would change, or it is unknown whether it would.
        In every case the model is unchanged.

    Example:
        >>> import manifold_nets as mn
        >>> layer = mn.layers.UnitNormLinear(4, 3)
        >>> _ = layer.weight.detach().mul_(1.5)
        >>> {name: round(off, 6) for name, off in mn.project(layer).items()}
        {'weight': 0.5}
        >>> max(mn.project(layer).values()) < 1e-6
        True
    """
    weights = {id(weight.parameter): weight for weight in constrained_weights(model)}
    deviations = _deviations(model, weights)
    off = {name for name, by in deviations.items() if by > _rounding(model.get_parameter(name))}
    given = report_or_example_inputs
    if given is None:
        records = list(moves_within(model))
    else:
        records = [("", model, _moves_found(model, given, weights, off))]
    known = _followers(records)
    for key, (name, gone) in known.items():
        if key in weights and weights[key].name in off and gone:  # as after fusing layers
            raise _would_change(name, f"{gone[0]}, which must change with it, is not in the model any more")
    values: list[tuple[Tensor, Tensor]] = []
    manifolds: dict[int, SphereProduct] = {}
    for prefix, part, record in records:
        tensors = named_tensors(part)
        found = _Converted(tensors, prefix)
        _convert_values(part, record, found)
        values += [(tensors[name], value) for name, value in found.items()]
        manifolds |= found.manifolds
    rest = {key: weight for key, weight in weights.items() if key not in known}
    for weight in rest.values():
        if is_converted(weight) and weight.name in off:
            raise _would_change(
                weight.name,
                "it is not known which biases and running statistics must change with it",
                "Pass example inputs to find out: manifold_nets.project(model, example_inputs). ",
            )
    for parameter, value in [*values, *_nearest(model, rest)]:
        write_whole_(parameter, value.to(parameter.device))
    if manifolds:
        change_manifolds(model, manifolds)
    return deviations


def _would_change(name: str, why: str, remedy: str = "") -> ProjectionError:
    return ProjectionError(
        name,
        f"putting it on its spheres would change the output of the model: {why}; nothing was changed. {remedy}Or use "
        "the plain network with the same output, manifold_nets.revert(model).",
    )


def _deviations(model: nn.Module, weights: Mapping[int, ConstrainedWeight]) -> dict[str, float]:
    found = {w.name: 0.0 for w in weights.values()}
    for weight in weights.values():
        if not isinstance(weight.manifold, JointSphereMember):
            weight.manifold.refuse_degenerate(whole(weight.parameter), weight.name)
            found[weight.name] = float(weight.manifold.deviations(whole(weight.parameter)).max())
    for joint, members in joint_spheres(model):
        parameters = [member.parameter for member in members]
        joint.refuse_degenerate(parameters)
        found |= dict.fromkeys((member.name for member in members), float(joint.deviations(parameters).max()))
    return found


def _moves_found(model: nn.Module, given: Any, weights: Mapping[int, ConstrainedWeight], off: set[str]) -> Moves:
    """What changes with each constrained weight, according to a report."""
    if not isinstance(given, SymmetryReport):
        with torch.enable_grad(), torch.inference_mode(False):
            given = diagnose(model, given)
    findings = {finding.name: finding for finding in given.weights}
    record = Moves()
    for weight in weights.values():
        finding = findings.get(weight.name)
        if isinstance(weight.manifold, JointSphereMember):
            record.weights[weight.name] = ScaledWeight(weight.name)
        elif finding is not None and finding.status == "constrained" and finding.partition == weight.manifold.partition:
            record.weights[weight.name] = ScaledWeight.of(finding, weight.manifold.uniform_radius)
        elif weight.name in off:
            raise _would_change(weight.name, _why_it_changes(finding))
    return record


def _why_it_changes(finding: WeightFinding | None) -> str:
    if finding is None:
        return "it is not in the report"
    if finding.status == "constrained":
        return f"no normalization absorbs the scale of each of its groups, only that of {finding.partition}"
    return f"its scale matters ({finding.broken_by or finding.status})"


def _nearest(model: nn.Module, weights: Mapping[int, ConstrainedWeight]) -> list[tuple[Tensor, Tensor]]:
    """The nearest points of weights that are scaled alone."""
    points = [
        (weight.parameter, weight.manifold.projx(whole(weight.parameter)))
        for weight in weights.values()
        if not isinstance(weight.manifold, JointSphereMember)
    ]
    for joint, members in joint_spheres(model):
        parameters = [member.parameter for member in members]
        if weights.keys() >= {id(parameter) for parameter in parameters}:
            points += zip(parameters, joint.projx(parameters), strict=True)
    return points
