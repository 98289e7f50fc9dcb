"""Reading the Euler certificate of one weight: which groups of a partition it calls invariant."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from manifold_nets.errors import LossError
from manifold_nets.errors.base import listed
from manifold_nets.float64 import following
from manifold_nets.groups import Partition
from manifold_nets.models import groups_not_finite
from manifold_nets.running import Inputs, called
from manifold_nets.symmetry.gradients import EVIDENCE_FLOOR, GradientPass
from manifold_nets.symmetry.low_variance import LowVariance, Places, told
from manifold_nets.symmetry.report import Absorber, Certificate, ShiftSymmetry
from manifold_nets.symmetry.rules import Absorption

__all__ = ["ROUNDED", "Certifier", "Direction", "Loss", "ShiftJudge", "sees_no_shift"]

# A sum this small against the evidence floor, some 45 roundings of the largest product of the network, refutes nothing:
# where gradients nearly cancel, as those of a channel with one active entry do, it is what rounding leaves.
ROUNDED = 1e-3
# Of some groups, which ones the pass could tell nothing of, and why.
Excused = Callable[[Tensor], tuple[Tensor, str]]


class Certifier:
    """Compares ``|Σ_G w ⊙ ∂L/∂w|`` with ``‖w_G‖ ‖∂L/∂w_G‖``, group by group.

    Args:
        field: weights and gradients of one float64 pass.
        tolerance: largest value of an invariant group.
        not_finite: for some parameters which of their entries are not finite in the model, and were drawn anew.
    """

    def __init__(
        self, field: GradientPass, tolerance: float, not_finite: Mapping[str, Tensor] = MappingProxyType({})
    ) -> None:
        self.field, self.tolerance, self.not_finite = field, tolerance, not_finite
        names = [] if field.silent else [name for name, shape in field.shapes.items() if len(shape) >= 2]
        self.largest = max(filter(math.isfinite, map(field.size, names)), default=0.0)
        self.floor = EVIDENCE_FLOOR * self.largest

    def alone(self, name: str, partition: Partition) -> Certificate:
        """Certificate of the groups of a partition without any bias."""
        if self.field.silent:
            return Certificate(None, "no evidence", 0, 0, partition.n_groups)
        sums = self.field.sums(name, partition)
        lost = self.lost(name, partition)
        return self.verdict(sums.products, sums.weights.sqrt(), sums.gradients.sqrt(), self.field.size(name), lost=lost)

    def with_evidence(self, name: str, partition: Partition) -> tuple[int, ...]:
        """The numbers of the groups that have a gradient."""
        sums = self.field.sums(name, partition)
        return tuple((sums.weights.sqrt() * sums.gradients.sqrt() > self.floor).nonzero().flatten().tolist())

    def lost(self, name: str, partition: Partition) -> Sequence[int]:
        """The groups of a partition that are not finite in the model."""
        return groups_not_finite(self.not_finite[name], partition) if name in self.not_finite else ()

    def verdict(
        self,
        sums: Tensor,
        weight: Tensor,
        gradient: Tensor,
        most: float = math.inf,
        *,
        excused: Excused | None = None,
        lost: Sequence[int] = (),
    ) -> Certificate:
        """Certificate from the sum of each group and the norms of its weights and gradients.

        Where filters of different scales make a group, the product of its norms may be far above what any sum of it
        could be, and would hide that this one is not zero: ``most``, the size of the parameters, is what it is at most.
        Where groups are refuted, ``excused`` is asked which of them the pass could tell nothing of, and why. Those that
        are ``lost``, as they are not finite, and those whose gradient is not, have no evidence.
        """
        size = (weight * gradient).clamp_max(most if math.isfinite(most) else math.inf)
        evidence = size > self.floor
        evidence &= ~((sums.abs() > self.tolerance * size) & (sums.abs() <= ROUNDED * self.floor))
        values = torch.where(evidence, sums.abs() / size, torch.zeros_like(size))
        # A sum that is not a number is no evidence of invariance.
        refuted = (evidence & ~(values <= self.tolerance)) | ~sums.isfinite()
        unread, unknown = torch.zeros_like(evidence), ~gradient.isfinite()
        unread[list(lost)] = True
        because = [_not_finite(lost, len(sums))] if lost else []
        because += ["gradients are not finite on these inputs"] if bool((unknown & ~unread).any()) else []
        refuted, evidence = refuted & ~(unread | unknown), evidence & ~(unread | unknown)
        if excused is not None and bool(refuted.any()):
            without, words = excused(refuted | ~evidence)
            refuted, evidence = refuted & ~without, evidence & ~without
            because += [words] if words else []
        n_refuted, n_evidence = int(refuted.sum()), int((evidence | refuted).sum())
        verdict = "not invariant" if n_refuted else "invariant" if n_evidence else "no evidence"
        return Certificate(
            value=_finite(float(values[evidence | refuted].max())) if n_evidence else None,
            verdict=verdict,
            groups_certified=n_evidence - n_refuted,
            groups_refuted=n_refuted,
            groups_without_evidence=len(sums) - n_evidence,
            because="; ".join(because),
            silent=tuple((~(evidence | refuted)).nonzero().flatten().tolist()),
        )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _not_finite(groups: Sequence[int], count: int) -> str:
    if count == 1:
        return "it is not finite"
    return f"group{'s' if len(groups) > 1 else ''} {listed(groups)} {'are' if len(groups) > 1 else 'is'} not finite"


# Far above the rounding of a loss in float64, far below what a shift of order one does to one that sees it.
_LOSS_ROUNDING = 1e-9
# For each parameter the coefficient of each entry that moves, by its flat index.
Direction = dict[str, dict[int, float]]
# The name of a loss of logits, or the loss as a function of what the model returns.
Loss = str | Callable[[Any], Tensor]
LOSSES = ("cross_entropy", "softmax")


def sees_no_shift(loss: Loss | None, model: nn.Module, inputs: Inputs) -> bool:
    """Whether a loss stays the same when a constant is added to all logits of an example, along axis 1.

    Raises:
        LossError: an unknown name, or a function that does not accept the outputs.
        ExampleInputsError: the model refuses the inputs.
    """
    if loss is None:
        return False
    if isinstance(loss, str):
        if loss not in LOSSES:
            raise LossError(f"the name {loss!r}")
        return True
    generator = torch.Generator().manual_seed(0)

    def shifted(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or leaf.ndim < 2 or not leaf.is_floating_point():
            return leaf
        constants = torch.randn((leaf.shape[0], 1, *leaf.shape[2:]), generator=generator, dtype=torch.float64)
        return leaf + constants.to(leaf.device)

    with torch.no_grad(), torch.random.fork_rng(), following(model):
        outputs = called(model, inputs)
        try:
            before, after = float(loss(outputs)), float(loss(pytree.tree_map(shifted, outputs)))
        except Exception as error:
            raise LossError(f"{type(error).__name__}: {error}") from error
    return abs(after - before) <= _LOSS_ROUNDING * max(1.0, abs(before))


class ShiftJudge:
    """Puts the certificate beside what the structure claims.

    Args:
        euler: weights and gradients of one float64 pass.
        tolerance: largest value of a symmetry.
        drops_samples: whether the network drops branches at random, which leaves no trace in its graph.
        blunt: tells, of shifts that are refuted, whether what absorbs them has no variance.
    """

    def __init__(
        self, euler: GradientPass, tolerance: float, drops_samples: bool, blunt: LowVariance | None = None
    ) -> None:
        self.euler, self.tolerance, self.drops_samples, self.blunt = euler, tolerance, drops_samples, blunt
        self.largest = euler.largest_slope

    def added(self, directions: list[Direction], absorptions: list[Absorption], rank: int) -> ShiftSymmetry:
        """Judge shifts of added parameters."""
        values: list[float | None] = []
        flat = {name: self.euler.gradients[name].flatten().cpu().numpy() for name in directions[0]}
        for direction in directions:
            g = np.concatenate([flat[name][list(entries)] for name, entries in direction.items()])
            d = np.array([c for entries in direction.values() for c in entries.values()])
            size = float(np.linalg.norm(g) * np.linalg.norm(d)) if len(d) > 1 else self.largest
            values.append(self._value(abs(float(g @ d)), size))
        entries = sum(len(part) for part in directions[0].values())
        kinds = {a.kind for a in absorptions}
        kind = "dead bias" if entries == 1 else "filter shift" if rank > 1 else "bias shift"
        if entries > 1 and len(directions[0]) > 1:
            kind = "redundant biases"
        elif entries > 1 and kinds and kinds <= {"softmax", "loss"}:
            kind = "logit shift"
        return self._symmetry(kind, tuple(directions[0]), values, absorptions, directions=tuple(directions))

    def rows(self, name: str, partition: Partition, free: list[int], absorptions: list[Absorption]) -> ShiftSymmetry:
        """Judge rows added to blocks of filters."""
        index = torch.arange(partition.n_groups).reshape(partition.spread_shape)
        if len(partition.kept) > 1:
            lead = index.reshape(-1).reshape([partition.view[axis] for axis in partition.kept])
            index = lead if len(partition.view) == len(partition.shape) else _blocks_of(lead, partition, free)
        return self.groups(name, partition, index.flatten().tolist(), absorptions)

    def groups(
        self, name: str, partition: Partition, numbers: list[int], absorptions: list[Absorption]
    ) -> ShiftSymmetry:
        """Judge constants added to groups of entries."""
        found = self.euler.sums(name, partition)
        sums = found.slopes.abs().cpu()[numbers]
        sizes = found.gradients.sqrt().cpu()[numbers] * partition.group_size**0.5
        values = [self._value(a, b) for a, b in zip(sums.tolist(), sizes.tolist(), strict=True)]
        return self._symmetry("row shift", (name,), values, absorptions, partition=partition, groups=tuple(numbers))

    def _value(self, total: float, size: float) -> float | None:
        """Value of the certificate; None where the gradient vanishes, or is not finite."""
        return total / size if size > EVIDENCE_FLOOR * self.largest and np.isfinite(total) else None

    def _excused(
        self, values: list[float | None], places: Places, directions: Sequence[Direction]
    ) -> tuple[list[float | None], str]:
        """The values without those that are refuted where there is no variance; without all where that is not known."""
        if not places:
            return values, ""
        channels = set().union(*places.values()) if all(places.values()) else set()
        entries = [[*part] for direction in directions for part in direction.values()]
        if not channels or len(entries) != len(values) or any(len(part) > 1 for part in entries):
            return [None] * len(values), told([places])
        refuted = [value is not None and not value <= self.tolerance for value in values]
        without = [bad and entry in channels for bad, (entry,) in zip(refuted, entries, strict=True)]
        kept = [None if out else value for value, out in zip(values, without, strict=True)]
        return kept, told([places]) if any(without) else ""

    def _symmetry(
        self, kind: str, names: tuple[str, ...], values: list[float | None], absorptions: list[Absorption], **more: Any
    ) -> ShiftSymmetry:
        known = [value for value in values if value is not None]
        refuted = sum(not value <= self.tolerance for value in known)
        because = ""
        if refuted and self.blunt is not None:
            values, because = self._excused(values, self.blunt.places(absorptions), more.get("directions", ()))
            known = [value for value in values if value is not None]
            refuted = sum(not value <= self.tolerance for value in known)
        verdict = "not invariant" if refuted else "invariant" if known else "no evidence"
        certificate = Certificate(
            max(known) if known else None, verdict, len(known) - refuted, refuted, len(values) - len(known),
            because=because, silent=tuple(number for number, value in enumerate(values) if value is None),
        )  # fmt: skip
        once = list({a.node: a for a in absorptions}.values())
        absorbers = tuple(Absorber(a.op, a.module, a.kind, running_mean=a.running_mean) for a in once)
        kinds = {a.kind for a in absorbers}
        condition = None
        if self.drops_samples and kinds & {"batch"}:
            condition = "while no branch is dropped at random"
        remedy = _remedy(kind, absorbers) if not refuted else _REFUTED
        return ShiftSymmetry(kind, names, len(values), absorbers, certificate, remedy, condition, **more)


def _blocks_of(index: torch.Tensor, partition: Partition, free: list[int]) -> torch.Tensor:
    """Numbers of the groups of a partition that belong to the free blocks."""
    if partition.kept[:3] == (0, 1, 2):  # transposed: groups, input channels, blocks of a group
        moved = index.movedim(2, 1)
        return moved.reshape(-1, *moved.shape[2:])[free]
    return index[free]


_REFUTED = "leave it and report it: structure and certificate contradict each other"
_REMEDIES = {
    "dead bias": "remove it: it does nothing",
    "bias shift": "leave it, or subtract its mean: the function stays",
    "logit shift": "leave it, or subtract its mean: the function stays",
    "filter shift": "leave it, or subtract the mean of each filter: the function stays",
    "row shift": "leave it, or subtract the mean over the filters: the function stays",
    "redundant biases": "keep one of them and add the others to it",
}


def _remedy(kind: str, absorbers: tuple[Absorber, ...]) -> str:
    means = [a.running_mean for a in absorbers if a.running_mean is not None]
    return _REMEDIES[kind] + (f" ({means[0]} takes it up)" if kind == "dead bias" and means else "")
