"""Which parameter of an optimizer's group lies on which product of spheres, and whether it can be trained there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import geoopt
from torch import Tensor

from manifold_nets.constraints import NEAR, lost_constraints, recorded_name
from manifold_nets.errors import (
    ConstraintLostError,
    ParameterGroupError,
    SphereOptionError,
    UnsupportedManifoldError,
)
from manifold_nets.groups import refuse_degenerate
from manifold_nets.joint_sphere import JointSphereMember
from manifold_nets.manifold import SphereProduct
from manifold_nets.optim.executions.joint import require_together

__all__ = ["constrained_of", "name_at_step", "name_of", "resolve_manifolds"]

Group = dict[str, Any]

_PUT_BACK = (
    "Put it back first: manifold_nets.project(model) scales what was converted with it along, so that the output "
    "stays, or says why it cannot; `weight.copy_(manifold.projx(weight))` under torch.no_grad() scales the weight "
    "alone."
)


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
    """Return the manifold of each parameter of a group that is to be added, None for a plain parameter.

    Args:
        group: a parameter group with a list ``"params"`` of parameters, or of names and parameters, all options, and
            optionally a list ``"manifolds"``.
        number: number of the group in its optimizer.

    Raises:
        ConstraintLostError: a plain parameter stands in the place of a constrained weight.
        UnsupportedManifoldError: a parameter lies on a manifold that is no product of spheres.
        ParameterGroupError: the manifolds do not fit the parameters.
        OffManifoldError: a weight is not on its spheres.
        DegenerateGroupError: a group of a weight is zero or not finite.
        JointSphereError: weights of a joint sphere are missing; all of them belong in one group.
        SphereOptionError: a weight is not real, or an option of the group does not work on spheres.
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
    require_together(tensors, manifolds, rtol=NEAR, remedy="Put it back first: manifold_nets.project(model).")
    return manifolds


def _manifold_of(parameter: Any, given: Any, name: str) -> SphereProduct | None:
    own = getattr(parameter, "manifold", None)
    for manifold in (given, own):
        if not (manifold is None or isinstance(manifold, (SphereProduct, geoopt.Euclidean))):
            raise UnsupportedManifoldError(name, manifold)
    own, given = (m if isinstance(m, SphereProduct) else None for m in (own, given))
    if own is not None and given is not None and own.to_dict() != given.to_dict():
        raise ParameterGroupError(name, f"the manifold {given}", f"the parameter's own, {own}")
    return given if given is not None else own


def _refuse_lost(tensors: Sequence[Any], manifolds: Sequence[SphereProduct | None]) -> None:
    lost = lost_constraints(p for p, manifold in zip(tensors, manifolds, strict=True) if manifold is None)
    if lost:
        raise ConstraintLostError(lost)


def _require_trainable(weight: Tensor, manifold: SphereProduct, name: str, group: Group) -> None:
    if not weight.is_floating_point():
        raise SphereOptionError(name, f"dtype {weight.dtype}", "a real floating-point dtype")
    for option in ("differentiable", "capturable"):
        if group.get(option):
            raise SphereOptionError(name, f"{option}=True", f"{option}=False")
    if tuple(weight.shape) != manifold.partition.shape:
        raise ParameterGroupError(name, f"shape {tuple(weight.shape)}", f"the manifold's, {manifold.partition.shape}")
    if weight.device.type == "meta" or isinstance(manifold, JointSphereMember):
        return
    # A sharded weight (DTensor) is looked at as a whole.
    whole = getattr(weight, "full_tensor", None)
    point = (whole() if whole is not None else weight).detach()
    refuse_degenerate(manifold.partition.norms(point), name)
    manifold.require_point(point, name, rtol=NEAR, remedy=_PUT_BACK)
