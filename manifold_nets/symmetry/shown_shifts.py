"""Shifts that the numbers show, put to the structure: each parameter by itself, with the groups that move together.

The structure looks for the shifts of all biases at once, and for rows of the blocks that normalizations suggest. So it
misses some: what a linear map makes of the sum of two shifts is refused together with both, and a softmax may compare
blocks of any size. The reverse search finds the groups of these, and the structure is asked whether it agrees. Where it
does not, it is asked again with dropout off, as it is for the certificate; what holds only then says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

import numpy as np
from torch import nn

from manifold_nets.symmetry.invariance import InvarianceTest
from manifold_nets.symmetry.propagate import follow_shifts
from manifold_nets.symmetry.report import ShiftSymmetry, UnexplainedSymmetry
from manifold_nets.symmetry.shift_findings import ShiftFindings
from manifold_nets.symmetry.shifts import (
    drops_samples,
    inactive_modules,
    only_multiplies,
    row_shift,
    shape_of_source,
    shifts_of,
)
from manifold_nets.symmetry.structure.scales import UNSCALED, Scales
from manifold_nets.symmetry.trace import TracedGraph

__all__ = ["shown_shifts", "with_shown"]

# Larger parameters whose entries are shifted in no rows are not followed.
_LARGEST = 2**20


def shown_shifts(
    graph: TracedGraph,
    model: nn.Module,
    shown: Iterable[UnexplainedSymmetry],
    test: InvarianceTest,
    *,
    loss: bool = False,
) -> tuple[ShiftSymmetry, ...]:
    """What the structure says of shifts that the numbers show, each with its certificate.

    Args:
        graph: the graph of the model in training mode.
        model: the model as the user has it.
        shown: what the reverse search found.
        test: tests what the structure explains.
        loss: whether the outputs are logits of a loss that compares them along axis 1.

    Returns:
        The symmetries that structure explains, parameter by parameter.
    """
    judge = ShiftFindings(test, drops_samples(model))
    groups: dict[str, list[UnexplainedSymmetry]] = {}
    for one in shown:
        if one.kind == "shift" and len(one.parameters) == 1:
            groups.setdefault(one.parameters[0], []).append(one)
    inactive = inactive_modules(model)
    found: list[ShiftSymmetry] = []
    for name, members in groups.items():
        explained = _explained(graph, name, members, judge, inactive, loss)
        if not explained:
            calm = _explained(graph, name, members, judge, lambda module: True, loss)
            explained = [
                replace(
                    shift,
                    condition=_together(shift.condition, "while dropout is off"),
                    remedy="leave it: dropout breaks it in training",
                )
                for shift in calm
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


def _together(condition: str | None, other: str) -> str:
    return other if condition is None else f"{condition}, and {other}"


def _explained(
    graph: TracedGraph,
    name: str,
    members: Sequence[UnexplainedSymmetry],
    judge: ShiftFindings,
    inactive: Callable[[str], bool],
    loss: bool,
) -> list[ShiftSymmetry]:
    """The shifts of one parameter."""
    sources = [node for node in graph.placeholders_of(name) if node.users]
    if not sources:
        return []
    shape = shape_of_source(sources[0])
    if len(shape) == 1:
        found = shifts_of(graph, {name: shape}, judge, inactive, loss)
    else:
        row = row_shift(graph, name, inactive, loss, [one.partition for one in members])
        found = [] if row is None else [judge.rows(row.name, row.partition, row.free, row.absorptions)]
    if not found and not only_multiplies(sources) and int(np.prod(shape)) <= _LARGEST:
        found += _of_groups(graph, name, members, judge, inactive, loss)
    return found


def _of_groups(
    graph: TracedGraph,
    name: str,
    members: Iterable[UnexplainedSymmetry],
    judge: ShiftFindings,
    inactive: Callable[[str], bool],
    loss: bool,
) -> Iterator[ShiftSymmetry]:
    """Constants added to just the groups that the numbers show, of the finest partition of which some are free."""
    for one in members:
        partition, numbers = one.partition, one.groups
        scales, ids = Scales(), np.full(partition.n_groups, UNSCALED)
        ids[list(numbers)] = scales.add(len(numbers))
        where = partition.group_ids().numpy()
        absorbed = follow_shifts(graph, {name: ids[where]}, scales, inactive=inactive, loss=loss)
        free = [k for k in scales.free if k < len(numbers) and k in absorbed]
        if free:
            reached = list({a.node: a for k in free for a in absorbed[k]}.values())
            groups = [numbers[k] for k in free]
            if len(partition.shape) > 1:
                yield judge.groups(name, partition, groups, reached)
            else:
                entries = [np.flatnonzero(where == group).tolist() for group in groups]
                yield judge.added([{name: dict.fromkeys(places, 1.0)} for places in entries], reached, 1)
            return
