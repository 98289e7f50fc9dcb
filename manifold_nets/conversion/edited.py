"""Plans that a person has read and edited: written as JSON, read back, and checked against what is possible."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from manifold_nets.conversion.actions import ACTION_OF, Action, ConversionPlan
from manifold_nets.conversion.plan import (
    early_actions,
    late_actions,
    outcome_said,
    staged,
    weight_actions,
)
from manifold_nets.conversion.same_model import named_tensors, require_same_model
from manifold_nets.documents import Schema, parse_json
from manifold_nets.errors import PlanError
from manifold_nets.files import atomic_file
from manifold_nets.symmetry import SymmetryReport, diagnose

__all__ = ["EditedPlan", "edited_plan", "write_plan"]

_SCHEMA = Schema.packaged("manifold_nets.conversion", "plan.schema.json")

EditedPlan = ConversionPlan | Mapping[str, Any] | str | os.PathLike[str]


def write_plan(chosen: ConversionPlan, path: str | os.PathLike[str]) -> None:
    """Write a plan as JSON for a person to read and edit; the file appears whole or not at all.

    Each action has a ``"name"``, an ``"action"`` (``"leave"``, or what its ``"remedy"`` does: ``"sphere"`` for
    ``"spheres"``, ``"remove"`` for ``"dead-biases"``, ``"balance"`` for ``"balance"``, ``"joint sphere"`` for
    ``"joint-spheres"``) and, for spheres, a ``"radius"`` (``"unit"`` or ``"keep"``). What else is there explains;
    changing it has no effect, except that the ``"members"`` of an action that moves several parameters must be those
    of the network.

    Args:
        chosen: what `manifold_nets.plan` returned.
        path: file to write.
    """
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(chosen.to_dict(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def edited_plan(model: nn.Module, report_or_example_inputs: Any, edited: EditedPlan) -> ConversionPlan:
    """Turn an edited plan into one that can be carried out, or say what is wrong with it.

    Weights that the edited plan does not name are left. Unit radius is taken whatever it changes in training mode: who
    asks for it by name gets it, and the deviation is reported.

    Args:
        model: the network.
        report_or_example_inputs: what `diagnose` returned for it, or example inputs.
        edited: a plan, its `to_dict`, or the file that `write_plan` wrote.

    Raises:
        PlanError: the plan is no JSON of a plan, has a key that means nothing, names a weight that is not there or one
            twice, or asks for what is impossible.
    """
    source, entries = _read(edited)
    wanted = _wanted(source, entries)
    given = report_or_example_inputs
    report = given if isinstance(given, SymmetryReport) else diagnose(model, given)
    require_same_model(model, report)
    asked = {remedy for (_, remedy), entry in wanted.items() if entry["action"] not in ("leave", "already")} - {
        "spheres"
    }
    early = [_decided(source, a, wanted) for a in early_actions(model, report, [r for r in ACTION_OF if r in asked])]
    start = edited.rescaling if isinstance(edited, ConversionPlan) else None
    state, rescaling = staged(named_tensors(model), early, start)
    early = outcome_said(early, rescaling)
    everything = {weight.name for weight in report.weights}
    # A weight that stays as it is may have groups without a direction.
    spheres = {name for (name, _), entry in wanted.items() if entry["action"] == "sphere"}
    unit = weight_actions(report, state, "unit", math.inf, spheres)
    keep = weight_actions(report, state, "keep", math.inf, spheres)
    weights = [_weight(source, *pair, wanted) for pair in zip(unit, keep, strict=True)]
    late = late_actions(model, report, state, weights, [remedy for remedy in ACTION_OF if remedy in asked])
    early += [_decided(source, action, wanted) for action in late]
    known = {remedy: {action.name for action in early if action.remedy == remedy} for remedy in asked}
    _require_known(source, wanted, {"spheres": everything} | known)
    return ConversionPlan(report.model, (*weights, *early), report.example_inputs, rescaling)


Wanted = Mapping[tuple[str, str], Mapping[str, Any]]


def _wanted(source: str, entries: Sequence[Mapping[str, Any]]) -> Wanted:
    """The entries by name and remedy; of two about the same, neither would be known to be meant."""
    wanted: dict[tuple[str, str], Mapping[str, Any]] = {}
    for entry in entries:
        which = entry["name"], _remedy_of(source, entry)
        if which in wanted:
            raise PlanError(source, f"two actions of {which[1]} for {which[0]!r}", "one")
        wanted[which] = entry
    return wanted


def _require_known(source: str, wanted: Wanted, known: Mapping[str, set[str]]) -> None:
    """Refuse entries about what the network does not have; what is left need not be known."""
    for (name, remedy), entry in wanted.items():
        names = known.get(remedy)
        if names is not None and name not in names and not (remedy != "spheres" and entry["action"] == "leave"):
            found = f"action {entry['action']!r} for {name!r}"
            raise PlanError(source, found, f"one of {', '.join(sorted(names)) or 'none, as there is nothing to do'}")


def _remedy_of(source: str, entry: Mapping[str, Any]) -> str:
    """The remedy that an entry belongs to: that of its action, else what it says."""
    by_action: dict[str, str] = {what: remedy for remedy, what in ACTION_OF.items()}
    remedy: str = by_action.get(entry["action"], entry.get("remedy", "spheres"))
    if entry.get("remedy", remedy) != remedy:
        raise PlanError(
            source,
            f"action {entry['action']!r} with remedy {entry['remedy']!r} for {entry['name']!r}",
            f"one of {', '.join(f'{what!r} with {each!r}' for each, what in ACTION_OF.items())}",
        )
    return remedy


def _decided(source: str, action: Action, wanted: Wanted) -> Action:
    """Carry an action out where the plan asks for it, and leave it otherwise."""
    entry = wanted.get((action.name, action.remedy), {"action": "leave"})
    if entry["action"] == "leave":
        return action if action.action == "leave" else replace(action, action="leave", reason="left by the plan")
    if entry["action"] != action.action:
        raise PlanError(source, f"{entry['action']!r} for {action.name}", f"{action.action!r}: {action.reason}")
    members = entry.get("members")
    if members is not None and members != list(action.members):
        raise PlanError(source, f"members {members} of {action.name}", f"those of the network: {list(action.members)}")
    return action


def _weight(source: str, unit: Action, keep: Action, wanted: Wanted) -> Action:
    leave = Action(unit.name, "leave", "left by the plan", unit.partition, finding=unit.finding)
    entry = wanted.get((unit.name, "spheres"))
    if entry is None:
        return unit if unit.action == "already" else leave
    return _checked(source, entry, unit, keep, leave)


def _read(edited: EditedPlan) -> tuple[str, list[Mapping[str, Any]]]:
    """Name of the source, and the actions that it lists."""
    if isinstance(edited, ConversionPlan):
        return "plan", list(edited.to_dict()["actions"])
    source = "plan"
    data: Any = edited
    if isinstance(edited, (str, os.PathLike)):
        source = os.fspath(edited)
        try:
            data = parse_json(Path(edited).read_bytes())
        except (OSError, ValueError) as error:
            raise PlanError(source, f"{type(error).__name__}: {error}", "a file that write_plan wrote") from error
    fault = _SCHEMA.fault(data)
    if fault is not None:
        raise PlanError(source, fault, 'a plan: {"actions": [{"name": …, "action": …}, …]}')
    return source, data["actions"]


def _checked(source: str, entry: Mapping[str, Any], unit: Action, keep: Action, leave: Action) -> Action:
    """The action that an entry asks for, where it is possible."""
    what, radius = entry["action"], entry.get("radius")
    if what == "already" and unit.action == "already":
        return unit
    if what == "leave" and unit.action != "already":
        return leave
    if what != "sphere" or radius not in ("unit", "keep"):
        raise PlanError(
            source,
            f"action {what!r} with radius {radius!r} for {unit.name}",
            "'leave', 'sphere' with radius 'unit' or 'keep', or 'already' where the weight is on spheres",
        )
    possible = unit if radius == "unit" else keep
    if possible.action != "sphere":
        raise PlanError(source, f"'sphere' for {unit.name}", f"'{possible.action}': {possible.reason}")
    if possible.radius != radius:
        raise PlanError(source, f"radius 'unit' for {unit.name}", f"'keep': it {possible.reason}")
    return possible
