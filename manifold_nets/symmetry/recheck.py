"""Shifts found by the numerical search, checked against the structure, parameter by parameter.

The structure analysis follows the shifts of all biases at once, and of rows in the blocks that normalizations suggest.
It misses some: two shifts that a linear map adds are refused together, and a softmax may compare blocks of any size.
The numerical search finds the groups of these, and the structure is then solved for them. If it does not confirm them,
it is solved again with dropout off, as for the certificate; shifts that hold only then carry this condition.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import numpy as np

from manifold_nets.symmetry.equations import UNSCALED, Scales
from manifold_nets.symmetry.invariance import InvarianceTest
from manifold_nets.symmetry.report import ShiftSymmetry, UnexplainedSymmetry
from manifold_nets.symmetry.shift_findings import ShiftFindings
from manifold_nets.symmetry.shifts import ShiftStructure

__all__ = ["recheck_shifts", "shift_symmetries", "with_shown"]

# Larger parameters whose entries are shifted in no rows are not followed.
_LARGEST = 2**20


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
