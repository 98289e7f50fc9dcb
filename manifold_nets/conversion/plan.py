"""The plan of a conversion: what to do about every symmetry and why, as data, made before anything changes."""

from __future__ import annotations

import fnmatch
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from manifold_nets.conversion.actions import ACTION_OF, REMEDIES, Action, ConversionPlan, chosen_remedies
from manifold_nets.conversion.moves import RemovedBias, Values
from manifold_nets.conversion.remedies.balance import Rescaling, rescaling_families, smallest_norm
from manifold_nets.conversion.remedies.dead_biases import dead_bias_actions
from manifold_nets.conversion.remedies.spheres import joint_actions, sphere_action
from manifold_nets.conversion.verify import report_of
from manifold_nets.documents import Schema, parse_json
from manifold_nets.errors import OptionError, PlanError, listed, near_matches
from manifold_nets.files import atomic_file
from manifold_nets.models import named_tensors
from manifold_nets.symmetry import SymmetryFamily, SymmetryReport

__all__ = ["EditedPlan", "Selector", "early_actions", "edited_plan", "plan", "plan_of", "staged", "write_plan"]

Selector = str | Sequence[str] | Callable[[str], bool] | None
EditedPlan = ConversionPlan | Mapping[str, Any] | str | os.PathLike[str]
Radius = Literal["unit", "keep"]
State = Mapping[str, Tensor]
"""Parameters and buffers by name."""

_SCHEMA = Schema.packaged("manifold_nets.conversion", "plan.schema.json")


@torch.inference_mode(False)  # gradients are needed
def plan(
    model: nn.Module,
    report_or_example_inputs: Any,
    *,
    remedies: str | Iterable[str] = "spheres",
    radius: Literal["unit", "keep"] = "unit",
    include: Selector = None,
    exclude: Selector = None,
    train_tolerance: float = 1e-4,
) -> ConversionPlan:
    """Plan what to do about every symmetry of a network; nothing is changed.

    The remedies, in the order in which they are applied:

    ``"dead-biases"`` removes biases that a normalization or a softmax subtracts again. The running means behind them
    change by the same constant, so the output stays the same in both modes. The key leaves the `state_dict`, as with
    ``bias=False``; `revert` puts zeros back.

    ``"balance"`` rescales layers against each other to the smallest norm; see `balance`. The plan keeps the factors it
    found; if the weights have changed by the time it is applied, the search continues from these factors.

    ``"spheres"`` puts each scale-invariant weight on a product of spheres. With ``radius="unit"`` a group of k filters
    gets norm √k, so that the mean square filter norm is 1. This is exact in evaluation mode, where the running
    statistics compensate for the eps of the normalization; in training mode, eps has another effect after the
    rescaling. Groups keep their norms as radii if that would change the output of a layer's normalization by more than
    ``train_tolerance``, if there are no running statistics, or if these cannot be rescaled exactly. This has no
    disadvantage, since the metric of `SphereProduct` does not depend on the radius.

    ``"joint-spheres"`` handles weights that are scale-invariant only together, such as those that add to one residual
    stream: they share one sphere for each channel, or a single one; see `JointSphere`. Their joint norms are kept as
    radii, so nothing else changes. Biases and other vectors with the same scale stay unconstrained.

    Args:
        model: the network.
        report_or_example_inputs: the report of `diagnose` for this model, or example inputs to diagnose it with.
        remedies: one name, several, or ``"all"``.
        radius: ``"unit"`` or ``"keep"`` for all weights.
        include: names to convert (default: all): a pattern such as ``"layer1.*"``, several patterns, or a predicate on
            the name. A remedy for several parameters is applied only if all of them are included.
        exclude: names to leave, in the same form.
        train_tolerance: largest relative change of a layer's normalized output in training mode.

    Raises:
        OptionError: ``include`` or ``exclude`` matches no parameter that the remedies apply to.
        OptionError: ``remedies``, ``radius`` or ``train_tolerance`` has an invalid value.
        ReportMismatchError: the report belongs to another model.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
        >>> found = plan(net, torch.randn(16, 4), remedies="all")
        >>> [(action.name, action.action) for action in found.actions if action.action != "leave"]
        [('0.weight', 'sphere'), ('0.bias', 'remove'), ('balance 1', 'balance')]
    """
    chosen = chosen_remedies(remedies)
    if radius not in ("unit", "keep"):
        raise OptionError("radius", radius, "'unit' or 'keep'")
    if not train_tolerance >= 0:
        raise OptionError("train_tolerance", train_tolerance, "a number ≥ 0")
    report = report_of(model, report_or_example_inputs)
    early = early_actions(model, report, chosen)
    moved = [name for action in early for name in action.parameters]
    if "joint-spheres" in chosen:
        moved += [name for family in report.families for name in family.parameters]
    names = list(dict.fromkeys([w.name for w in report.weights] + moved))
    wanted = _selected(names, include, "include", default=True)
    wanted -= _selected(names, exclude, "exclude", default=False)

    def choose(action: Action) -> Action:
        return action if wanted.issuperset(action.parameters) else action.left("not selected")

    def weights(state: State) -> list[Action]:
        on_spheres = wanted if "spheres" in chosen else set()
        return _weight_actions(report, state, dict.fromkeys(on_spheres, radius), train_tolerance)

    return plan_of(model, report, early, weights, choose, joint="joint-spheres" in chosen)


