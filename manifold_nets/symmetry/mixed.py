"""Weights of which only some filters are scale-invariant, as the queries and keys of a fused projection.

The families of the joint walk explain and certify such groups. A manifold holds a whole weight, so they are left where
they are; the finding of the weight says how many there are and what could be done.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from manifold_nets.symmetry.report import SymmetryFamily, WeightFinding

__all__ = ["with_mixed_weights"]

_LEAVE = "leave it: a manifold holds a whole weight, and its other filters are not invariant"
_SPLIT = f"{_LEAVE}; with its invariant filters as a parameter of their own they can go on spheres"
_TOGETHER = "leave it: biases that are put together from parts would have to follow"


def with_mixed_weights(
    findings: Sequence[WeightFinding], families: Sequence[SymmetryFamily]
) -> tuple[tuple[WeightFinding, ...], tuple[SymmetryFamily, ...]]:
    """Say of weights, and of the families that explain it, that only some of their filters are invariant.

    Args:
        findings: what structure and certificate say of each weight.
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
        reason, remedy = f"{each} are invariant, all {count} of them, with biases that are put together", _TOGETHER
    else:
        reason, remedy = f"{each}, {filters} of {count}, are invariant by themselves, the others are not", _SPLIT
    # Where structure alone found free filters, it says why the others are not.
    because = (finding.broken_by or "").partition(": ")[2] if finding.free_filters else ""
    because = f": {because}" if because else ""
    return replace(finding, broken_by=reason + because, remedy=remedy, free_groups=groups, free_filters=filters)
