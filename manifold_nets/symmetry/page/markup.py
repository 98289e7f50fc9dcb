"""What the parts of the page have in common: the marks of the statuses, and groups and certificates in words."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from manifold_nets.page.markup import escape, number, plural
from manifold_nets.symmetry.report import Certificate, ShiftSymmetry, SymmetryFamily, WeightFinding

__all__ = [
    "STATUSES",
    "Status",
    "certificate_text",
    "groups_text",
    "mark",
    "remedy_text",
    "status_style",
    "symbols",
]


@dataclass(frozen=True)
class Status:
    """How a status looks and what it means.

    Args:
        css: name of its style class and of its mark.
        shape: its mark, drawn in a square from −5 to 5; no two are told apart by colour alone.
        meaning: what a reader should know.
    """

    css: str
    shape: str
    meaning: str


STATUSES = {
    "invariant": Status(
        "invariant", '<circle r="4.5"/>', "The network does not see the scale of its groups: explained and certified."
    ),
    "constrained": Status(
        "constrained",
        '<path d="M0-5.2 5.2 0 0 5.2-5.2 0z"/>',
        "Invariant, and its groups are on their spheres already.",
    ),
    "not invariant": Status(
        "fixed", '<circle r="3.8" class="hollow"/>', "Its scale matters to what the network computes."
    ),
    "unknown": Status(
        "unknown", '<path d="M0-5 5 4.2h-10z" class="hollow"/>', "An operation without a rule lies on its way."
    ),
    "no evidence": Status(
        "silent", '<path d="M-4.5 0h9" class="hollow"/>', "Its gradient vanishes on the example inputs."
    ),
    "disagreement": Status(
        "disagreement",
        '<path d="M-4-4 4 4M4-4-4 4" class="hollow"/>',
        "Structure, certificate and finite moves contradict each other.",
    ),
}


_OTHER = Status("unknown", "", "A status that this page does not know.")


def status_style(status: str) -> Status:
    """Look and meaning of a status."""
    return STATUSES.get(status, _OTHER)


def symbols() -> str:
    """The marks of all statuses, to be drawn with `mark`."""
    marks = "".join(
        f'<symbol id="m-{status.css}" viewBox="-6 -6 12 12" overflow="visible">{status.shape}</symbol>'
        for status in STATUSES.values()
    )
    return f'<svg class="defs" aria-hidden="true" width="0" height="0">{marks}</svg>'


def mark(status: str, title: str = "") -> str:
    """The mark of a status in a line of text; hidden from screen readers, as the status is written out beside it."""
    css = status_style(status).css
    tip = f"<title>{escape(title)}</title>" if title else ""
    return f'<svg class="mark s-{css}" aria-hidden="true" width="12" height="12">{tip}<use href="#m-{css}"/></svg>'


def groups_text(finding: WeightFinding) -> str:
    """What the invariant groups of a weight are, in words."""
    partition = finding.partition
    if partition is None:
        return ""
    if not partition.kept:
        finer = f" (no view expresses its {finding.finer_groups} finer groups)" if finding.finer_groups else ""
        return f"the whole tensor of {partition.group_size} entries{finer}"
    if finding.filters_per_group == 1:
        return f"{plural(partition.n_groups, 'filter')} of {partition.group_size}"
    joined = f"{finding.filters_per_group} filters each"
    return f"{plural(partition.n_groups, 'group')} of {partition.group_size}, {joined}"


def remedy_text(found: WeightFinding | SymmetryFamily | ShiftSymmetry) -> str:
    """What to do, and the name under which `convert` does it."""
    name = found.convert_remedy
    return escape(found.remedy) + (f" (<code>convert --remedies {name}</code>)" if name else "")


def certificate_text(certificate: Certificate) -> str:
    """Verdict and value of a certificate, and how many groups it spoke of."""
    value = "" if certificate.value is None else f", largest value {number(certificate.value)}"
    counts: Iterable[tuple[int, str]] = (
        (certificate.groups_certified, "certified"),
        (certificate.groups_refuted, "refuted"),
        (certificate.groups_without_evidence, "without evidence"),
    )
    said = ", ".join(f"{plural(count, 'group')} {what}" for count, what in counts if count)
    because = f"; {certificate.because}" if certificate.because else ""
    return (
        f"{certificate.verdict}{value}"
        + certificate.contradiction
        + (f" ({said})" if said else "")
        + certificate.place
        + because
    )
