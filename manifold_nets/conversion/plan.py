"""The plan of a conversion: what is done about every symmetry, and why; data, made before anything changes."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from manifold_nets.conversion.actions import Action, ConversionPlan, chosen_remedies
from manifold_nets.conversion.balance import Rescaling, rescaling_families, smallest_norm
from manifold_nets.conversion.dead_biases import dead_bias_actions
from manifold_nets.conversion.joint import joint_actions
from manifold_nets.conversion.same_model import named_tensors, require_same_model
from manifold_nets.conversion.spheres import sphere_action
from manifold_nets.errors import OptionError, SelectionError
from manifold_nets.symmetry import SymmetryFamily, SymmetryReport, diagnose

__all__ = [
    "Selector",
    "early_actions",
    "late_actions",
    "outcome_said",
    "plan",
    "staged",
    "weight_actions",
]

Selector = str | Sequence[str] | Callable[[str], bool] | None


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
    """Decide what is done about every symmetry of a network; nothing is changed.

    The remedies, in the order in which they are carried out:

    ``"dead-biases"``: a bias that a normalization or a softmax takes away again is removed. Running means behind it
    lose the same constant, so that both modes stay; its key leaves the `state_dict`, as with ``bias=False``. `revert`
    puts zeros back.

    ``"balance"``: rescalings from one layer to the next are moved to the point of smallest norm; see `balance`. The
    plan keeps the factors, so that nothing is searched twice; on weights that changed since, the search goes on there.

    ``"spheres"``: each scale-invariant weight is put on a product of spheres. With ``radius="unit"`` a group of k
    filters gets norm √k, so that the mean square filter norm is 1. That is exact in evaluation mode, where the running
    statistics take up the eps of the normalization, but in training mode eps weighs differently after the rescaling.
    Where this changes the output of a layer's normalization by more than ``train_tolerance``, where there are no
    running statistics, or where they cannot be rescaled exactly, the groups keep their norms as radii; nothing is
    lost, since the metric of `SphereProduct` does not depend on the radius.

    ``"joint-spheres"``: weights whose scale has a meaning for each alone but none for all together, as those that add
    to one residual stream, go on one sphere for each channel, or on one sphere in all; see `JointSphere`. The joint
    norms are kept as radii, so that nothing else changes. Biases and other vectors that share the scale move freely.

    Args:
        model: the network.
        report_or_example_inputs: what `diagnose` returned for it, or example inputs to diagnose it with.
        remedies: a name, several, or ``"all"``.
        radius: ``"unit"`` or ``"keep"`` for all weights.
        include: names to convert: a pattern (``"layer1.*"``), several, or a predicate on the name (default: all). What
            moves several parameters is done where all of them are included.
        exclude: names to leave, likewise.
        train_tolerance: largest relative change of a layer's normalized training output.

    Raises:
        SelectionError: ``include`` or ``exclude`` matches no parameter that the remedies could be about.
        OptionError: ``remedies``, ``radius`` or ``train_tolerance`` has no meaning.
        ReportMismatchError: the report is of another model.
    """
    chosen = chosen_remedies(remedies)
    if radius not in ("unit", "keep"):
        raise OptionError("radius", radius, "'unit' or 'keep'")
    if not train_tolerance >= 0:
        raise OptionError("train_tolerance", train_tolerance, "a number ≥ 0")
    given = report_or_example_inputs
    report = given if isinstance(given, SymmetryReport) else diagnose(model, given)
    require_same_model(model, report)
    early = early_actions(model, report, chosen)
    moved = [name for a in early for name in a.parameters]
    if "joint-spheres" in chosen:
        moved += [name for family in report.families for name in family.parameters]
    names = dict.fromkeys([w.name for w in report.weights] + moved)
    wanted = _selected(list(names), include, "include", default=True)
    wanted -= _selected(list(names), exclude, "exclude", default=False)
    early = [_if_selected(action, wanted) for action in early]
    state, rescaling = staged(named_tensors(model), early)
    early = outcome_said(early, rescaling)
    weights = weight_actions(report, state, radius, train_tolerance, wanted if "spheres" in chosen else set())
    late = late_actions(model, report, state, weights, chosen)
    actions = (*weights, *early, *(_if_selected(action, wanted) for action in late))
    return ConversionPlan(report.model, actions, report.example_inputs, rescaling)


def early_actions(model: nn.Module, report: SymmetryReport, remedies: Sequence[str]) -> list[Action]:
    """Return the actions that come before spheres, in the order in which they are carried out."""
    actions = dead_bias_actions(model, report) if "dead-biases" in remedies else []
    if "balance" in remedies:
        families = rescaling_families(model, report)
        actions += [_balance_action(number, *found) for number, found in enumerate(families, 1)]
    return actions


def late_actions(
    model: nn.Module,
    report: SymmetryReport,
    state: dict[str, Tensor],
    weights: Sequence[Action],
    remedies: Sequence[str],
) -> list[Action]:
    """Return the actions that come after the weights that go on spheres by themselves."""
    if "joint-spheres" not in remedies:
        return []
    return joint_actions(model, report, state, {a.name for a in weights if a.action == "sphere"})


def weight_actions(
    report: SymmetryReport,
    state: dict[str, Tensor],
    radius: Literal["unit", "keep"],
    tolerance: float,
    wanted: set[str],
) -> list[Action]:
    """Return what is done with each weight by itself."""
    actions = []
    for finding in report.weights:
        if finding.status == "invariant" and finding.name not in wanted:
            action = Action(finding.name, "leave", "not selected", finding.partition, finding=finding)
        else:
            action = sphere_action(finding, state, radius, tolerance)
        actions.append(action)
    return actions


def staged(
    state: dict[str, Tensor], actions: Sequence[Action], start: Rescaling | None = None
) -> tuple[dict[str, Tensor], Rescaling | None]:
    """Return parameters and buffers as they are after biases were removed and rescalings balanced, and the rescaling.

    Changed ones are new tensors, rounded once to their dtype; removed biases are zeros.

    Args:
        state: parameters and buffers by name.
        actions: what is done.
        start: a rescaling that was found before, for these values or for others.
    """
    changed: dict[str, Tensor] = {}
    for action in actions:
        if action.action == "remove":
            changed[action.name] = torch.zeros_like(state[action.name], dtype=torch.float64)
            for mean, shift in action.shifts.items():
                old = changed.get(mean, state[mean].double())
                changed[mean] = old - old.new_tensor(shift)
    families = [a.symmetry for a in actions if a.action == "balance" and isinstance(a.symmetry, SymmetryFamily)]
    rescaling = smallest_norm(families, {**state, **changed}, start) if families else None
    rounded = {name: value.to(state[name].dtype) for name, value in changed.items()}
    if rescaling is not None:
        values = rescaling.values({**state, **changed})
        rounded.update((name, value.to(state[name].dtype)) for name, value in values)
    return {**state, **rounded}, rescaling


def outcome_said(actions: Sequence[Action], rescaling: Rescaling | None) -> list[Action]:
    """Say it in the reasons of `balance` actions where their descent did not converge."""
    if rescaling is None or rescaling.descent.converged:
        return list(actions)
    return [replace(a, reason=f"{a.reason}; {rescaling.descent}") if a.action == "balance" else a for a in actions]


def _balance_action(number: int, family: SymmetryFamily, why_left: str | None) -> Action:
    reason = why_left or f"{family.count} rescalings go to their smallest norm"
    return Action(
        f"balance {number}", "balance" if why_left is None else "leave", reason, remedy="balance",
        members=tuple(map(str, family.members)), symmetry=family,
    )  # fmt: skip


def _if_selected(action: Action, wanted: set[str]) -> Action:
    if action.action == "leave" or wanted.issuperset(action.parameters):
        return action
    return replace(action, action="leave", reason="not selected")


def _selected(names: list[str], selector: Selector, option: str, *, default: bool) -> set[str]:
    if selector is None:
        return set(names) if default else set()
    patterns = [selector] if isinstance(selector, str) else selector
    if callable(patterns):
        return set(_required(option, "a predicate", [name for name in names if patterns(name)], names))
    found: set[str] = set()
    for pattern in patterns:
        matches = [n for n in names if fnmatch.fnmatchcase(n, pattern) or fnmatch.fnmatchcase(n, f"{pattern}.*")]
        found.update(_required(option, pattern, matches, names))
    return found


def _required(option: str, pattern: str, matches: list[str], names: list[str]) -> list[str]:
    if not matches:
        raise SelectionError(option, pattern, names)
    return matches