def plan_of(
    model: nn.Module,
    report: SymmetryReport,
    early: Sequence[Action],
    weights: Callable[[State], list[Action]],
    choose: Callable[[Action], Action] = lambda action: action,
    *,
    joint: bool = False,
    start: Rescaling | None = None,
) -> ConversionPlan:
    """Build a plan; each part is planned for the values that the earlier parts leave.

    Args:
        model: the network.
        report: the report of `diagnose` for this model.
        early: the result of `early_actions`.
        weights: returns the actions on single weights, given the parameters and buffers at that point.
        choose: keeps an action of the other remedies or turns it into "leave".
        joint: whether weights go on joint spheres.
        start: a rescaling that was found before.
    """
    early = [choose(action) for action in early]
    state, rescaling = staged(named_tensors(model), early, start)
    if rescaling is not None and not rescaling.descent.converged:
        said = rescaling.descent
        early = [replace(a, reason=f"{a.reason}; {said}") if a.action == "balance" else a for a in early]
    first = weights(state)
    late = joint_actions(model, report, state, {a.name for a in first if a.action == "sphere"}) if joint else []
    return ConversionPlan(report.model, (*first, *early, *map(choose, late)), report.example_inputs, rescaling)


def early_actions(model: nn.Module, report: SymmetryReport, remedies: Sequence[str]) -> list[Action]:
    """Return the actions that come before spheres, in the order in which they are applied."""
    actions = dead_bias_actions(model, report) if "dead-biases" in remedies else []
    if "balance" in remedies:
        for number, (family, why_left) in enumerate(rescaling_families(model, report), 1):
            reason, members = f"{family.count} rescalings, to minimize the norm", tuple(map(str, family.members))
            action = Action(f"balance {number}", "balance", reason, remedy="balance", members=members, move=family)
            actions.append(action if why_left is None else action.left(why_left))
    return actions


def staged(
    state: State, actions: Sequence[Action], start: Rescaling | None = None
) -> tuple[dict[str, Tensor], Rescaling | None]:
    """Return parameters and buffers after removing biases and balancing, and the rescaling.

    Changed ones are new tensors, rounded once to their dtype; removed biases are zeros.

    Args:
        state: parameters and buffers by name.
        actions: the actions to apply.
        start: a rescaling that was found before, for these values or for others.
    """
    values = Values(state)
    for action in actions:
        if action.action == "remove" and isinstance(action.move, RemovedBias):
            action.move.take_out(values)
    families = [a.move for a in actions if a.action == "balance" and isinstance(a.move, SymmetryFamily)]
    rescaling = smallest_norm(families, {**state, **values}, start) if families else None
    if rescaling is not None:
        values.update(rescaling.values({**state, **values}))
    return {**state, **{name: value.to(state[name].dtype) for name, value in values.items()}}, rescaling


