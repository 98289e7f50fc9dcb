"""Shifts that the structure allows, each certified; and whether a loss depends on a shift of the logits.

The structure analysis follows the shifts of all biases at once, and of rows in the blocks that normalizations suggest.
It misses some: two shifts that a linear map adds are refused together, and a softmax may compare blocks of any size.
The numerical search finds the groups of these, and `recheck_shifts` solves the structure for them. If it does not
confirm them, it is solved again with dropout off, as for the certificate; shifts that hold only then carry this
condition.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from manifold_nets.errors import OptionError
from manifold_nets.float64 import following
from manifold_nets.groups import Partition
from manifold_nets.running import Inputs, called
from manifold_nets.symmetry.equations import UNSCALED, Scales
from manifold_nets.symmetry.generators import Direction, Generators
from manifold_nets.symmetry.invariance import InvarianceTest
from manifold_nets.symmetry.low_variance import Places
from manifold_nets.symmetry.report import Absorber, ShiftSymmetry, UnexplainedSymmetry
from manifold_nets.symmetry.rules import Absorption
from manifold_nets.symmetry.shifts import ShiftStructure

__all__ = ["Direction", "Loss", "ShiftFindings", "recheck_shifts", "sees_no_shift", "shift_symmetries", "with_shown"]

# Larger parameters whose entries are shifted in no rows are not followed.
_LARGEST = 2**20
# Far above the rounding of a loss in float64, far below what a shift of order one does to one that sees it.
_LOSS_ROUNDING = 1e-9
# The name of a loss of logits, or the loss as a function of what the model returns.
Loss = str | Callable[[Any], Tensor]
LOSSES = ("cross_entropy", "softmax")
_EXPECTED = "'cross_entropy', 'softmax', or a function of the model's output that returns one number"
_REFUTED = "leave it and report a bug: structure and certificate contradict each other"
_REMEDIES = {
    "dead bias": "remove it: it has no effect",
    "bias shift": "leave it, or subtract its mean: the function stays the same",
    "logit shift": "leave it, or subtract its mean: the function stays the same",
    "filter shift": "leave it, or subtract the mean of each filter: the function stays the same",
    "row shift": "leave it, or subtract the mean over the filters: the function stays the same",
    "redundant biases": "keep one of them and add the others to it",
}


def sees_no_shift(loss: Loss | None, model: nn.Module, inputs: Inputs) -> bool:
    """Whether a loss stays the same when a constant is added to all logits of an example, along axis 1.

    Raises:
        OptionError: an unknown name, or a function that does not accept the outputs.
        ExampleInputsError: the model refuses the inputs.
    """
    if loss is None:
        return False
    if isinstance(loss, str):
        if loss not in LOSSES:
            raise OptionError("loss", loss, _EXPECTED)
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
            raise OptionError("loss", error, _EXPECTED) from error
    return abs(after - before) <= _LOSS_ROUNDING * max(1.0, abs(before))


class ShiftFindings:
    """Certifies the shifts that the structure claims.

    Args:
        test: the gradient test.
        drops_samples: whether the network drops branches at random, which leaves no trace in its graph.
    """

    def __init__(self, test: InvarianceTest, drops_samples: bool) -> None:
        self.test, self.drops_samples = test, drops_samples

    def added(self, directions: list[Direction], absorptions: list[Absorption], rank: int) -> ShiftSymmetry:
        """Test shifts of parameters that are added."""
        entries = sum(len(part) for part in directions[0].values())
        kinds = {a.kind for a in absorptions}
        kind = "dead bias" if entries == 1 else "filter shift" if rank > 1 else "bias shift"
        if entries > 1 and len(directions[0]) > 1:
            kind = "redundant biases"
        elif entries > 1 and kinds and kinds <= {"softmax", "loss"}:
            kind = "logit shift"
        return self._finding(kind, Generators.of_shifts(directions, self.test.gradients.shapes), absorptions)

    def groups(
        self, name: str, partition: Partition, numbers: list[int], absorptions: list[Absorption]
    ) -> ShiftSymmetry:
        """Test constants added to groups of entries of a weight."""
        return self._finding("row shift", Generators.of_groups(name, partition, numbers, adds=True), absorptions)

    def _finding(self, kind: str, generators: Generators, absorptions: list[Absorption]) -> ShiftSymmetry:
        def excuse(asked: NDArray[np.bool_]) -> Mapping[int, Places]:
            return self._low_variance(generators, asked, absorptions)

        certificate = self.test.certificate(generators, excuse if self.test.low_variance is not None else None)
        once = list({a.node: a for a in absorptions}.values())
        absorbers = tuple(Absorber(a.op, a.module, a.kind, running_mean=a.running_mean) for a in once)
        dropped = self.drops_samples and any(a.kind == "batch" for a in absorbers)
        remedy = _REMEDIES[kind] if certificate.verdict != "not invariant" else _REFUTED
        means = [a.running_mean for a in absorbers if a.running_mean is not None]
        if remedy == _REMEDIES["dead bias"] and means:
            remedy += f" ({means[0]} is adjusted for it)"
        return ShiftSymmetry(
            kind,
            tuple(dict.fromkeys(part.parameter for part in generators.parts)),
            generators.count,
            absorbers,
            certificate,
            remedy,
            "while no branch is dropped at random" if dropped else None,
            generators,
        )

    def _low_variance(
        self, generators: Generators, asked: NDArray[np.bool_], absorptions: Sequence[Absorption]
    ) -> dict[int, Places]:
        """The shifts of channels without variance; all of them where it is not known which channels they reach."""
        places = self.test.low_variance.places(absorptions) if self.test.low_variance is not None else {}
        if not places:
            return {}
        if all(places.values()) and bool((generators.entries == 1).all()):
            (part,) = generators.parts
            channels = set().union(*places.values())
            entry = dict(zip(part.numbers.tolist(), part.groups.tolist(), strict=True))
            return {number: places for number in np.flatnonzero(asked).tolist() if entry[number] in channels}
        return dict.fromkeys(range(generators.count), places)


def shift_symmetries(structure: ShiftStructure, test: InvarianceTest) -> tuple[ShiftSymmetry, ...]:
    """Find the shift symmetries of a network, each with its certificate, parameter by parameter.

    Args:
        structure: what may be added to the parameters of the network.
        test: tests them, by gradients for cotangents that sum to zero along axis 1 where outputs are logits.
    """
    findings = ShiftFindings(test, structure.drops_samples)
    found = [findings.added(shift.directions, shift.absorptions, shift.rank) for shift in structure.added()]
    return (*found, *(findings.groups(row.name, row.partition, row.groups, row.absorptions) for row in structure.rows))


def recheck_shifts(
    structure: ShiftStructure, shown: Iterable[UnexplainedSymmetry], test: InvarianceTest
) -> tuple[ShiftSymmetry, ...]:
    """Check numerically found shifts against the structure, and certify them, parameter by parameter.

    Args:
        structure: what may be added to the parameters of the network.
        shown: the shifts of single parameters that the numerical search found.
        test: tests what the structure explains.
    """
    findings = ShiftFindings(test, structure.drops_samples)
    groups: dict[str, list[UnexplainedSymmetry]] = {}
    for one in shown:
        groups.setdefault(one.parameters[0], []).append(one)
    found: list[ShiftSymmetry] = []
    for name, members in groups.items():
        explained = _explained(structure, name, members, findings)
        if not explained:
            explained = [
                replace(
                    shift,
                    condition=", and ".join(filter(None, (shift.condition, "while dropout is off"))),
                    remedy="leave it: dropout breaks it in training",
                )
                for shift in _explained(structure.without_dropout(), name, members, findings)
            ]
        found += explained
    return tuple(found)


def with_shown(shifts: Iterable[ShiftSymmetry], shown: Sequence[ShiftSymmetry]) -> tuple[ShiftSymmetry, ...]:
    """The shifts that are known, with what was found when the structure was asked for more of single parameters."""
    shifts = tuple(shifts)
    counts = {names: sum(s.count for s in shifts if s.parameters == names) for names in {s.parameters for s in shown}}
    always = {s.parameters for s in shown if s.condition is None and s.count >= counts[s.parameters]}
    kept = [shift for shift in shifts if shift.parameters not in always]
    return (*kept, *(s for s in shown if s.parameters in always or not counts[s.parameters]))


def _explained(
    structure: ShiftStructure, name: str, members: Sequence[UnexplainedSymmetry], findings: ShiftFindings
) -> list[ShiftSymmetry]:
    """The shifts of one parameter."""
    shape = structure.shapes.get(name)
    if shape is None:
        return []
    if len(shape) == 1:
        found = [findings.added(s.directions, s.absorptions, s.rank) for s in structure.added_together({name: shape})]
    else:
        row = structure.row(name, [one.partition for one in members])
        found = [] if row is None else [findings.groups(row.name, row.partition, row.groups, row.absorptions)]
    if not found and not structure.only_multiplies(name) and int(np.prod(shape)) <= _LARGEST:
        found += _of_groups(structure, name, members, findings)
    return found


def _of_groups(
    structure: ShiftStructure, name: str, members: Iterable[UnexplainedSymmetry], findings: ShiftFindings
) -> Iterator[ShiftSymmetry]:
    """Constants added to just the groups that the numbers show, of the finest partition of which some are free."""
    for one in members:
        partition, numbers = one.partition, one.groups
        scales, ids = Scales(), np.full(partition.n_groups, UNSCALED)
        ids[list(numbers)] = scales.add(len(numbers))
        where = partition.group_ids().numpy()
        free, reached = structure.absorbed(name, ids[where], scales)
        groups = [numbers[k] for k in free]
        if groups and len(partition.shape) > 1:
            yield findings.groups(name, partition, groups, reached)
        elif groups:
            entries = [np.flatnonzero(where == group).tolist() for group in groups]
            yield findings.added([{name: dict.fromkeys(places, 1.0)} for places in entries], reached, 1)
        if groups:
            return
