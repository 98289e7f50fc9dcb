"""The finite move of all that was found: which findings hold, and what is said of those that do not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

import numpy as np

from manifold_nets.groups import Partition
from manifold_nets.symmetry.finite_move import FiniteMove, Outcome
from manifold_nets.symmetry.generators import Generators, Part
from manifold_nets.symmetry.graph import op_name
from manifold_nets.symmetry.report import Certificate, ShiftSymmetry, SymmetryFamily, UnexplainedSymmetry, WeightFinding
from manifold_nets.symmetry.rules import LARGEST_EPS
from manifold_nets.symmetry.trace import TracedGraph

__all__ = ["has_written_eps", "moved_claims", "moved_numbers"]

_REMEDY = "leave it and report it: structure and certificate call it invariant, and moving it changes the outputs"
_NOT_INVARIANT = "leave it: its scale matters to the function"
# Their eps is made negligible, wherever it comes from.
_NORMALIZATIONS = ("batch_norm", "instance_norm", "group_norm", "layer_norm", "rms_norm")

Found = TypeVar("Found", WeightFinding, SymmetryFamily, ShiftSymmetry)


def has_written_eps(graph: TracedGraph) -> bool:
    """Whether an operation of a network reads a constant as small as an eps."""
    return any(
        isinstance(value, float) and 0 < value <= LARGEST_EPS
        for node in graph.order
        if node.op == "call_function" and op_name(node) not in _NORMALIZATIONS
        for value in (*node.args, *node.kwargs.values())
    )


def moved_claims(
    move: FiniteMove,
    findings: Sequence[WeightFinding],
    families: Sequence[SymmetryFamily],
    shifts: Sequence[ShiftSymmetry],
) -> tuple[list[WeightFinding], tuple[SymmetryFamily, ...], tuple[ShiftSymmetry, ...]]:
    """Move what structure claims and the certificate confirms, group by group; what fails is a contradiction."""
    shapes = {name: tuple(parameter.shape) for name, parameter in move.twin.named_parameters()}
    claims: dict[tuple[str, int], Generators] = {}
    for number, finding in enumerate(findings):
        if finding.partition is not None and finding.certificate.verdict == "invariant":
            claims["weight", number] = _of_weight(finding, finding.partition, shapes)
    for number, family in enumerate(families):
        if family.certificate.verdict == "invariant":
            claims["family", number] = _of_family(family)
    for number, shift in enumerate(shifts):
        if shift.certificate.verdict == "invariant":
            claims["shift", number] = _of_shift(shift, shapes)
    outcomes = dict(zip(claims, move.outcomes(list(claims.values())), strict=True))

    def said(kind: str, number: int, found: Found) -> Found:
        outcome = outcomes.get((kind, number), Outcome())
        certificate = _certificate(found.certificate, outcome)
        remedy = _REMEDY if outcome.refuted else found.remedy
        return replace(found, certificate=certificate, remedy=remedy)

    weights = [said("weight", number, finding) for number, finding in enumerate(findings)]
    return (
        [replace(w, status="disagreement") if w.remedy == _REMEDY else w for w in weights],
        tuple(said("family", number, family) for number, family in enumerate(families)),
        tuple(said("shift", number, shift) for number, shift in enumerate(shifts)),
    )


def moved_numbers(
    move: FiniteMove,
    findings: Sequence[WeightFinding],
    unexplained: Sequence[UnexplainedSymmetry],
    alone: Mapping[str, Partition],
) -> tuple[list[WeightFinding], tuple[UnexplainedSymmetry, ...]]:
    """Move what only the numbers call invariant, as far as it goes; of what fails the structure is right.

    Args:
        move: carries it out.
        findings: of weights, of which structure claims something or not.
        unexplained: what the search found.
        alone: the partition of each weight that the certificate calls invariant, and the structure does not.
    """
    shapes = {name: tuple(parameter.shape) for name, parameter in move.twin.named_parameters()}
    doubted = [number for number, w in enumerate(findings) if w.name in alone and w.certificate.verdict == "invariant"]
    claims = [replace(_of_weight(findings[n], alone[findings[n].name], shapes), far=True) for n in doubted]
    claims += [_of_unexplained(found, shapes) for found in unexplained]
    outcomes = move.outcomes(claims)
    weights = list(findings)
    for number, outcome in zip(doubted, outcomes, strict=False):
        found, certificate = weights[number], _certificate(weights[number].certificate, outcome)
        weights[number] = replace(found, certificate=certificate)
        if outcome.refuted and found.status == "disagreement":
            weights[number] = replace(weights[number], status="not invariant", remedy=_NOT_INVARIANT)
    kept = zip(unexplained, outcomes[len(doubted) :], strict=True)
    return weights, tuple(found for found, outcome in kept if not outcome.refuted)


def _certificate(certificate: Certificate, outcome: Outcome) -> Certificate:
    if not outcome.refuted:
        return replace(certificate, moved=outcome.change)
    return replace(
        certificate, verdict="not invariant", groups_certified=0, moved=outcome.change,
        groups_refuted=certificate.groups_refuted + certificate.groups_certified,
    )  # fmt: skip


def _of_weight(finding: WeightFinding, partition: Partition, shapes: Mapping[str, tuple[int, ...]]) -> Generators:
    numbers = np.setdiff1d(np.arange(partition.n_groups), finding.certificate.silent)
    parts = [_part(finding.name, partition, numbers, numbers)]
    for bias in finding.scaled_along:
        groups = np.array(bias.groups, dtype=np.int64)
        entries = np.flatnonzero(np.isin(groups, numbers))
        parts.append(_part(bias.name, _entries(shapes[bias.name]), entries, groups[entries]))
    return Generators(tuple(parts), partition.n_groups)


def _of_family(family: SymmetryFamily) -> Generators:
    moved: dict[tuple[str, str], list[tuple[int, int, float]]] = {}
    silent = set(family.certificate.silent)
    for number, symmetry in enumerate(family.symmetries):
        for place, exponents in symmetry.items() if number not in silent else ():
            moved.setdefault(place, []).extend((index, number, c) for index, c in exponents.items())
    parts = []
    for place, entries in moved.items():
        groups, numbers, powers = zip(*entries, strict=True)
        parts.append(_part(place[0], family.partitions[place], groups, numbers, powers))
    return Generators(tuple(parts), len(family.symmetries))


def _of_shift(shift: ShiftSymmetry, shapes: Mapping[str, tuple[int, ...]]) -> Generators:
    silent = set(shift.certificate.silent)
    if shift.partition is not None:
        numbers = np.setdiff1d(np.arange(len(shift.groups)), list(silent))
        groups = np.array(shift.groups)[numbers]
        return Generators((_part(shift.parameters[0], shift.partition, groups, numbers),), len(shift.groups), adds=True)
    parts = [
        _part(name, _entries(shapes[name]), list(entries), [number] * len(entries), list(entries.values()))
        for number, direction in enumerate(shift.directions)
        if number not in silent
        for name, entries in direction.items()
    ]
    return Generators(tuple(parts), len(shift.directions), adds=True)


def _of_unexplained(found: UnexplainedSymmetry, shapes: Mapping[str, tuple[int, ...]]) -> Generators:
    numbers = np.arange(len(found.groups))
    parts = [_part(found.parameters[0], found.partition, found.groups, numbers)]
    ids = found.partition.group_ids()
    for name in found.parameters[1:]:
        # The entries of the vector belong to slices of the tensor, and each slice to one group.
        slices = (ids.movedim(axis, 0).flatten(1) if ids.ndim > 1 else ids[:, None] for axis in range(ids.ndim))
        of_entry = next(s[:, 0] for s in slices if s.shape[0] == shapes[name][0] and bool((s == s[:, :1]).all()))
        for number, group in enumerate(found.groups):
            entries = np.flatnonzero(of_entry.numpy() == group)
            parts.append(_part(name, _entries(shapes[name]), entries, [number] * len(entries)))
    return Generators(tuple(parts), len(numbers), adds=found.kind == "shift", far=True)


def _part(
    name: str,
    partition: Partition,
    groups: Sequence[int] | np.ndarray,
    numbers: Sequence[int] | np.ndarray,
    coefficients: Sequence[float] | None = None,
) -> Part:
    groups = np.asarray(groups, dtype=np.int64)
    ones = np.ones(len(groups))
    return Part(
        name, partition, groups, np.asarray(numbers, dtype=np.int64),
        ones if coefficients is None else np.asarray(coefficients, dtype=np.float64),
    )  # fmt: skip


def _entries(shape: tuple[int, ...]) -> Partition:
    """Every entry by itself."""
    return Partition(shape, shape, tuple(range(len(shape))))
