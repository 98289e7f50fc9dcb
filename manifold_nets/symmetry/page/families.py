"""The symmetries that are not the scale of one weight: families that join several weights, and shifts."""

from __future__ import annotations

from collections.abc import Sequence

from manifold_nets.page.markup import dotted, escape, facts, listed, plural
from manifold_nets.symmetry.page.markup import certificate_text, remedy_text
from manifold_nets.symmetry.report import FamilyMember, ShiftSymmetry, SymmetryFamily, SymmetryReport

__all__ = ["families", "joint_families", "shifts"]

# Two arrows the same way, and two arrows against each other: no colour is needed to tell the kinds apart.
_SHAPES = {
    "scale": '<path class="hollow" d="M-3 5v-9m-2.5 2.5L-3-4l2.5 2.5M3 5v-9m-2.5 2.5L3-4l2.5 2.5"/>',
    "rescaling": '<path class="hollow" d="M-3 5v-9m-2.5 2.5L-3-4l2.5 2.5M3-4v9m-2.5-2.5L3 5l2.5-2.5"/>',
    "shift": '<path class="hollow" d="M-5 0h10M0-5v10"/>',
}


def joint_families(report: SymmetryReport) -> list[SymmetryFamily]:
    """The families of a report without those that scale one whole weight, which are findings of that weight."""
    weights = {finding.name for finding in report.weights}
    return [f for f in report.families if f.kind != "scale" or f.partial or len(weights.intersection(f.parameters)) > 1]


def families(report: SymmetryReport) -> str:
    """List the families that join several weights or move some filters of one; empty where there are none."""
    joint = joint_families(report)
    if not joint:
        return ""
    kinds = {family.kind for family in joint}
    told = []
    if "scale" in kinds:
        told.append("in a <em>scale</em> family all members grow together and a normalization removes it")
    if "rescaling" in kinds:
        told.append("in a <em>rescaling</em> family some members shrink as others grow")
    cards = "".join(_card(family) for family in joint)
    return (
        f"<p>Each symmetry of a family multiplies parts of several parameters by powers of one factor α, and the "
        f'function stays: {"; ".join(told)}.</p><ul class="cards">{cards}</ul>'
    )


def _card(family: SymmetryFamily) -> str:
    css = "s-constrained" if family.kind == "scale" else "s-invariant"
    told = [("Members", listed(map(_member, family.members)))]
    return _folded(family, family.parameters, _SHAPES.get(family.kind, ""), css, told)


def shifts(report: SymmetryReport) -> str:
    """List the shifts of a report; empty where it has none."""
    if not report.shifts:
        return ""
    cards = []
    for shift in report.shifts:
        told = [("Shifted", listed(map(dotted, shift.parameters)))]
        if shift.absorbers:
            told.append(("Absorbed by", listed(map(dotted, shift.absorbers))))
        if shift.condition:
            told.append(("Holds", escape(shift.condition)))
        cards.append(_folded(shift, shift.parameters, _SHAPES["shift"], "s-silent", told))
    return (
        "<p>Constants that can be added to these parameters without a change in what the network computes in "
        f'training mode.</p><ul class="cards">{"".join(cards)}</ul>'
    )


def _folded(
    found: SymmetryFamily | ShiftSymmetry, names: Sequence[str], shape: str, css: str, told: Sequence[tuple[str, str]]
) -> str:
    refuted = found.certificate.verdict == "not invariant"
    css, doubt = ("s-disagreement", ", refuted") if refuted else (css, "")
    others = f" and {len(names) - 1} more" if len(names) > 1 else ""
    rest = [("Certificate", escape(certificate_text(found.certificate))), ("Remedy", remedy_text(found))]
    return (
        f'<li><details class="card"><summary><svg class="mark {css}" aria-hidden="true" width="14" height="14" '
        f'viewBox="-7 -7 14 14">{shape}</svg><span class="who"><span class="name">{dotted(names[0])}{others}</span>'
        f'<span class="said">{escape(found.kind)}{doubt} · {plural(found.count, "symmetry")}</span></span></summary>'
        f'<div class="body">{facts([*told, *rest])}</div></details></li>'
    )


def _member(member: FamilyMember) -> str:
    if member.exponent is None:
        power = "×\u00a0α to different powers"
    else:
        power = "×\u00a0α" if member.exponent == 1 else f"×\u00a0α<sup>{member.exponent:g}</sup>".replace("-", "\u2212")
    return f"{dotted(member.parameter)} {escape(member.part)} {power}"
