"""The plan of a conversion: for every weight an action, or why it is left; data, made before anything changes."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from manifold_nets.conversion.algebra import cancellation, gather, train_mode_deviation
from manifold_nets.errors import OptionError, ReportMismatchError, SelectionError
from manifold_nets.groups import Partition
from manifold_nets.manifold import SphereProduct
from manifold_nets.symmetry import Absorber, SymmetryReport, WeightFinding, diagnose

__all__ = ["Action", "ConversionPlan", "Selector", "plan"]

Selector = str | Sequence[str] | Callable[[str], bool] | None
# A running variance whose rounding is magnified by more than this is not exact in evaluation mode any more.
LARGEST_CANCELLATION = 8.0


@dataclass(frozen=True)
class Action:
    """What is done with one weight.

    Args:
        name: the parameter.
        action: ``"sphere"`` (it is put on a product of spheres), ``"already"`` (it is on one) or ``"leave"``.
        reason: why, in words.
        partition: the groups, where there are any.
        radius: ``"unit"``: each group gets norm √k, k filters in it; ``"keep"``: each group keeps its norm.
        train_deviation: relative change of the training-mode output of the layer's normalization on the example
            inputs that unit radius causes; None where it was not computed, 0 where nothing changes.
        finding: what `diagnose` says of the weight.
    """

    name: str
    action: Literal["sphere", "already", "leave"]
    reason: str
    partition: Partition | None = None
    radius: Literal["unit", "keep"] | None = None
    train_deviation: float | None = None
    finding: WeightFinding | None = field(default=None, repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {
            "name": self.name,
            "action": self.action,
            "reason": self.reason,
            "partition": None if self.partition is None else self.partition.to_dict(),
            "radius": self.radius,
            "train_deviation": self.train_deviation,
        }


@dataclass(frozen=True)
class ConversionPlan:
    """One action for every weight of the report, in the order of the model."""

    model: str
    actions: tuple[Action, ...]
    example_inputs: Any = field(default=None, repr=False, compare=False)

    @property
    def spheres(self) -> tuple[Action, ...]:
        """The actions that put a weight on spheres."""
        return tuple(action for action in self.actions if action.action == "sphere")

    def __getitem__(self, name: str) -> Action:
        for action in self.actions:
            if action.name == name:
                return action
        raise KeyError(name)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {"model": self.model, "actions": [action.to_dict() for action in self.actions]}

    def __str__(self) -> str:
        width = max((len(a.name) for a in self.actions), default=0)
        lines = [f"{self.model}: {len(self.spheres)} of {len(self.actions)} weights go on spheres"]
        for a in self.actions:
            what = f"{a.partition}, {a.radius} radius: " if a.action == "sphere" else ""
            lines.append(f"  {a.name:<{width}}  {a.action:<7}  {what}{a.reason}")
        return "\n".join(lines)


def plan(
    model: nn.Module,
    report_or_example_inputs: Any,
    *,
    radius: Literal["unit", "keep"] = "unit",
    include: Selector = None,
    exclude: Selector = None,
    train_tolerance: float = 1e-4,
) -> ConversionPlan:
    """Decide for every weight whether and how it is put on a product of spheres; nothing is changed.

    With ``radius="unit"`` a group of k filters gets norm √k, so that the mean square filter norm is 1. That is exact in
    evaluation mode, where the running statistics take up the eps of the normalization, but in training mode eps weighs
    differently after the rescaling. Where this changes the output of a layer's normalization by more than
    ``train_tolerance``, where there are no running statistics, or where they cannot be rescaled exactly, the groups
    keep their norms as radii; nothing is lost, since the metric of `SphereProduct` does not depend on the radius.

    Args:
        model: the network.
        report_or_example_inputs: what `diagnose` returned for it, or example inputs to diagnose it with.
        radius: ``"unit"`` or ``"keep"`` for all weights.
        include: names to convert: a pattern (``"layer1.*"``), several, or a predicate on the name (default: all).
        exclude: names to leave, likewise.
        train_tolerance: largest relative change of a layer's normalized training output.

    Raises:
        SelectionError: ``include`` or ``exclude`` matches no weight.
        OptionError: ``radius`` or ``train_tolerance`` has no meaning.
        ReportMismatchError: the report is of another model.
    """
    if radius not in ("unit", "keep"):
        raise OptionError("radius", radius, "'unit' or 'keep'")
    if not train_tolerance >= 0:
        raise OptionError("train_tolerance", train_tolerance, "a number ≥ 0")
    given = report_or_example_inputs
    report = given if isinstance(given, SymmetryReport) else diagnose(model, given)
    _require_same_model(model, report)
    wanted = _selected(report, include, "include", default=True)
    unwanted = _selected(report, exclude, "exclude", default=False)
    state = named_tensors(model)
    actions = []
    for finding in report.weights:
        if finding.status == "constrained":
            action = Action(finding.name, "already", "it is on its spheres", finding.partition, finding=finding)
        elif finding.status != "invariant":
            action = Action(finding.name, "leave", _why_left(finding), finding=finding)
        elif finding.name not in wanted or finding.name in unwanted:
            action = Action(finding.name, "leave", "not selected", finding.partition, finding=finding)
        else:
            action = _sphere_action(finding, state, radius, train_tolerance)
        actions.append(action)
    return ConversionPlan(report.model, tuple(actions), report.example_inputs)


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers of a model under all their names."""
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def sphere_of(action: Action, weight: Tensor) -> tuple[SphereProduct, Tensor]:
    """Return the manifold of a planned weight and the factor of each group, float64.

    Raises:
        DegenerateGroupError: a group is zero or not finite.
    """
    partition = action.partition
    if partition is None or action.finding is None:
        raise OptionError("action", action.action, "an action with a partition")
    norms = partition.norms(weight.detach().to(torch.float64)).flatten()
    SphereProduct(partition).refuse_degenerate(weight.detach(), action.name)
    if action.radius == "keep":
        return SphereProduct(partition, radius=norms), torch.ones_like(norms)
    radius = math.sqrt(action.finding.filters_per_group)
    return SphereProduct(partition, radius=radius), radius / norms


