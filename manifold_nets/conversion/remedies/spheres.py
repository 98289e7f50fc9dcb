"""Spheres: which weights go on spheres of their own or on joint ones, with which radius, and why not."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from manifold_nets.constraints import constrained_weights
from manifold_nets.conversion.actions import Action
from manifold_nets.conversion.moves import ScaledWeight, gather
from manifold_nets.groups import Partition, refuse_degenerate
from manifold_nets.joint_sphere import JointSphere, JointSphereMember
from manifold_nets.models import duplicate, named_tensors, random_numbers
from manifold_nets.running import split_inputs
from manifold_nets.symmetry import SymmetryFamily, SymmetryReport, WeightFinding
from manifold_nets.symmetry.report import Absorber, ScaledAlong
from manifold_nets.symmetry.seeds import joined_partition

__all__ = ["joint_actions", "joint_biases", "joint_sphere_of", "sphere_action", "statistics_behind"]


def sphere_action(
    finding: WeightFinding, state: Mapping[str, Tensor], radius: Literal["unit", "keep"], tolerance: float
) -> Action:
    """Decide whether and how a weight goes on spheres.

    Args:
        finding: the finding of `diagnose` for the weight.
        state: parameters and buffers by name, at the time when the weight goes on spheres.
        radius: the requested radius.
        tolerance: largest relative change of a layer's normalized training output.

    Raises:
        DegenerateGroupError: a group is zero or not finite.
    """
    name, partition = finding.name, finding.partition
    weight, move = state[name].detach(), ScaledWeight.of(finding, math.sqrt(finding.filters_per_group))
    if finding.status == "constrained":
        return Action(name, "already", "it is on its spheres already", partition, move=move)
    if finding.status == "no evidence" and partition is not None and not (weight.is_meta or weight.is_complex()):
        norms = partition.norms(weight).flatten()
        if not bool(norms.isfinite().all()):  # no direction, and no evidence for that reason
            refuse_degenerate(norms, name)
    if finding.status != "invariant" or partition is None:
        why = finding.broken_by or f"{finding.status}: certificate {finding.certificate}"
        return Action(name, "leave", why, move=move)
    _, factors = move.factors(partition, weight)
    why_keep: str | None = "asked for"
    deviation: float | None = None
    if radius == "unit":
        why_keep, deviation = move.why_norms_stay(weight.dtype, state, factors, tolerance)
    if why_keep is not None:
        reason = f"keeps its norms as radii: {why_keep}"
        return Action(name, "sphere", reason, partition, "keep", 0.0, move=replace(move, radius=None))
    reason = f"training-mode output of its normalization changes by {deviation:.1e} through eps"
    return Action(name, "sphere", reason, partition, "unit", deviation, move=move)


# ---- spheres across weights ------------------------------------------------------------------------------------------


def joint_actions(
    model: nn.Module, report: SymmetryReport, state: Mapping[str, Tensor], on_spheres: set[str]
) -> list[Action]:
    """Decide which shared scales of several weights go on joint spheres; nothing is changed.

    Args:
        model: the network.
        report: the report of `diagnose` for this model.
        state: parameters and buffers by name, at the time when weights go on spheres.
        on_spheres: names of the weights that go on spheres of their own.
    """
    weights = {weight.name for weight in report.weights}
    present = {w.name: isinstance(w.manifold, JointSphereMember) for w in constrained_weights(model)}
    actions: list[Action] = []
    for family in report.families:
        shared = [name for name in family.parameters if name in weights]
        if family.kind != "scale" or len(shared) < 2:
            continue
        spheres = f"{family.count} spheres, each across" if family.count > 1 else "one sphere across"
        action = Action(
            f"joint sphere {len(actions) + 1}",
            "joint sphere",
            f"{spheres} {len(shared)} weights, whose joint norms are the radii",
            remedy="joint-spheres",
            members=tuple(str(member) for member in family.members if member.parameter in weights),
            move=family,
        )
        if all(present.get(weight, False) for weight in shared):
            action = replace(action, action="already", reason="they are on it already")
        elif why := _why_left(family, shared, state, on_spheres | present.keys()):
            action = action.left(why)
        actions.append(action)
    return actions


def joint_sphere_of(family: SymmetryFamily, state: Mapping[str, Tensor]) -> JointSphere:
    """Return the joint sphere of the weights of a family; its radii are their joint norms.

    Raises:
        DegenerateGroupError: a joint group is zero or not finite.
    """
    partitions = _partitions(family, [name for name in family.parameters if state[name].ndim >= 2])
    if isinstance(partitions, str):
        raise ValueError(f"{family}: {partitions}")
    points = [state[name].detach() for name in partitions]
    unit = JointSphere(partitions)
    unit.refuse_degenerate(points)
    return JointSphere(partitions, unit.norms(points))


def joint_biases(family: SymmetryFamily, first: str) -> tuple[ScaledAlong, ...]:
    """The biases that scale with the weights of a joint sphere, with the group of each entry.

    Args:
        family: the scale that the weights share.
        first: the weight whose group numbers are used.
    """
    partition = _partitions(family, [first])
    lead = next(part for part in family.generators.parts if part.parameter == first)
    if isinstance(partition, str):
        return ()
    number_of = dict(zip(lead.groups.tolist(), lead.numbers.tolist(), strict=True))
    seeds, groups = lead.partition.group_ids().flatten().tolist(), partition[first].group_ids().flatten().tolist()
    group_of = {number_of[seed]: group for seed, group in zip(seeds, groups, strict=True)}
    found = []
    for part in family.generators.parts:
        if len(part.partition.shape) == 1 and (part.coefficients == lead.coefficients[0]).all():
            entries = [-1] * part.partition.shape[0]
            for entry, number in zip(part.groups.tolist(), part.numbers.tolist(), strict=True):
                entries[entry] = group_of[number]
            found.append(ScaledAlong(part.parameter, tuple(entries)))
    return tuple(found)


def _scale(
    tensors: Mapping[str, Tensor], partitions: Mapping[str, Partition], move: ScaledWeight, factors: Tensor
) -> None:
    """Multiply the groups of the weights of a joint sphere, and the biases of their scale."""
    for name, partition in partitions.items():
        spread = partition.spread(factors.to(tensors[name].device))
        tensors[name].copy_(partition.multiply(tensors[name].double(), spread))
    for bias in move.biases:
        tensor = tensors[bias.name]
        tensor.mul_(gather(factors.to(tensor.device), bias.groups).reshape(tensor.shape))


def _fresh_norms(model: nn.Module) -> dict[str, _NormBase]:
    """The normalizations with running statistics, made to keep those of the next batch alone."""
    norms = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _NormBase) and module.running_var is not None
    }
    for norm in norms.values():
        norm.momentum = 1.0
        if norm.num_batches_tracked is not None:
            norm.num_batches_tracked.zero_()
    return norms


@torch.no_grad()
def statistics_behind(
    model: nn.Module, move: ScaledWeight, members: Sequence[str], inputs: Any
) -> tuple[Absorber, ...]:
    """Measure which batch normalizations' running statistics depend on the scale of a joint sphere.

    Each group gets a different factor, and the batch variance shows which group scales which channel. Channels whose
    variance fits no group get −2.

    Args:
        model: the converted model; not changed.
        move: the first weight of the sphere with its biases.
        members: the names of the weights of the sphere.
        inputs: example inputs.
    """
    args, kwargs = split_inputs(inputs)
    manifolds = {weight.name: weight.manifold for weight in constrained_weights(model)}
    n_groups = manifolds[move.name].partition.n_groups
    factors = torch.linspace(1.5, 3.0, n_groups, dtype=torch.float64)
    found = []
    for is_scaled in (False, True):
        copied = duplicate(model).train()
        if is_scaled:
            _scale(named_tensors(copied), {name: manifolds[name].partition for name in members}, move, factors)
        norms = _fresh_norms(copied)
        if not norms:
            return ()
        with random_numbers(0):
            copied(*args, **kwargs)
        found.append(norms)
    absorbers = []
    for name, norm in found[0].items():
        before, after = (torch.as_tensor(each[name].running_var).double().cpu() for each in found)
        ratio = torch.where(before == after, 1.0, after / before).sqrt()
        nearest = (ratio[:, None] / factors - 1).abs().min(1)
        fits = (nearest.values < 0.1 / n_groups) & (
            norm.num_batches_tracked is not None and int(norm.num_batches_tracked) == 1
        )
        groups = torch.where((ratio - 1).abs() < 0.01, -1, torch.where(fits, nearest.indices, -2))
        if bool((groups != -1).any()):
            mean, var = f"{name}.running_mean", f"{name}.running_var"
            of_channels = tuple(groups.tolist())
            # It is not known whether biases have an effect elsewhere, as they have none in front of a "batch".
            absorbers.append(
                Absorber("batch_norm", name, "buffer", norm.eps, running_mean=mean, running_var=var, groups=of_channels)
            )
    return tuple(absorbers)


def _why_left(
    family: SymmetryFamily, shared: Sequence[str], state: Mapping[str, Tensor], taken: set[str]
) -> str | None:
    """Why the weights of a family cannot go on one sphere per group, or None."""
    if family.certificate.verdict != "invariant":
        return f"certificate {family.certificate}"
    on_others = [name for name in shared if name in taken]
    if on_others:
        return f"{on_others[0]} is on spheres"
    if len({(state[name].dtype, state[name].device) for name in shared}) > 1:
        return "its weights differ in dtype or device"
    exponents = {member.exponent for member in family.members if member.parameter in shared}
    if len(exponents) > 1 or None in exponents:
        return "its weights are scaled by different powers, so they do not lie on a common sphere"
    partitions = _partitions(family, shared)
    return partitions if isinstance(partitions, str) else None


def _partitions(family: SymmetryFamily, shared: Sequence[str]) -> dict[str, Partition] | str:
    """The groups of each weight, one for each symmetry of the family in the same order, or why there are none."""
    found: dict[str, Partition] = {}
    first: list[int] | None = None
    for name in shared:
        parts = [part for part in family.generators.parts if part.parameter == name]
        if len(parts) > 1:
            return f"it moves rows and columns of {name} at once"
        seed, what = parts[0].partition, next(member.part for member in family.members if member.parameter == name)
        number = np.full(seed.n_groups, -1)
        number[parts[0].groups] = parts[0].numbers
        if len(parts[0].groups) != seed.n_groups or (number < 0).any():
            return f"only some of the {what} of {name} belong to it"
        classes = [(number == each).nonzero()[0].tolist() for each in range(family.count)]
        partition = joined_partition(seed, classes) if len(classes) > 1 else Partition.whole(seed.shape)
        if partition.n_groups != len(classes):
            return f"no view of {name} has its groups"
        # For each group the number of the symmetry that moves it.
        of_class = dict(zip(*(p.group_ids().flatten().tolist() for p in (partition, seed)), strict=True))
        order = [int(number[of_class[group]]) for group in range(partition.n_groups)]
        first = order if first is None else first
        if order != first:
            return f"the groups of {name} are in another order than those of {shared[0]}"
        found[name] = partition
    return found
