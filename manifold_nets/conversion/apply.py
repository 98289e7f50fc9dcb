"""Apply a conversion plan: compute all new values, put them in place, and check the result."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from manifold_nets.constraints import attach, constrained_weights, everywhere, note_converted
from manifold_nets.conversion.actions import REMEDIES, ConversionPlan
from manifold_nets.conversion.moves import MOVES, Moves, RemovedBias, ScaledWeight, Values, moves_of
from manifold_nets.conversion.plan import EditedPlan, Selector, early_actions, edited_plan, plan_of, staged
from manifold_nets.conversion.plan import plan as make_plan
from manifold_nets.conversion.projection import convert_when_loaded
from manifold_nets.conversion.remedies.balance import smallest_norm
from manifold_nets.conversion.remedies.dead_biases import remove_bias
from manifold_nets.conversion.remedies.spheres import joint_actions, joint_biases, joint_sphere_of, statistics_behind
from manifold_nets.conversion.revert import CONVERSION_RECORD, copy_of
from manifold_nets.conversion.verify import (
    Verification,
    both_modes,
    compare_in_float64,
    compare_outputs,
    eval_limit,
    report_of,
)
from manifold_nets.errors import FunctionChangedError, NothingToConvertError, OptionError, UnsupportedModelError, listed
from manifold_nets.manifold import SphereProduct
from manifold_nets.models import dtype_of, holders, named_tensors
from manifold_nets.page import fragment
from manifold_nets.symmetry import SymmetryFamily

__all__ = ["BalanceRecord", "ConversionRecord", "balance", "conversion_record", "convert"]

_DEFAULTS = {"remedies": "spheres", "radius": "unit", "include": None, "exclude": None, "train_tolerance": 1e-4}
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ConversionRecord:
    """What a conversion did: the plan that was applied, and how much the outputs changed."""

    plan: ConversionPlan
    verification: Verification

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {"plan": self.plan.to_dict(), "verification": self.verification.to_dict()}

    def _repr_html_(self) -> str:
        """HTML for a notebook: how much the outputs changed, and a row for each action."""
        rows = [(a.name, a.action, a.partition or "", a.radius or "", a.reason) for a in self.plan.effective]
        return fragment(self.plan.model, str(self.verification), ("Weight", "Action", "Groups", "Radius", "Why"), rows)

    def __str__(self) -> str:
        return f"{self.plan}\n  {self.verification}"


def conversion_record(model: nn.Module) -> ConversionRecord | None:
    """Return the record of the conversion of this model, or None if it was not converted in this process.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
        >>> record = conversion_record(convert(net, torch.randn(16, 4)))
        >>> [(action.name, action.action) for action in record.plan.actions]
        [('0.weight', 'sphere'), ('2.weight', 'leave')]
        >>> record.verification.eval_difference < 1e-5, conversion_record(net) is None
        (True, True)
    """
    record = model.__dict__.get(CONVERSION_RECORD)
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
    """Put every scale-invariant weight of a network on a product of spheres without changing its function.

    The weights become `geoopt.ManifoldParameter`s with the same names and shapes; the `state_dict` keys, their shapes
    and the forward pass stay the same. With unit radius a filter w of norm n becomes w/n, its bias b/n, the running
    mean m/n and the running variance (v + eps)/n² − eps, which is exact in evaluation mode; see `plan` for training
    mode and for the layers that keep their norms. The outputs of the result are compared with the original's in both
    modes; see `conversion_record`. In networks that magnify rounding, such as those that use the indices of a
    max-pooling, float64 copies are compared instead in evaluation mode: their outputs must agree, and the converted
    values must equal those of the float64 copy up to rounding.

    Args:
        model: the network; not changed unless ``inplace``.
        report_or_example_inputs: the report of `diagnose` for this model, or example inputs.
        remedies: one or more of ``"dead-biases"``, ``"balance"``, ``"spheres"`` and ``"joint-spheres"``, or ``"all"``;
            see `plan`.
        radius: ``"unit"`` or ``"keep"``.
        include: names of weights to convert; see `plan`.
        exclude: names of weights to leave; see `plan`.
        train_tolerance: largest relative change of a layer's normalized output in training mode; see `plan`.
        plan: an edited plan, as data or as a file, in place of the options above. See `edited_plan`.
        inplace: convert the model itself. Its weights become new parameter objects, so build optimizers afterwards.

    Returns:
        The converted copy, or the model itself if ``inplace``. A model that is already converted is returned unchanged.

    Raises:
        NothingToConvertError: no selected weight is scale-invariant.
        DegenerateGroupError: a weight to convert has a zero or non-finite filter.
        FunctionChangedError: the output in evaluation mode would change by more than rounding.
        UnsupportedModelError: ``inplace``, and the model was made in inference mode.
        PlanError: the edited plan cannot be read or applied.
        OptionError, ReportMismatchError, ExampleInputsError, AnalysisError: see `plan` and `diagnose`.
        In every case the model is unchanged.

    References:
        Badrinarayanan, Mishra, Cipolla, arXiv:1511.01029.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 2))
        >>> net = convert(net, torch.randn(4, 3, 8, 8))
        >>> type(net[0].weight).__name__, net[0].weight.manifold.partition.n_groups
        ('ManifoldParameter', 8)
    """
    options = {
        "remedies": remedies,
        "radius": radius,
        "include": include,
        "exclude": exclude,
        "train_tolerance": train_tolerance,
    }
    chosen = _chosen(model, report_or_example_inputs, plan, options)
    if not chosen.effective:
        raise _nothing_to_convert(
            chosen, [] if plan is not None else _effective_remedies(model, report_or_example_inputs)
        )
    if inplace and any(tensor.is_inference() for tensor in named_tensors(model).values()):
        found = "weights made in inference mode, which cannot be trained"
        remedy = "Leave inplace out to get a converted copy, or make the model outside of torch.inference_mode()."
        raise UnsupportedModelError(chosen.model, found, remedy)
    target, verification = _rewritten(model, chosen, inplace=inplace)
    record = ConversionRecord(chosen.without_data(), verification)
    target.__dict__[CONVERSION_RECORD] = record
    tolerance = math.inf if plan is not None else train_tolerance
    target.__dict__[MOVES] = _moves_after(target, chosen, tolerance)
    convert_when_loaded(target)
    _log.info("%s", record)
    return target


def _chosen(model: nn.Module, given: Any, edited: EditedPlan | None, options: dict[str, Any]) -> ConversionPlan:
    """Make a plan, or check the given one."""
    if edited is None:
        return make_plan(model, given, **options)
    changed = [name for name, value in options.items() if value != _DEFAULTS[name]]
    if changed:
        raise OptionError(changed[0], options[changed[0]], "no value, as the plan already determines it")
    return edited_plan(model, given, edited)


def _effective_remedies(model: nn.Module, report_or_example_inputs: Any) -> list[str]:
    """Names of the remedies other than spheres that would change something."""
    report = report_of(model, report_or_example_inputs)
    actions = early_actions(model, report, REMEDIES) + joint_actions(model, report, named_tensors(model), set())
    useful = {action.remedy for action in actions if action.action != "leave"}
    return [remedy for remedy in REMEDIES if remedy in useful]


def _nothing_to_convert(chosen: ConversionPlan, remedies: list[str]) -> NothingToConvertError:
    left = listed((f"{action.name} ({action.reason})" for action in chosen.actions), 12) or "no weights"
    also = f"pass remedies={','.join(remedies)!r} (--remedies on the command line) to use its other symmetries, or "
    return NothingToConvertError(
        f"{chosen.model}: nothing to convert, because no selected weight is scale-invariant. Left: {left}. "
        f"Scale-invariant weights need a normalization behind them; {also if remedies else ''}train this model as it "
        "is."
    )


def _moves_after(target: nn.Module, chosen: ConversionPlan, tolerance: float) -> Moves:
    """What a plan did to a model, on top of earlier conversions."""
    before = moves_of(target) or Moves()
    moves = Moves(dict(before.weights), dict(before.biases), tolerance)
    on_spheres = {weight.name for weight in constrained_weights(target)}
    removed = {action.name for action in chosen.of("remove")} | before.biases.keys()
    for action in chosen.effective:
        if action.action == "sphere" and isinstance(action.move, ScaledWeight):
            moves.weights[action.name] = action.move.without_data()
        elif action.action == "joint sphere":
            moves.weights.update((name, ScaledWeight(name)) for name in action.parameters)
            if isinstance(action.move, SymmetryFamily):
                parts = action.move.generators.parts
                first = next(part.parameter for part in parts if len(part.partition.shape) > 1)
                move = ScaledWeight(first, biases=joint_biases(action.move, first)).without(removed)
                shared = [name for name in action.parameters if name in on_spheres]
                absorbers = statistics_behind(target, move, shared, chosen.example_inputs)
                moves.weights[first] = replace(move, absorbers=absorbers)
        elif action.action == "remove" and isinstance(action.move, RemovedBias):
            moves.biases[action.name] = replace(action.move, means=dict.fromkeys(action.move.means, ()))
    return moves


def _rewritten(model: nn.Module, chosen: ConversionPlan, *, inplace: bool) -> tuple[nn.Module, Verification]:
    """Apply a plan to a copy, and to the model itself if the function stays the same up to rounding."""
    inputs, trial = chosen.example_inputs, copy_of(model)
    before = both_modes(model, inputs)
    _carry_out(trial, chosen)
    found, limit = compare_outputs(before, both_modes(trial, inputs)), eval_limit(dtype_of(trial))
    if not found.eval_difference <= limit:
        carry_out = functools.partial(_carry_out, chosen=chosen)
        difference, why = compare_in_float64(model, named_tensors(trial), inputs, carry_out)
        if why is not None:
            remedy = (
                f"Rounding does not explain this: {why}. Nothing was changed. Use radius='keep', or exclude the layers."
            )
            raise FunctionChangedError(chosen.model, "evaluation", found.eval_difference, limit, remedy)
        found = replace(found, float64_eval_difference=difference)
    if not inplace:
        return trial, found
    _carry_out(model, chosen)
    return model, found


def _carry_out(model: nn.Module, chosen: ConversionPlan) -> None:
    """Rewrite the weights of a plan."""
    state = named_tensors(model)
    staged_state, _ = staged(state, chosen.actions, chosen.rescaling)
    manifolds, values = _on_spheres(chosen, staged_state)
    changed = {name: value for name, value in staged_state.items() if value is not state[name]} | values
    points = {name: changed.pop(name, state[name]).detach().to(state[name].dtype) for name in manifolds}
    removed = [action.name for action in chosen.of("remove")]
    held = holders(model)
    # Nothing has been written so far; from here on, values cannot cause a failure.
    with torch.no_grad():
        for name in changed.keys() - set(removed):
            state[name].copy_(changed[name])
            state[name].grad = None
    for name, manifold in manifolds.items():
        norm = float(manifold.partition.norms(state[name].detach()).median())
        everywhere(held[id(state[name])], functools.partial(_put, manifold=manifold, point=points[name], norm=norm))
    for name in removed:
        for place in held[id(state[name])]:
            remove_bias(*place)


def _put(module: nn.Module, leaf: str, manifold: SphereProduct, point: Tensor, norm: float) -> None:
    attach(module, leaf, manifold, point)
    note_converted(module, leaf, norm)


def _on_spheres(chosen: ConversionPlan, state: dict[str, Tensor]) -> tuple[dict[str, SphereProduct], Values]:
    """Return the manifolds of the weights that go on spheres, and the float64 values that change with them."""
    manifolds: dict[str, SphereProduct] = {}
    values = Values(state)
    for action in chosen.effective:
        if action.action == "sphere" and isinstance(action.move, ScaledWeight) and action.partition is not None:
            manifolds[action.name] = action.move.onto_spheres(action.partition, values)
        elif action.action == "joint sphere" and isinstance(action.move, SymmetryFamily):
            joint = joint_sphere_of(action.move, state)
            manifolds.update(zip(joint.names, joint.manifolds, strict=True))
    return manifolds, values


# ---- balancing alone -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BalanceRecord:
    """What `balance` did.

    Args:
        balanced: one line for each balanced family.
        left: one line for each family of rescalings that was left, with the reason.
        norm_before: Euclidean norm of all rescaled parameters, before.
        norm_after: the same norm after balancing.
        sweeps: number of sweeps over all symmetries.
        converged: whether the smallest norm was reached. If not, the function is still unchanged.
        imbalance: at the minimum, the growing and the shrinking parts of a symmetry have equal weight; this is the
            largest difference of the two over their sum, at most 1e-9 if converged.
        verification: how much the outputs changed.
    """

    balanced: tuple[str, ...]
    left: tuple[str, ...]
    norm_before: float
    norm_after: float
    sweeps: int
    converged: bool
    imbalance: float
    verification: Verification

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {**vars(self), "verification": self.verification.to_dict()}


def balance(
    model: nn.Module, report_or_example_inputs: Any, *, inplace: bool = False
) -> tuple[nn.Module, BalanceRecord]:
    """Rescale a network to the smallest norm that its rescaling symmetries allow, without changing its function.

    Only rescalings without any running statistics are applied, so that the function stays the same in both modes up to
    rounding. Families with a weight on spheres are left: balance first, then convert.

    At the smallest norm, the parts that grow and the parts that shrink with a symmetry have equal weight:
    ``Σ_{c > 0} c ‖w_i‖² = Σ_{c < 0} |c| ‖w_i‖²`` over the parts i that are multiplied by ``α^c``. The descent ends when
    the two differ by at most 1e-9 of their sum, or after 100 sweeps; then ``converged`` is false and a warning is
    logged.

    Args:
        model: the network; not changed unless ``inplace``.
        report_or_example_inputs: the report of `diagnose` for this model, or example inputs.
        inplace: change the values of the model itself.

    Returns:
        The balanced copy, or the model itself if ``inplace``, and a record of what was done.

    Raises:
        ReportMismatchError: the report belongs to another model.
        FunctionChangedError: the outputs would change by more than rounding; nothing was changed.

    References:
        Sinkhorn-like balancing of rescaling orbits: Stock, Graham, Gribonval, Jégou, *Equi-normalization of neural
        networks*, ICLR 2019, arXiv:1902.10416.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> with torch.no_grad():
        ...     _ = net[0].weight.mul_(100)
        >>> balanced, record = balance(net, torch.randn(8, 4))
        >>> record.norm_after < record.norm_before
        True
    """
    report = report_of(model, report_or_example_inputs)
    chosen = plan_of(model, report, early_actions(model, report, ["balance"]), lambda state: [])
    target, verification = _rewritten(model, chosen, inplace=inplace)
    descent = (chosen.rescaling or smallest_norm((), {})).descent
    return target, BalanceRecord(
        balanced=tuple(str(action.move) for action in chosen.of("balance")),
        left=tuple(f"{action.move}: {action.reason}" for action in chosen.of("leave")),
        norm_before=math.sqrt(descent.energies[0]),
        norm_after=math.sqrt(descent.energies[1]),
        sweeps=descent.sweeps,
        converged=descent.converged,
        imbalance=descent.imbalance,
        verification=verification,
    )
