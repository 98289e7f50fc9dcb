"""Parameter groups of a model, and the manifold of each parameter of a group."""

from __future__ import annotations

import math
from collections.abc import Container, Iterator, Mapping, Sequence
from typing import Any

import geoopt
from torch import Tensor, nn

from manifold_nets.constraints import NEAR, constrained_weights, lost_constraints, recorded_name
from manifold_nets.errors import (
    ArgumentTypeError,
    ConstraintError,
    EuclideanStepError,
    OptionError,
    ParameterGroupError,
    ReportMismatchError,
)
from manifold_nets.gathered import is_sharded, whole
from manifold_nets.joint_sphere import JointSphereMember, by_joint_sphere
from manifold_nets.manifold import SphereProduct
from manifold_nets.models import inner_model
from manifold_nets.optim.backends.dispatch import has_triton
from manifold_nets.padded import PaddedSphereProduct
from manifold_nets.symmetry.report import SymmetryReport, WeightFinding

__all__ = ["Group", "constrained_of", "invariant_weights", "name_at_step", "name_of", "param_groups"]
__all__ += ["resolve_manifolds", "subgroup"]

Group = dict[str, Any]

_NORMALIZATIONS = (
    nn.modules.batchnorm._NormBase,  # batch and instance normalization
    nn.GroupNorm,
    nn.LayerNorm,
    nn.RMSNorm,
    nn.LocalResponseNorm,
)
_PUT_BACK = (
    "Put it back first: manifold_nets.project(model) also rescales biases and statistics, so that the output stays "
    "the same, or raises an error with the reason; `weight.copy_(manifold.projx(weight))` under torch.no_grad() scales "
    "only the weight."
)


def param_groups(
    model: nn.Module,
    *,
    report: SymmetryReport | None = None,
    weight_decay: float = 0.0,
    sphere_lr: float | Mapping[str, float] | None = None,
) -> list[dict[str, Any]]:
    """Return the parameter groups of a model: constrained, scale-invariant, decayed, undecayed.

    The manifold of a constrained weight is looked up in the model, so the weight stays constrained even if its
    parameter object was replaced by a plain one (``load_state_dict(assign=True)``, ``to("meta")`` and ``to_empty``,
    sharding). Biases, the parameters of normalizations, and all other parameters of less than two dimensions are
    undecayed. Frozen parameters are left out; a shared parameter is in one group once. Empty groups are left out too,
    so that a model without constraints gives groups for any torch optimizer.

    With a report, scale-invariant weights that are not constrained form a group of their own, with
    ``"scale_invariant": True`` and the weight decay of the decayed group. On these weights decay does not regularize
    but determines how far a step turns them. The separate group lets you set another decay for them, and
    `manifold_nets.optim.CorrectedDecay` finds them by it.

    Args:
        model: any module; names are those of the module inside DistributedDataParallel or ``torch.compile``.
        report: the report of `manifold_nets.diagnose` for this model, needed for the scale-invariant group.
        weight_decay: weight decay of the decayed and the scale-invariant group; the others get 0.
        sphere_lr: learning rate of the constrained group, in radians (default: the optimizer's). Or a dictionary with
            one rate per weight name, as from `manifold_nets.LearningRates.by_weight`: each of these weights gets a
            group of its own, other constrained weights keep the rate of the optimizer, and names of weights that are
            not constrained are ignored.

    Returns:
        Groups with ``"params"``, ``"param_names"`` and ``"weight_decay"``; constrained ones with ``"manifolds"``.

    Raises:
        ArgumentTypeError: ``report`` is not a `SymmetryReport`.
        ReportMismatchError: the report belongs to another model.
        OptionError: ``sphere_lr`` has a name that is not a parameter of the model, or a rate or the weight decay is
            negative or not finite.

    Example:
        >>> import torch, manifold_nets as mn
        >>> model = torch.nn.Sequential(mn.layers.UnitNormLinear(4, 3), torch.nn.LayerNorm(3), torch.nn.Linear(3, 2))
        >>> for group in mn.param_groups(model, weight_decay=5e-4):
        ...     print(group["weight_decay"], group["param_names"])
        0.0 ['0.weight']
        0.0005 ['2.weight']
        0.0 ['0.bias', '1.weight', '1.bias', '2.bias']
        >>> plain = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.LayerNorm(3), torch.nn.Linear(3, 2))
        >>> groups = mn.param_groups(plain, report=mn.diagnose(plain, torch.randn(8, 4)), weight_decay=5e-4)
        >>> [group["param_names"] for group in groups if group.get("scale_invariant")]
        [['0.weight']]
        >>> optimizer = torch.optim.AdamW(groups)
    """
    model = inner_model(model)
    _require_rate("weight_decay", weight_decay)
    for name, rate in sphere_lr.items() if isinstance(sphere_lr, Mapping) else [("", sphere_lr)]:
        if rate is not None:
            _require_rate(f"sphere_lr[{name!r}]" if name else "sphere_lr", rate)
    manifolds = {id(weight.parameter): weight.manifold for weight in constrained_weights(model)}
    invariant = {} if report is None else {id(p): finding for finding, p in invariant_weights(model, report)}
    members = _by_kind(model, manifolds, invariant)
    options: dict[str, dict[str, Any]] = {
        "constrained": {"weight_decay": 0.0, "manifolds": [manifolds[id(p)] for _, p in members["constrained"]]},
        "invariant": {"weight_decay": weight_decay, "scale_invariant": True},
        "decayed": {"weight_decay": weight_decay},
        "undecayed": {"weight_decay": 0.0},
    }
    if sphere_lr is not None and not isinstance(sphere_lr, Mapping):
        options["constrained"]["lr"] = sphere_lr
    groups = [
        {"params": [p for _, p in named], "param_names": [name for name, _ in named], **options[kind]}
        for kind, named in members.items()
        if named
    ]
    if not isinstance(sphere_lr, Mapping):
        return groups
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for name in sphere_lr:
        if name not in names:
            raise OptionError("sphere_lr", name, f"names of parameters of {type(model).__name__}")
    return [part for group in groups for part in (_apart(group, sphere_lr) if "manifolds" in group else [group])]


