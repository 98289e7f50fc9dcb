"""Plans that a person has read and edited: written as JSON, read back, and checked against what is possible."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from manifold_nets.conversion.plan import Action, ConversionPlan, plan
from manifold_nets.errors import PlanError
from manifold_nets.files import atomic_file
from manifold_nets.symmetry import SymmetryReport, diagnose

__all__ = ["EditedPlan", "edited_plan", "write_plan"]

EditedPlan = ConversionPlan | Mapping[str, Any] | str | os.PathLike[str]


def write_plan(chosen: ConversionPlan, path: str | os.PathLike[str]) -> None:
    """Write a plan as JSON for a person to read and edit; the file appears whole or not at all.

    Each action has a ``"name"``, an ``"action"`` (``"sphere"`` or ``"leave"``) and, for spheres, a ``"radius"``
    (``"unit"`` or ``"keep"``). What else is there explains; changing it has no effect.

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
        PlanError: the plan is no JSON of a plan, names a weight that is not there, or asks for what is impossible.
    """
    given = report_or_example_inputs
    report = given if isinstance(given, SymmetryReport) else diagnose(model, given)
    unit, keep = plan(model, report, train_tolerance=math.inf), plan(model, report, radius="keep")
    source, wanted = _read(edited)
    why = "left by the plan"
    actions = {a.name: Action(a.name, "leave", why, a.partition, finding=a.finding) for a in unit.actions}
    for entry in wanted:
        name = entry.get("name")
        if name not in actions:
            raise PlanError(source, f"the weight {name!r}", f"one of {', '.join(actions)}")
        actions[name] = _checked(source, entry, unit[name], keep[name], actions[name])
    return ConversionPlan(report.model, tuple(actions.values()), report.example_inputs)


def _read(edited: EditedPlan) -> tuple[str, list[Mapping[str, Any]]]:
    """Name of the source, and the actions that it lists."""
    if isinstance(edited, ConversionPlan):
        return "plan", list(edited.to_dict()["actions"])
    source, data = "plan", edited
    if isinstance(edited, (str, os.PathLike)):
        source = str(edited)
        try:
            data = json.loads(Path(edited).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise PlanError(source, f"{type(error).__name__}: {error}", "a file that write_plan wrote") from error
    listed = data.get("actions") if isinstance(data, Mapping) else None
    if not isinstance(listed, list) or not all(isinstance(entry, Mapping) for entry in listed):
        raise PlanError(source, "no list of actions", '{"actions": [{"name": …, "action": …}, …]}')
    return source, listed


def _checked(source: str, entry: Mapping[str, Any], unit: Action, keep: Action, leave: Action) -> Action:
    """The action that an entry asks for, where it is possible."""
    what, radius = entry.get("action"), entry.get("radius")
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
