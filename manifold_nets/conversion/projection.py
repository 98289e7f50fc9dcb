"""Putting weights back on their spheres that other code has moved off them, with what changes along."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from manifold_nets.constraints import (
    ConstrainedWeight,
    change_manifolds,
    constrained_weights,
    is_converted,
    joint_spheres,
)
from manifold_nets.conversion.loading import convert_values, rounding_of
from manifold_nets.conversion.moves import ConvertedWeight, Moves, known_weights, moves_within
from manifold_nets.conversion.same_model import named_tensors
from manifold_nets.errors import ProjectionError
from manifold_nets.gathered import whole, write_whole_
from manifold_nets.joint_sphere import JointSphereMember
from manifold_nets.manifold import SphereProduct
from manifold_nets.symmetry import SymmetryReport, WeightFinding, diagnose

__all__ = ["project", "way_back"]

_REVERT = "Take the plain network, which computes the same as this model: manifold_nets.revert(model)."


def way_back(model: nn.Module, name: str) -> str:
    """Say what to do with a weight that is off its spheres, and what that does to the output of the model."""
    weight = next(weight for weight in constrained_weights(model) if weight.name == name)
    for _, part, record in moves_within(model):
        tensors = named_tensors(part)
        own = [known for n, known in known_weights(part, record).items() if tensors.get(n) is weight.parameter]
        if own and tensors.keys() >= set(own[0].along):
            return (
                "To put it back, call manifold_nets.project(model): biases and running statistics are scaled along, "
                "and the output stays."
            )
    if is_converted(weight):
        return (
            "What has to be scaled along with it is not known here. The plain network computes the same: "
            "manifold_nets.revert(model). If a normalization still takes its scale away, "
            "manifold_nets.project(model, example_inputs) puts it back and the output stays."
        )
    return (
        "To put it back, call manifold_nets.project(model): the output changes with it unless a normalization takes "
        "its scale away. To keep the output, take the plain network: manifold_nets.revert(model)."
    )


@torch.no_grad()
def project(model: nn.Module, report_or_example_inputs: Any = None) -> dict[str, float]:
    """Put every constrained weight on its spheres again, in place.

    For weights that other code has moved off them: averages of models, merged or rounded checkpoints, plain steps.

    What a converted model computes stays: biases and running statistics are scaled along as `convert` does, and where
    that would not be exact, and for weights that were converted with ``radius="keep"`` or put on joint spheres, the
    norms that the weights have now become the radii. Of a layer that was defined on spheres (`manifold_nets.layers`)
    only the weight is scaled, to the nearest point: that is what the layer is defined by, and its output changes with
    it unless a normalization takes the scale away. With a report or example inputs, biases and statistics of such
    layers are scaled along too.

    Args:
        model: the model.
        report_or_example_inputs: what `diagnose` returned for this model as it is, or example inputs. Needed for a
            converted weight of which it is not known what changes with it, as after `load` into a plain model.

    Returns:
        Name of each constrained weight, and the largest relative deviation ``|‖w_G‖/r_G − 1|`` of its groups before.

    Raises:
        DegenerateGroupError: a group is zero or not finite.
        ProjectionError: it would change what the model computes, or that is not known.
        In every case the model is left as it was.

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
    given = report_or_example_inputs
    if given is None:
        records = list(moves_within(model))
    else:
        report = given if isinstance(given, SymmetryReport) else _diagnosed(model, given)
        records = [("", model, _moves_found(report, weights, deviations))]
    values: dict[int, tuple[Tensor, Tensor]] = {}
    manifolds: dict[int, SphereProduct] = {}
    settled: set[int] = set()
    for prefix, part, record in records:
        tensors = named_tensors(part)
        for name, known in known_weights(part, record).items():
            weight = weights.get(id(tensors.get(name)))
            if weight is not None and deviations[weight.name] > rounding_of(weight.parameter):
                _require_along(prefix, name, known, tensors)
        found = convert_values(part, record, tensors, prefix)
        values |= {id(tensors[name]): (tensors[name], value) for name, value in found.values.items()}
        manifolds |= found.manifolds
        settled |= {id(tensors[name]) for name in record.weights if name in tensors}
    rest = {key: weight for key, weight in weights.items() if key not in settled}
    for weight in rest.values():
        if is_converted(weight) and deviations[weight.name] > rounding_of(weight.parameter):
            raise ProjectionError(
                weight.name,
                "it is not known which biases and running statistics change with it",
                f"Pass example inputs, manifold_nets.project(model, example_inputs), to find out. {_REVERT}",
            )
    values |= _nearest(model, rest)
    for parameter, value in values.values():
        write_whole_(parameter, value.to(parameter.device))
    if manifolds:
        change_manifolds(model, manifolds)
    return deviations


def _diagnosed(model: nn.Module, example_inputs: Any) -> SymmetryReport:
    with torch.enable_grad(), torch.inference_mode(False):
        return diagnose(model, example_inputs)


def _deviations(model: nn.Module, weights: dict[int, ConstrainedWeight]) -> dict[str, float]:
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


def _require_along(prefix: str, name: str, known: ConvertedWeight, tensors: dict[str, Tensor]) -> None:
    """Raise where something that changes with a weight is not in the model any more, as after fusing layers."""
    gone = [prefix + along for along in known.along if along not in tensors]
    if gone:
        raise ProjectionError(prefix + name, f"{gone[0]}, which changes with it, is not in the model any more", _REVERT)


def _moves_found(report: SymmetryReport, weights: dict[int, ConstrainedWeight], deviations: dict[str, float]) -> Moves:
    """What changes with each constrained weight, as a report says."""
    record = Moves()
    for weight in weights.values():
        finding = next((found for found in report.weights if found.name == weight.name), None)
        if isinstance(weight.manifold, JointSphereMember):
            record.weights[weight.name] = ConvertedWeight(None)
        elif finding is not None and finding.status == "constrained" and finding.partition == weight.manifold.partition:
            record.weights[weight.name] = ConvertedWeight.of(finding, weight.manifold.uniform_radius)
        elif deviations[weight.name] > rounding_of(weight.parameter):
            raise ProjectionError(weight.name, _why_it_changes(finding), _REVERT)
    return record


def _why_it_changes(finding: WeightFinding | None) -> str:
    if finding is None:
        return "it is not in the report"
    if finding.status == "constrained":
        return f"no normalization takes the scale of each of its groups away, only that of {finding.partition}"
    return f"its scale has a meaning ({finding.broken_by or finding.status})"


def _nearest(model: nn.Module, weights: dict[int, ConstrainedWeight]) -> dict[int, tuple[Tensor, Tensor]]:
    """The nearest points of weights that are scaled by themselves."""
    points = {
        key: (weight.parameter, weight.manifold.projx(whole(weight.parameter)))
        for key, weight in weights.items()
        if not isinstance(weight.manifold, JointSphereMember)
    }
    for joint, members in joint_spheres(model):
        parameters = [member.parameter for member in members]
        if weights.keys() >= {id(parameter) for parameter in parameters}:
            pairs = zip(parameters, joint.projx(parameters), strict=True)
            points |= {id(parameter): (parameter, point) for parameter, point in pairs}
    return points