def invariant_weights(model: nn.Module, report: SymmetryReport) -> Iterator[tuple[WeightFinding, nn.Parameter]]:
    """Yield the scale-invariant weights of a report with the parameters of the model.

    Raises:
        ArgumentTypeError: `report` is not what `diagnose` returns.
        ReportMismatchError: the report is of another model.
    """
    if not isinstance(report, SymmetryReport):
        raise ArgumentTypeError(
            "report", report, "the report of manifold_nets.diagnose for this model", "Pass diagnose(model, inputs)."
        )
    parameters = dict(model.named_parameters(remove_duplicate=False))
    differing = [w.name for w in report.weights if w.name not in parameters or parameters[w.name].shape != w.shape]
    if differing:
        raise ReportMismatchError(type(model).__name__, report.model, differing)
    for finding in report.invariant:
        yield finding, parameters[finding.name]


def _by_kind(
    model: nn.Module, constrained: Container[int], invariant: Container[int]
) -> dict[str, list[tuple[str, nn.Parameter]]]:
    """Names and parameters by kind; frozen ones are left out, and the first two kinds are known by their `id`."""
    normalization = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, _NORMALIZATIONS)
        for parameter in module.parameters(recurse=False)
    }
    kinds = ("constrained", "invariant", "decayed", "undecayed")
    members: dict[str, list[tuple[str, nn.Parameter]]] = {kind: [] for kind in kinds}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if id(parameter) in constrained:
            kind = "constrained"
        elif id(parameter) in invariant:
            kind = "invariant"
        elif parameter.ndim < 2 or id(parameter) in normalization or name.rpartition(".")[2].endswith("bias"):
            kind = "undecayed"
        else:
            kind = "decayed"
        members[kind].append((name, parameter))
    return members


def _require_rate(option: str, rate: Any) -> None:
    try:
        holds = 0 <= float(rate) < math.inf
    except (TypeError, ValueError):
        holds = False
    if not holds:
        raise OptionError(option, rate, "a finite number ≥ 0")


def _apart(group: dict[str, Any], rates: Mapping[str, float]) -> list[dict[str, Any]]:
    """A constrained group with one group for each weight that has a learning rate of its own."""
    names = group["param_names"]
    parts = [{**subgroup(group, {name}), "lr": rates[name]} for name in names if name in rates]
    rest = set(names).difference(rates)
    return [*parts, subgroup(group, rest)] if rest else parts


def subgroup(group: Group, names: Container[str]) -> Group:
    """Return a group with those of its parameters that have these names."""
    chosen = [place for place, name in enumerate(group["param_names"]) if name in names]
    lists = [key for key in ("params", "param_names", "manifolds") if key in group]
    return {**group, **{key: [group[key][place] for place in chosen] for key in lists}}


# ---- the manifolds of a group ----------------------------------------------------------------------------------------


def constrained_of(group: Group) -> Iterator[tuple[int, Tensor, SphereProduct]]:
    """Yield position, weight and manifold of each constrained weight of a group."""
    for index, (weight, manifold) in enumerate(zip(group["params"], group["manifolds"], strict=True)):
        if manifold is not None:
            yield index, weight, manifold


def name_of(group: Group, number: int, index: int) -> str:
    """Return the name of a parameter, or where it stands in the optimizer, for messages."""
    names = group.get("param_names")
    if names is not None and index < len(names):
        return str(names[index])
    parameter = group["params"][index]
    if isinstance(parameter, tuple):
        return str(parameter[0])
    shape = tuple(parameter.shape) if isinstance(parameter, Tensor) else type(parameter).__name__
    return f"parameter {index} of group {number} ({shape})"


def name_at_step(group: Group, number: int, index: int) -> str:
    """Return the name of a parameter as `name_of` does; without names, that of its module, which takes a search."""
    place = name_of(group, number, index)
    recorded = None if group.get("param_names") is not None else recorded_name(group["params"][index])
    return place if recorded is None else f"{recorded}, {place}"


