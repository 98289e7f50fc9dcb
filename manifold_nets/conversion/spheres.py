"""Spheres for the weights whose scale has no meaning: which groups, which radius, and why."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from manifold_nets.conversion.actions import Action
from manifold_nets.conversion.algebra import cancellation, gather, train_mode_deviation
from manifold_nets.errors import OptionError
from manifold_nets.groups import Partition, refuse_degenerate
from manifold_nets.manifold import SphereProduct
from manifold_nets.symmetry import Absorber, WeightFinding

__all__ = ["sphere_action", "sphere_of", "why_norms_stay"]

# A running variance whose rounding is magnified by more than this is not exact in evaluation mode any more.
LARGEST_CANCELLATION = 8.0


def sphere_action(
    finding: WeightFinding, state: dict[str, Tensor], radius: Literal["unit", "keep"], tolerance: float
) -> Action:
    """Decide how a weight goes on spheres, if it does.

    Args:
        finding: what `diagnose` says of the weight.
        state: parameters and buffers by name, as they are when the weight goes on spheres.
        radius: which radius is asked for.
        tolerance: largest relative change of a layer's normalized training output.
    """
    if finding.status == "constrained":
        return Action(finding.name, "already", "it is on its spheres", finding.partition, finding=finding)
    if finding.status == "no evidence" and finding.partition is not None:
        _refuse_not_finite(finding.name, finding.partition, state[finding.name])
    if finding.status != "invariant":
        why = finding.broken_by or f"{finding.status}: certificate {finding.certificate}"
        return Action(finding.name, "leave", why, finding=finding)
    return _invariant(finding, state, radius, tolerance)


def _refuse_not_finite(name: str, partition: Partition, weight: Tensor) -> None:
    """Raise where groups have no direction, and the certificate no evidence for that reason."""
    if weight.is_meta or weight.is_complex():
        return
    norms = partition.norms(weight.detach()).flatten()
    if not bool(norms.isfinite().all()):
        refuse_degenerate(norms, name)


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


def _invariant(
    finding: WeightFinding, state: dict[str, Tensor], radius: Literal["unit", "keep"], tolerance: float
) -> Action:
    weight = state[finding.name]
    partition = finding.partition
    unit = Action(finding.name, "sphere", "", partition, "unit", finding=finding)
    _, factors = sphere_of(unit, weight)
    why_keep: str | None = "asked for"
    deviation: float | None = None
    if radius == "unit":
        why_keep, deviation = why_norms_stay(finding.absorbers, weight.dtype, state, factors, tolerance)
    if why_keep is not None:
        reason = f"keeps its norms as radii: {why_keep}"
        return Action(finding.name, "sphere", reason, partition, "keep", 0.0, finding)
    reason = f"training-mode output of its normalization changes by {deviation:.1e} through eps"
    return Action(finding.name, "sphere", reason, partition, "unit", deviation, finding)


def why_norms_stay(
    absorbers: Sequence[Absorber], dtype: torch.dtype, state: Mapping[str, Tensor], factors: Tensor, tolerance: float
) -> tuple[str | None, float | None]:
    """Return why a weight cannot be rescaled to unit radius, or None, and what that changes in training mode.

    Args:
        absorbers: the normalizations behind the weight.
        dtype: that of the weight.
        state: parameters and buffers by name.
        factors: the factor of each group.
        tolerance: largest relative change of a layer's normalized training output.
    """
    why = _obstacle(absorbers, dtype, state, factors)
    if why is not None:
        return why, None
    deviation = max((_deviation(a, state, factors) for a in absorbers), default=0.0)
    if not deviation <= tolerance:
        why = (
            f"unit radius would change its training-mode output by {deviation:.1e} through eps, more than "
            f"train_tolerance={tolerance:g}"
        )
    return why, deviation


def _obstacle(
    absorbers: Sequence[Absorber], dtype: torch.dtype, state: Mapping[str, Tensor], factors: Tensor
) -> str | None:
    """Why the rescaling to unit radius could not be exact in evaluation mode, or None."""
    if dtype in (torch.float16, torch.bfloat16):
        return "rescaling half-precision weights would round every entry"
    for absorber in absorbers:
        if absorber.kind != "batch" or absorber.running_var is None or absorber.running_mean is None:
            return f"{absorber} has no running statistics that could take up its eps"
        if -2 in absorber.groups:
            return f"{absorber} absorbs a product of scales"
        if len(absorber.variances) != len(absorber.groups):
            return f"the batch variances in front of {absorber} are not known"
        same = [a for a in absorbers if a.running_var == absorber.running_var]
        if any(a.groups != absorber.groups for a in same) or len(same) != absorber.calls:
            return f"the running statistics of {absorber} are shared with another tensor"
        factor = gather(factors, absorber.groups)
        if cancellation(state[absorber.running_var].double(), absorber.eps or 0.0, factor) > LARGEST_CANCELLATION:
            return f"running variances of {absorber} are too small against its eps"
    return None


def _deviation(absorber: Absorber, state: Mapping[str, Tensor], factors: Tensor) -> float:
    """Relative change of the training-mode output over the channels that this weight scales."""
    factor = gather(factors, absorber.groups)
    reached = torch.tensor(absorber.groups, device=factor.device) >= 0
    variance = torch.tensor(absorber.variances, dtype=torch.float64, device=factor.device)
    scale = state[absorber.weight].detach().double() if absorber.weight else torch.ones_like(variance)
    shift = state[absorber.bias].detach().double() if absorber.bias else torch.zeros_like(variance)
    kept = [values[reached] for values in (variance, scale, shift, factor)]
    return train_mode_deviation(kept[0], absorber.eps or 0.0, kept[1], kept[2], kept[3])