def _weight_actions(
    report: SymmetryReport, state: State, radii: Mapping[str, Radius], tolerance: float
) -> list[Action]:
    """Return the action for each single weight at the requested radius; "leave" without one."""
    return [
        Action(finding.name, "leave", "not selected", finding.partition)
        if finding.status == "invariant" and finding.name not in radii
        else sphere_action(finding, state, radii.get(finding.name, "unit"), tolerance)
        for finding in report.weights
    ]


def _selected(names: list[str], selector: Selector, option: str, *, default: bool) -> set[str]:
    if selector is None:
        return set(names) if default else set()
    patterns = [selector] if isinstance(selector, str) else selector
    if callable(patterns):
        matches = {"a predicate": [name for name in names if patterns(name)]}
    else:
        matches = {
            pattern: [n for n in names if fnmatch.fnmatchcase(n, pattern) or fnmatch.fnmatchcase(n, f"{pattern}.*")]
            for pattern in patterns
        }
    for pattern, found in matches.items():
        if not found:
            near = f"{near_matches(pattern, names)} Write patterns as in a shell: 'layer1.*', '*.conv?.weight'.".strip()
            expected = f"a pattern or predicate that matches one of these names: {listed(names, 40)}"
            raise OptionError(option, pattern, expected, near)
    return {name for found in matches.values() for name in found}


# ---- edited plans ----------------------------------------------------------------------------------------------------


