"""The families of symmetries that move several weights at once."""

from __future__ import annotations

from manifold_nets.symmetry.page.markup import certificate_text, dotted, escape, facts, listed, plural
from manifold_nets.symmetry.report import FamilyMember, SymmetryFamily, SymmetryReport

__all__ = ["families"]

# Two arrows the same way, and two arrows against each other: no colour is needed to tell the kinds apart.
_SHAPES = {
    "scale": '<path class="hollow" d="M-3 5v-9m-2.5 2.5L-3-4l2.5 2.5M3 5v-9m-2.5 2.5L3-4l2.5 2.5"/>',
    "rescaling": '<path class="hollow" d="M-3 5v-9m-2.5 2.5L-3-4l2.5 2.5M3-4v9m-2.5-2.5L3 5l2.5-2.5"/>',
}


def families(report: SymmetryReport) -> str:
    """List the families of a report, without those that scale one weight only; empty where there are no others."""
    weights = {finding.name for finding in report.weights}
    joint = [f for f in report.families if f.kind != "scale" or len(weights.intersection(f.parameters)) > 1]
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
    refuted = family.certificate.verdict == "not invariant"
    css = "s-disagreement" if refuted else "s-constrained" if family.kind == "scale" else "s-invariant"
    shape = _SHAPES.get(family.kind, "")
    first = family.parameters[0] if family.parameters else ""
    more = len(family.parameters) - 1
    others = f" and {more} more" if more > 0 else ""
    count = plural(family.count, "symmetry").replace("symmetrys", "symmetries")
    told = [
        ("Members", listed(map(_member, family.members))),
        ("Certificate", escape(certificate_text(family.certificate))),
        ("Remedy", escape(family.remedy)),
    ]
    return (
        f'<li><details class="card"><summary><svg class="mark {css}" aria-hidden="true" width="14" height="14" '
        f'viewBox="-7 -7 14 14">{shape}</svg><span class="who"><span class="name">{dotted(first)}{others}</span>'
        f'<span class="said">{escape(family.kind)}{", refuted" if refuted else ""} · {count}</span></span></summary>'
        f'<div class="body">{facts(told)}</div></details></li>'
    )


def _member(member: FamilyMember) -> str:
    if member.exponent is None:
        power = "×\u00a0α to different powers"
    else:
        power = "×\u00a0α" if member.exponent == 1 else f"×\u00a0α<sup>{member.exponent:g}</sup>".replace("-", "\u2212")
    return f"{dotted(member.parameter)} {escape(member.part)} {power}"
