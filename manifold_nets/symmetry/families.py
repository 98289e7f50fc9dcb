"""Families: the symmetries of a network's solved equations, sorted by the parameters they change and certified."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property, partial

import numpy as np
from numpy.typing import NDArray

from manifold_nets.symmetry.generators import Generators, Part
from manifold_nets.symmetry.invariance import InvarianceTest
from manifold_nets.symmetry.joint import JointStructure
from manifold_nets.symmetry.low_variance import LowVariance, Places
from manifold_nets.symmetry.report import Certificate, FamilyMember, SymmetryFamily, WeightFinding

__all__ = ["certified_families", "joint_generators", "with_mixed_weights"]

_LEAVE = "leave it: a manifold holds a whole weight, and its other filters are not invariant"
_SPLIT = f"{_LEAVE}; as a parameter of their own, the invariant filters could go on spheres"
_TOGETHER = "leave it: biases concatenated from parts would have to be rescaled with it"

# The number of a part, the exponent that its indices share, and how many of them one symmetry moves.
_Member = tuple[int, float | None, int]


def joint_generators(joint: JointStructure) -> tuple[Generators, NDArray[np.int64], list[str]]:
    """All symmetries of the solved equations of a network.

    Returns:
        The generators, for each the number of its free scale, and for each of their parts whether it is made of
        ``"rows"``, ``"columns"`` or ``"entries"``.
    """
    found: list[Part] = []
    kinds: list[str] = []
    scales: list[NDArray[np.int64]] = []
    for name, kind, partition, ids, sign in joint.parts():
        unique, inverse = np.unique(ids.reshape(-1), return_inverse=True)
        forms = [joint.scales.form(number) for number in unique.tolist()]
        sizes = np.array([len(form) for form in forms])
        scale = np.array([k for form in forms for k in form], dtype=np.int64)
        exponents = np.array([c for form in forms for c in form.values()])
        # Each index takes the terms of its form.
        counts = sizes[inverse]
        groups = np.repeat(np.arange(len(inverse)), counts)
        terms = np.arange(len(groups)) + np.repeat(
            (np.cumsum(sizes) - sizes)[inverse] - np.cumsum(counts) + counts, counts
        )
        if len(groups):
            found.append(Part(name, partition, groups, scale[terms], sign * exponents[terms]))
            kinds.append(kind)
            scales.append(scale[terms])
    if not found:
        return Generators((), 0), np.zeros(0, dtype=np.int64), []
    free, first, numbers = np.unique(np.concatenate(scales), return_index=True, return_inverse=True)
    order = np.argsort(first)
    rank = np.argsort(order)  # numbered in the order in which they occur
    numbered = np.split(rank[numbers], np.cumsum([len(part.groups) for part in found])[:-1])
    parts = [Part(p.parameter, p.partition, p.groups, n, p.coefficients) for p, n in zip(found, numbered, strict=True)]
    return Generators(tuple(parts), len(free)), free[order], kinds


def certified_families(joint: JointStructure, test: InvarianceTest) -> tuple[SymmetryFamily, ...]:
    """Sort the symmetries of a network into families with the same members, and certify each family.

    Args:
        joint: the result of `solve_jointly`.
        test: the gradient test.
    """
    generators, scales, kinds = joint_generators(joint)
    families: dict[tuple[_Member, ...], list[int]] = {}
    for number, key in enumerate(map(tuple, _members(generators))):
        families.setdefault(key, []).append(number)
    family = np.zeros(generators.count, dtype=np.int64)
    local = np.zeros(generators.count, dtype=np.int64)
    for index, numbers in enumerate(families.values()):
        family[numbers], local[numbers] = index, np.arange(len(numbers))
    parts = _parts_of_families(generators, family, local)
    without = None if test.low_variance is None else _LowVariance(joint, scales, test.low_variance)
    found = []
    for index, (key, numbers) in enumerate(families.items()):
        own = Generators(tuple(parts[index, place] for place, _, _ in key), len(numbers))
        members = tuple(
            FamilyMember(generators.parts[place].parameter, kinds[place], exponent, size)
            for place, exponent, size in key
        )
        certificate = test.certificate(own, None if without is None else partial(without.excuse, own, numbers))
        absorbed = not joint.absorbed.isdisjoint(scales[numbers].tolist())
        kind = "scale" if all(m.exponent is not None and m.exponent > 0 for m in members) else "rescaling"
        remedy = _remedy(kind, members, certificate, absorbed=absorbed)
        found.append(SymmetryFamily(kind, members, len(numbers), certificate, remedy, absorbed, own))
    return tuple(found)


def _members(generators: Generators) -> list[list[_Member]]:
    """What each generator moves of which part."""
    found: list[list[_Member]] = [[] for _ in range(generators.count)]
    for place, part in enumerate(generators.parts):
        exponents = part.coefficients[np.argsort(part.numbers, kind="stable")]
        numbers, sizes = np.unique(part.numbers, return_counts=True)
        first = np.cumsum(sizes) - sizes
        low, high = np.minimum.reduceat(exponents, first), np.maximum.reduceat(exponents, first)
        columns = (x.tolist() for x in (numbers, low, high, sizes))
        for number, least, most, size in zip(*columns, strict=True):
            found[number].append((place, least if least == most else None, size))
    return found


def _parts_of_families(
    generators: Generators, family: NDArray[np.int64], local: NDArray[np.int64]
) -> dict[tuple[int, int], Part]:
    """The part of each family in each part of all generators, by their numbers."""
    found = {}
    for place, part in enumerate(generators.parts):
        order = np.argsort(family[part.numbers], kind="stable")
        owners = family[part.numbers][order]
        for chosen in np.split(order, np.flatnonzero(np.diff(owners)) + 1):
            index = int(family[part.numbers[chosen[0]]])
            found[index, place] = Part(
                part.parameter,
                part.partition,
                part.groups[chosen],
                local[part.numbers[chosen]],
                part.coefficients[chosen],
            )
    return found


class _LowVariance:
    """The symmetries of a family of which the pass could tell nothing: what absorbs or follows them has no variance."""

    def __init__(self, joint: JointStructure, scales: NDArray[np.int64], low_variance: LowVariance) -> None:
        self.joint, self.scales, self.low_variance = joint, scales, low_variance

    @cached_property
    def absorbed(self) -> dict[int, Places]:
        """The places of all scales."""
        return self.low_variance.scales(self.joint.scales, self.joint.absorptions)

    def excuse(self, own: Generators, numbers: list[int], asked: NDArray[np.bool_]) -> dict[int, Places]:
        """The places of those generators of a family that are asked for."""
        found = {}
        for number in np.flatnonzero(asked).tolist():
            places = dict(self.absorbed.get(int(self.scales[numbers[number]]), {}))
            for part in own.parts:
                places.update(self.low_variance.behind(part.parameter, part.groups[part.numbers == number].tolist()))
            found.update({number: places} if places else {})
        return found


def _remedy(kind: str, members: tuple[FamilyMember, ...], certificate: Certificate, *, absorbed: bool) -> str:
    if certificate.verdict == "not invariant":
        return "leave it and report a bug: structure and certificate contradict each other"
    if kind == "scale":
        return (
            "keep each group on a sphere" if len(members) == 1 else "keep each group on one sphere across its tensors"
        )
    if absorbed:
        return "leave it: running statistics and eps would have to be rescaled with it"
    return "balance: rescale to the smallest norm; the function stays the same"


# ---- weights of which only some filters are scale-invariant, as the queries and keys of a fused projection -----------
# The families explain and certify such groups. A manifold holds a whole weight, so they are left where they are; the
# finding of the weight says how many there are and what could be done.


def with_mixed_weights(
    findings: Sequence[WeightFinding], families: Sequence[SymmetryFamily]
) -> tuple[tuple[WeightFinding, ...], tuple[SymmetryFamily, ...]]:
    """Mark the weights of which only some filters are invariant, and the families that explain this.

    Args:
        findings: the finding of each weight.
        families: the certified symmetries of the network.
    """
    split = {w.name for w in findings if w.partition is None and w.status == "not invariant"}
    shapes = {w.name: w.shape for w in findings}
    groups = dict.fromkeys(split, 0)
    filters = dict.fromkeys(split, 0)
    marked = []
    for family in families:
        weights = [member for member in family.members if member.parameter in shapes]
        name = weights[0].parameter if len(weights) == 1 else ""
        if family.kind != "scale" or name not in split or weights[0].part != "rows":
            marked.append(family)
            continue
        remedy = family.remedy
        if family.certificate.verdict == "invariant":
            groups[name] += family.count
            filters[name] += family.count * weights[0].size
            remedy = _LEAVE
        marked.append(replace(family, remedy=remedy, partial=True))
    counted = [_with_count(w, groups[w.name], filters[w.name]) if groups.get(w.name) else w for w in findings]
    return tuple(counted), tuple(marked)


def _with_count(finding: WeightFinding, groups: int, filters: int) -> WeightFinding:
    count = finding.shape[0]
    each = f"{groups} group{'s' if groups > 1 else ''} of its filters"
    if filters == count:
        reason, remedy = f"{each} are invariant, all {count} of them, with concatenated biases", _TOGETHER
    else:
        reason, remedy = f"{each}, {filters} of {count}, are invariant by themselves, the others are not", _SPLIT
    # Where structure alone found free filters, it says why the others are not.
    because = (finding.broken_by or "").partition(": ")[2] if finding.free_filters else ""
    because = f": {because}" if because else ""
    return replace(finding, broken_by=reason + because, remedy=remedy, free_groups=groups, free_filters=filters)
