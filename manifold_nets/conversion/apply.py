"""Carrying out a conversion plan: all new values are computed first, then put in place, then checked."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from manifold_nets.constraints import attach, copy_attributes, detach, note_converted
from manifold_nets.conversion.actions import REMEDIES, ConversionPlan, Remedy
from manifold_nets.conversion.biases import remove_bias
from manifold_nets.conversion.edited import EditedPlan, edited_plan
from manifold_nets.conversion.joint import joint_sphere_of
from manifold_nets.conversion.loading import convert_when_loaded
from manifold_nets.conversion.moves import ConvertedWeight, record_moves, rescaled_along
from manifold_nets.conversion.plan import Selector, early_actions, late_actions, staged
from manifold_nets.conversion.plan import plan as make_plan
from manifold_nets.conversion.rounding import compare_in_float64
from manifold_nets.conversion.same_model import named_tensors
from manifold_nets.conversion.spheres import sphere_of
from manifold_nets.conversion.verify import Verification, both_modes, compare_outputs, eval_limit
from manifold_nets.errors import FunctionChangedError, NothingToConvertError, OptionError, UnsupportedModelError
from manifold_nets.manifold import SphereProduct
from manifold_nets.models import duplicate
from manifold_nets.symmetry import SymmetryFamily, SymmetryReport, diagnose

__all__ = ["ConversionRecord", "conversion_record", "convert"]

_RECORD = "_manifold_nets_conversion"
_DEFAULTS = {"remedies": "spheres", "radius": "unit", "include": None, "exclude": None, "train_tolerance": 1e-4}
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ConversionRecord:
    """What a conversion did: the plan that was carried out and how far the function is from what it was."""

    plan: ConversionPlan
    verification: Verification

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {"plan": self.plan.to_dict(), "verification": self.verification.to_dict()}

    def __str__(self) -> str:
        return f"{self.plan}\n  {self.verification}"


def conversion_record(model: nn.Module) -> ConversionRecord | None:
    """Return what `convert` did to this model, or None where it was not converted in this process."""
    record = model.__dict__.get(_RECORD)
    return record if isinstance(record, ConversionRecord) else None


@torch.inference_mode(False)  # gradients are needed, and tensors that can be trained
def convert(
    model: nn.Module,
    report_or_example_inputs: Any,
    *,
    remedies: str | Iterable[str] = "spheres",
    radius: Literal["unit", "keep"] = "unit",
    include: Selector = None,
    exclude: Selector = None,
    train_tolerance: float = 1e-4,
    plan: EditedPlan | None = None,
    inplace: bool = False,
) -> nn.Module:
    """Put every scale-invariant weight of a network on a product of spheres without changing what it computes.

    The weights become `geoopt.ManifoldParameter`s in their natural shape under their usual names; `state_dict` keys,
    shapes and the forward pass stay. With unit radius a filter w of norm n becomes w/n, its bias b/n, the running mean
    m/n and the running variance (v + eps)/n² − eps, which keeps evaluation mode exact; see `plan` for training mode and
    for the layers that keep their norms. The result is compared with the original in both modes; see
    `conversion_record`. Where a network magnifies rounding, as one does that uses the indices of a max-pooling, the
    comparison in evaluation mode is made between float64 copies: there the outputs must agree, and the converted values
    must be those of the copy, rounded.

    Args:
        model: the network; left as it is unless ``inplace``.
        report_or_example_inputs: what `diagnose` returned for it, or example inputs.
        remedies: what to do: a name, several, or ``"all"``, of ``"dead-biases"``, ``"balance"``, ``"spheres"`` and
            ``"joint-spheres"``; see `plan`.
        radius: ``"unit"`` or ``"keep"``.
        include: names of weights to convert; see `plan`.
        exclude: names of weights to leave; see `plan`.
        train_tolerance: largest relative change of a layer's normalized training output; see `plan`.
        plan: an edited plan, as data or as a file; the options above then have no meaning. See `edited_plan`.
        inplace: rewrite the model itself; its weights become new parameter objects, so build optimizers afterwards.

    Returns:
        The converted copy, or the model itself. A model that is converted already comes back unchanged.

    Raises:
        NothingToConvertError: no selected weight is scale-invariant.
        DegenerateGroupError: a weight to convert has a zero or non-finite filter.
        FunctionChangedError: the output in evaluation mode would change by more than rounding.
        UnsupportedModelError: ``inplace``, and the model was made in inference mode.
        PlanError: the edited plan cannot be read or carried out.
        SelectionError, OptionError, ReportMismatchError, ExampleInputsError, AnalysisError: see `plan` and `diagnose`.
        In every case the model is left as it was.

    References:
        Badrinarayanan, Mishra, Cipolla, arXiv:1511.01029.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 2))
        >>> net = convert(net, torch.randn(4, 3, 8, 8))
        >>> type(net[0].weight).__name__, net[0].weight.manifold.partition.n_groups
        ('ManifoldParameter', 8)
    """
    chosen = _chosen(
        model,
        report_or_example_inputs,
        remedies=remedies,
        radius=radius,
        include=include,
        exclude=exclude,
        train_tolerance=train_tolerance,
        edited=plan,
    )
    if not chosen.effective:
        remedies_left = [] if plan is not None else _effective_remedies(model, report_or_example_inputs)
        raise NothingToConvertError(chosen.model, [(a.name, a.reason) for a in chosen.actions], remedies_left)
    if inplace and any(tensor.is_inference() for tensor in named_tensors(model).values()):
        found = "its weights were made in inference mode, where nothing can be trained"
        remedy = "Leave inplace out, and take the copy; or make the model outside of torch.inference_mode()."
        raise UnsupportedModelError(chosen.model, found, remedy)
    before = both_modes(model, chosen.example_inputs)
    target = model if inplace else duplicate(model)
    if not inplace:
        for old, new in zip(nn.Module.parameters(model), nn.Module.parameters(target), strict=True):
            copy_attributes(old, new, share=False)
    undo = _carry_out(target, chosen)
    try:
        verification = compare_outputs(before, both_modes(target, chosen.example_inputs))
    except BaseException:
        undo()
        raise
    if not verification.eval_difference <= eval_limit(_dtype(target)):
        verification = _confirmed_in_float64(model, target, chosen, verification, undo)
    target.__dict__[_RECORD] = record = ConversionRecord(_without_inputs(chosen), verification)
    record_moves(target, chosen, math.inf if plan is not None else train_tolerance)
    convert_when_loaded(target)
    _log.info("%s", record)
    return target


def _confirmed_in_float64(
    model: nn.Module, target: nn.Module, chosen: ConversionPlan, found: Verification, undo: Callable[[], None]
) -> Verification:
    """Carry the plan out on a float64 copy; take everything back and raise where more than rounding is different."""
    values = {name: tensor.detach().clone() for name, tensor in named_tensors(target).items()}
    undo()
    wide = compare_in_float64(model, values, chosen.example_inputs, lambda twin: _carry_out(twin, chosen))
    if wide.why_not is not None:
        limit = eval_limit(_dtype(model))
        raise FunctionChangedError(chosen.model, "evaluation", found.eval_difference, limit, wide.why_not)
    _carry_out(target, chosen)
    return replace(found, float64_eval_difference=wide.difference)


def _chosen(
    model: nn.Module, report_or_example_inputs: Any, *, edited: EditedPlan | None, **options: Any
) -> ConversionPlan:
    """Make a plan, or check the one that was given."""
    if edited is None:
        return make_plan(model, report_or_example_inputs, **options)
    changed = [name for name, value in options.items() if value != _DEFAULTS[name]]
    if changed:
        raise OptionError(changed[0], options[changed[0]], "its default beside a plan, which says all")
    return edited_plan(model, report_or_example_inputs, edited)


def _effective_remedies(model: nn.Module, report_or_example_inputs: Any) -> list[Remedy]:
    """Names of the remedies that would do something beside spheres."""
    given = report_or_example_inputs
    report = given if isinstance(given, SymmetryReport) else diagnose(model, given)
    actions = early_actions(model, report, REMEDIES) + late_actions(model, report, named_tensors(model), (), REMEDIES)
    useful = {action.remedy for action in actions if action.action != "leave"}
    return [remedy for remedy in REMEDIES if remedy in useful]


def _without_inputs(chosen: ConversionPlan) -> ConversionPlan:
    """Drop what a model should not carry into its copies and pickles: inputs, and findings channel by channel."""
    return replace(
        chosen,
        actions=tuple(replace(a, finding=None, symmetry=None, shifts={}) for a in chosen.actions),
        example_inputs=None,
        rescaling=None,
    )


def _dtype(model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in nn.Module.parameters(model) if p.is_floating_point()), torch.float32)


def _carry_out(model: nn.Module, chosen: ConversionPlan) -> Callable[[], None]:
    """Rewrite the weights of a plan; return a function that takes it back."""
    state = named_tensors(model)
    before_spheres, _ = staged(state, chosen.actions, chosen.rescaling)
    manifolds, changed = _on_spheres(chosen, before_spheres)
    changed = {name: v for name, v in before_spheres.items() if v is not state[name]} | changed
    removed = {action.name for action in chosen.of("remove")}
    points = {name: changed.pop(name, state[name]).detach().to(state[name].dtype) for name in manifolds}
    changed = {name: value for name, value in changed.items() if name not in removed}
    # Nothing has been written so far; from here on nothing can fail for reasons of the values.
    saved = {name: state[name].detach().clone() for name in changed}
    with torch.no_grad():
        for name, value in changed.items():
            state[name].copy_(value)
            state[name].grad = None
    holders = {name: _holders(model, state[name]) for name in manifolds}
    originals = {name: state[name] for name in manifolds}
    for name, manifold in manifolds.items():
        norm = float(manifold.partition.norms(originals[name].detach()).median())
        _attach_everywhere(holders[name], manifold, points[name], norm)
    put_back = [remove_bias(*place) for name in removed for place in _holders(model, state[name])]

    def undo() -> None:
        with torch.no_grad():
            for name, value in saved.items():
                state[name].copy_(value)
        for name, places in holders.items():
            for module, leaf in places:
                detach(module, leaf)
                setattr(module, leaf, originals[name])
        for restore in put_back:
            restore()

    return undo


def _on_spheres(chosen: ConversionPlan, state: dict[str, Tensor]) -> tuple[dict[str, SphereProduct], dict[str, Tensor]]:
    """Return the manifolds of the weights that go on spheres, and what changes with them, in float64."""
    manifolds: dict[str, SphereProduct] = {}
    changed: dict[str, Tensor] = {}

    def current(name: str) -> Tensor:
        return changed.get(name, state[name].detach().to(torch.float64))

    for action in chosen.spheres:
        manifold, factors = sphere_of(action, state[action.name])
        manifolds[action.name] = manifold
        if action.radius == "unit":
            spread = manifold.partition.spread(factors)
            changed[action.name] = manifold.partition.multiply(current(action.name), spread)
            if action.finding is not None:
                changed.update(rescaled_along(ConvertedWeight.of(action.finding, None), factors, current))
    for action in chosen.of("joint sphere"):
        if isinstance(action.symmetry, SymmetryFamily):
            joint = joint_sphere_of(action.symmetry, state)
            manifolds.update(zip(joint.names, joint.manifolds, strict=True))
    return manifolds, changed


def _holders(model: nn.Module, parameter: Tensor) -> list[tuple[nn.Module, str]]:
    return [(m, leaf) for m in model.modules() for leaf, p in m._parameters.items() if p is parameter]


def _attach_everywhere(
    places: list[tuple[nn.Module, str]], manifold: SphereProduct, point: Tensor, norm: float
) -> None:
    """Put a weight on its manifold in every module that holds it; tied weights stay one object."""
    (first, first_leaf), *others = places
    attach(first, first_leaf, manifold, point)
    for module, leaf in others:
        attach(module, leaf, manifold)
        setattr(module, leaf, first.get_parameter(first_leaf))
    for module, leaf in places:
        note_converted(module, leaf, norm)