def write_plan(chosen: ConversionPlan, path: str | os.PathLike[str]) -> None:
    """Write a plan as JSON, to read and edit. The file is written completely or not at all.

    Each action has a ``"name"``, an ``"action"`` (``"leave"``, or the one of its ``"remedy"``: ``"sphere"`` for
    ``"spheres"``, ``"remove"`` for ``"dead-biases"``, ``"balance"`` for ``"balance"``, ``"joint sphere"`` for
    ``"joint-spheres"``) and, for spheres, a ``"radius"`` (``"unit"`` or ``"keep"``). All other entries are
    explanations, and editing them has no effect, except that the ``"members"`` of an action on several parameters must
    be those of the network.

    Args:
        chosen: the plan that `manifold_nets.plan` returned.
        path: file to write.
    """
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(chosen.to_dict(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def edited_plan(model: nn.Module, report_or_example_inputs: Any, edited: EditedPlan) -> ConversionPlan:
    """Check an edited plan and make it applicable.

    Weights that the edited plan does not mention are left. Unit radius is applied whatever it changes in training mode,
    because the plan asks for it explicitly; the deviation is reported.

    Args:
        model: the network.
        report_or_example_inputs: the report of `diagnose` for this model, or example inputs.
        edited: a plan, its `to_dict`, or a file written by `write_plan`.

    Raises:
        PlanError: the plan is not valid, has an unknown key, names an unknown weight or one weight twice, or asks for
            an action that is impossible.
    """
    source = os.fspath(edited) if isinstance(edited, (str, os.PathLike)) else "plan"
    wanted = _read(source, edited)
    report = report_of(model, report_or_example_inputs)
    doing = {remedy for (_, remedy), entry in wanted.items() if entry["action"] not in ("leave", "already")}
    asked = [remedy for remedy in REMEDIES if remedy in doing]
    # A weight that stays as it is may have groups without a direction.
    radii: dict[str, Radius] = {
        name: "keep" if entry.get("radius") == "keep" else "unit"
        for (name, _), entry in wanted.items()
        if entry["action"] == "sphere"
    }

    def weights(state: State) -> list[Action]:
        return [_decided_weight(source, a, wanted) for a in _weight_actions(report, state, radii, math.inf)]

    found = plan_of(
        model,
        report,
        early_actions(model, report, asked),
        weights,
        lambda action: _decided(source, action, wanted),
        joint="joint-spheres" in asked,
        start=edited.rescaling if isinstance(edited, ConversionPlan) else None,
    )
    known = {remedy: sorted(a.name for a in found.actions if a.remedy == remedy) for remedy in (*asked, "spheres")}
    for (name, remedy), entry in wanted.items():
        # Left actions need not be known.
        skipped = remedy != "spheres" and entry["action"] == "leave"
        if remedy in known and name not in known[remedy] and not skipped:
            names = ", ".join(known[remedy]) or "none, as this remedy has nothing to do"
            raise PlanError(source, f"action {entry['action']!r} for {name!r}", f"one of {names}")
    return found


_Wanted = Mapping[tuple[str, str], Mapping[str, Any]]


def _read(source: str, edited: EditedPlan) -> _Wanted:
    """The entries of a plan by name and remedy."""
    data: Any = edited.to_dict() if isinstance(edited, ConversionPlan) else edited
    if isinstance(data, (str, os.PathLike)):
        try:
            data = parse_json(Path(data).read_bytes())
        except (OSError, ValueError) as error:
            raise PlanError(source, f"{type(error).__name__}: {error}", "a file written by write_plan") from error
    fault = _SCHEMA.fault(data)
    if fault is not None:
        raise PlanError(source, fault, 'a plan: {"actions": [{"name": …, "action": …}, …]}')
    remedies = {what: remedy for remedy, what in ACTION_OF.items()}
    wanted: dict[tuple[str, str], Mapping[str, Any]] = {}
    for entry in data["actions"]:
        # The remedy of an action follows from its kind; that of "leave", from its own entry.
        said = entry.get("remedy", "spheres")
        remedy = remedies.get(entry["action"], said)
        if entry.get("remedy", remedy) != remedy:
            pairs = ", ".join(f"{what!r} with {each!r}" for each, what in ACTION_OF.items())
            found = f"action {entry['action']!r} with remedy {said!r} for {entry['name']!r}"
            raise PlanError(source, found, f"one of {pairs}")
        if (entry["name"], remedy) in wanted:  # neither would be known to be meant
            raise PlanError(source, f"two actions of {remedy} for {entry['name']!r}", "one")
        wanted[entry["name"], remedy] = entry
    return wanted


def _decided(source: str, action: Action, wanted: _Wanted) -> Action:
    """Carry an action out where the plan asks for it, and leave it otherwise."""
    entry = wanted.get((action.name, action.remedy), {"action": "leave"})
    if entry["action"] == "leave":
        return action.left("left by the plan")
    if entry["action"] != action.action:
        raise PlanError(source, f"{entry['action']!r} for {action.name}", f"{action.action!r}: {action.reason}")
    members = entry.get("members")
    if members is not None and members != list(action.members):
        raise PlanError(source, f"members {members} of {action.name}", f"those of the network: {list(action.members)}")
    return action


def _decided_weight(source: str, possible: Action, wanted: _Wanted) -> Action:
    """The action for a weight that the plan asks for, where it is possible at this radius."""
    name, already = possible.name, possible.action == "already"
    entry = wanted.get((name, "spheres"), {"action": "already" if already else "leave"})
    what, radius = entry["action"], entry.get("radius")
    if what == "already" and already:
        return possible
    if what == "leave" and not already:
        return Action(name, "leave", "left by the plan", possible.partition)
    if what != "sphere" or radius not in ("unit", "keep"):
        found = f"action {what!r} with radius {radius!r} for {name}"
        expected = "'leave', 'sphere' with radius 'unit' or 'keep', or 'already' where the weight is on spheres"
        raise PlanError(source, found, expected)
    if possible.action != "sphere":
        raise PlanError(source, f"'sphere' for {name}", f"'{possible.action}': {possible.reason}")
    if possible.radius != radius:
        raise PlanError(source, f"radius 'unit' for {name}", f"'keep': it {possible.reason}")
    return possible