def _why_left(finding: WeightFinding) -> str:
    if finding.broken_by:
        return finding.broken_by
    return f"{finding.status}: certificate {finding.certificate}"


def _require_same_model(model: nn.Module, report: SymmetryReport) -> None:
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters() if p.ndim >= 2}
    reported = {w.name: w.shape for w in report.weights}
    if shapes != reported:
        different = [name for name in {**shapes, **reported} if shapes.get(name) != reported.get(name)]
        raise ReportMismatchError(type(model).__name__, report.model, different)


def _selected(report: SymmetryReport, selector: Selector, option: str, *, default: bool) -> set[str]:
    names = [w.name for w in report.weights]
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


def _sphere_action(
    finding: WeightFinding, state: dict[str, Tensor], radius: Literal["unit", "keep"], tolerance: float
) -> Action:
    weight = state[finding.name]
    partition = finding.partition
    unit = Action(finding.name, "sphere", "", partition, "unit", finding=finding)
    _, factors = sphere_of(unit, weight)
    why_keep = "asked for" if radius == "keep" else _obstacle(finding, weight, state, factors)
    deviation = None
    if why_keep is None:
        deviation = max((_deviation(a, state, factors) for a in finding.absorbers), default=0.0)
        if not deviation <= tolerance:
            why_keep = (
                f"unit radius would change its training-mode output by {deviation:.1e} through eps, more than "
                f"train_tolerance={tolerance:g}"
            )
    if why_keep is not None:
        reason = f"keeps its norms as radii: {why_keep}"
        return Action(finding.name, "sphere", reason, partition, "keep", 0.0, finding)
    reason = f"training-mode output of its normalization changes by {deviation:.1e} through eps"
    return Action(finding.name, "sphere", reason, partition, "unit", deviation, finding)


def _obstacle(finding: WeightFinding, weight: Tensor, state: dict[str, Tensor], factors: Tensor) -> str | None:
    """Why the rescaling to unit radius could not be exact in evaluation mode, or None."""
    if weight.dtype in (torch.float16, torch.bfloat16):
        return "rescaling half-precision weights would round every entry"
    for absorber in finding.absorbers:
        if absorber.kind != "batch" or absorber.running_var is None or absorber.running_mean is None:
            return f"{absorber} has no running statistics that could take up its eps"
        if -2 in absorber.groups:
            return f"{absorber} absorbs a product of scales"
        if len(absorber.variances) != len(absorber.groups):
            return f"the batch variances in front of {absorber} are not known"
        same = [a for a in finding.absorbers if a.running_var == absorber.running_var]
        if any(a.groups != absorber.groups for a in same) or len(same) != absorber.calls:
            return f"the running statistics of {absorber} are shared with another tensor"
        factor = gather(factors, absorber.groups)
        if cancellation(state[absorber.running_var].double(), absorber.eps or 0.0, factor) > LARGEST_CANCELLATION:
            return f"running variances of {absorber} are too small against its eps"
    return None


def _deviation(absorber: Absorber, state: dict[str, Tensor], factors: Tensor) -> float:
    """Relative change of the training-mode output over the channels that this weight scales."""
    factor = gather(factors, absorber.groups)
    reached = torch.tensor(absorber.groups, device=factor.device) >= 0
    variance = torch.tensor(absorber.variances, dtype=torch.float64, device=factor.device)
    scale = state[absorber.weight].detach().double() if absorber.weight else torch.ones_like(variance)
    shift = state[absorber.bias].detach().double() if absorber.bias else torch.zeros_like(variance)
    kept = [values[reached] for values in (variance, scale, shift, factor)]
    return train_mode_deviation(kept[0], absorber.eps or 0.0, kept[1], kept[2], kept[3])