def resolve_manifolds(group: Group, number: int) -> list[SphereProduct | None]:
    """Return the manifold of each parameter of a new group, None for a plain parameter.

    Args:
        group: a parameter group with a list ``"params"`` of parameters, or of names and parameters, all options, and
            optionally a list ``"manifolds"``.
        number: index of the group in its optimizer.

    Raises:
        EuclideanStepError: a plain parameter has replaced a constrained weight.
        ParameterGroupError: a parameter lies on a manifold that is not a product of spheres.
        ParameterGroupError: the manifolds do not fit the parameters.
        OffManifoldError: a weight is not on its spheres.
        DegenerateGroupError: a group of a weight is zero or not finite.
        ConstraintError: weights of a joint sphere are missing; all of them must be in one group.
        ParameterGroupError: a weight is not real, or an option of the group does not work on spheres.
    """
    # What is not a tensor is left for torch to refuse.
    tensors = [entry[1] if isinstance(entry, tuple) else entry for entry in group["params"]]
    given = group.get("manifolds") or [None] * len(tensors)
    if len(given) != len(tensors):
        raise ParameterGroupError(
            f"group {number}", f"{len(given)} manifolds for {len(tensors)} parameters", "one for each, or none at all"
        )
    names = [name_of(group, number, index) for index in range(len(tensors))]
    manifolds = [_manifold_of(*triple) for triple in zip(tensors, given, names, strict=True)]
    _refuse_lost(tensors, manifolds)
    for weight, manifold, name in zip(tensors, manifolds, names, strict=True):
        if manifold is not None:
            _require_trainable(weight, manifold, name, group)
    _require_together(tensors, manifolds, rtol=NEAR, remedy="Put it back first: manifold_nets.project(model).")
    return manifolds


def _manifold_of(parameter: Any, given: Any, name: str) -> SphereProduct | None:
    own = getattr(parameter, "manifold", None)
    for manifold in (given, own):
        if not (manifold is None or isinstance(manifold, (SphereProduct, geoopt.Euclidean))):
            remedy = "Use a separate optimizer of geoopt.optim for other manifolds."
            raise ParameterGroupError(name, f"the manifold {manifold}", "a SphereProduct, or none", remedy)
    own, given = (m if isinstance(m, SphereProduct) else None for m in (own, given))
    if own is not None and given is not None and own.to_dict() != given.to_dict():
        raise ParameterGroupError(name, f"the manifold {given}", f"the parameter's own, {own}")
    return given if given is not None else own


def _refuse_lost(tensors: Sequence[Any], manifolds: Sequence[SphereProduct | None]) -> None:
    lost = lost_constraints(p for p, manifold in zip(tensors, manifolds, strict=True) if manifold is None)
    if lost:
        raise EuclideanStepError(lost)


def _require_trainable(weight: Tensor, manifold: SphereProduct, name: str, group: Group) -> None:
    if not weight.is_floating_point():
        raise ParameterGroupError.on_spheres(name, f"dtype {weight.dtype}", "a real floating-point dtype")
    for option in ("differentiable", "capturable"):
        if group.get(option) and not (option == "capturable" and has_triton(weight)):
            raise ParameterGroupError.on_spheres(name, f"{option}=True", f"{option}=False")
    if tuple(weight.shape) != manifold.partition.shape:
        raise ParameterGroupError(name, f"shape {tuple(weight.shape)}", f"the manifold's, {manifold.partition.shape}")
    if isinstance(manifold, PaddedSphereProduct) and is_sharded(weight):
        found = "a padding row in a sharded weight"
        raise ParameterGroupError.on_spheres(name, found, "a whole weight, or no padding_idx")
    if weight.device.type == "meta" or isinstance(manifold, JointSphereMember):
        return
    point = whole(weight)
    manifold.refuse_degenerate(point, name)
    manifold.require_point(point, name, rtol=NEAR, remedy=_PUT_BACK)


def _require_together(
    params: Sequence[Tensor], manifolds: Sequence[SphereProduct | None], *, rtol: float, remedy: str
) -> None:
    """Raise where some weight of a joint sphere is missing, sharded, or off the sphere.

    Raises:
        ConstraintError: the parameters lack a weight of a joint sphere.
        OffManifoldError: the joint norms are not the radii.
        DegenerateGroupError: a joint group is zero or not finite.
    """
    for joint, weights in by_joint_sphere(zip(manifolds, params, strict=True)).items():
        missing = joint.missing(weights)
        if missing:
            present = joint.names[next(iter(weights))]
            raise ConstraintError.joint(present, missing, f"a parameter group without {', '.join(missing)}")
        points = list(weights.values())
        if any(is_sharded(point) for point in points):
            raise ConstraintError.joint(joint.names[0], joint.names[1:], "sharded weights")
        if len({(point.dtype, point.device) for point in points}) > 1:
            raise ConstraintError.joint(joint.names[0], joint.names[1:], "different dtypes or devices")
        if points[0].device.type != "meta":
            joint.refuse_degenerate(points)
            joint.require_point(points, rtol=rtol, remedy=remedy)
