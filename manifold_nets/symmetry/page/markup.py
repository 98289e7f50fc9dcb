"""The small pieces that every part of the page is made of: escaped text, numbers, and the marks of the statuses."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from manifold_nets.symmetry.report import Certificate, WeightFinding

__all__ = [
    "STATUSES",
    "Status",
    "certificate_text",
    "dotted",
    "escape",
    "facts",
    "groups_text",
    "listed",
    "mark",
    "number",
    "plural",
    "status_style",
    "symbols",
    "table",
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
        "Structure and certificate contradict each other.",
    ),
}


_OTHER = Status("unknown", "", "A status that this page does not know.")


def status_style(status: str) -> Status:
    """Look and meaning of a status."""
    return STATUSES.get(status, _OTHER)


def escape(text: object) -> str:
    """Text that is safe in an element and in a quoted attribute."""
    return html.escape(str(text), quote=True)


def dotted(name: object) -> str:
    """A qualified name that a narrow page may break after its dots."""
    return escape(name).replace(".", ".<wbr>")


_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def number(value: float) -> str:
    """Three significant digits, or two and a power of ten.

    Example:
        >>> number(0.123456), number(3.2e-17), number(1e-8)
        ('0.123', '3.2×10⁻¹⁷', '10⁻⁸')
    """
    if not value or 1e-3 <= abs(value) < 1e4 or not math.isfinite(value):
        return f"{value:.3g}"
    digits, power = f"{value:.1e}".split("e")
    raised = f"10{str(int(power)).translate(_RAISED)}"
    return raised if digits == "1.0" else f"{digits}×{raised}"


def plural(count: int, noun: str) -> str:
    """A count and its noun.

    Example:
        >>> plural(1, "weight"), plural(2, "weight"), plural(2, "symmetry")
        ('1 weight', '2 weights', '2 symmetries')
    """
    if count != 1:
        noun = f"{noun[:-1]}ies" if noun.endswith("ry") else f"{noun}s"
    return f"{count} {noun}"


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
        return f"the whole tensor of {partition.group_size} entries"
    if finding.filters_per_group == 1:
        return f"{plural(partition.n_groups, 'filter')} of {partition.group_size}"
    joined = f"{finding.filters_per_group} filters each"
    return f"{plural(partition.n_groups, 'group')} of {partition.group_size}, {joined}"


def certificate_text(certificate: Certificate) -> str:
    """Verdict and value of a certificate, and how many groups it spoke of."""
    value = "" if certificate.value is None else f", largest value {number(certificate.value)}"
    counts: Iterable[tuple[int, str]] = (
        (certificate.groups_certified, "certified"),
        (certificate.groups_refuted, "refuted"),
        (certificate.groups_without_evidence, "without evidence"),
    )
    said = ", ".join(f"{plural(count, 'group')} {what}" for count, what in counts if count)
    return f"{certificate.verdict}{value}" + (f" ({said})" if said else "")


def facts(pairs: Iterable[tuple[str, str]]) -> str:
    """Names and what is to be said of them; the latter is markup."""
    return "<dl>" + "".join(f"<div><dt>{name}</dt><dd>{text}</dd></div>" for name, text in pairs) + "</dl>"


def listed(items: Iterable[str]) -> str:
    """Markup of distinct items: a list, or the only one by itself."""
    texts = list(dict.fromkeys(items))
    if len(texts) == 1:
        return texts[0]
    return f"<ul>{''.join(f'<li>{text}</li>' for text in texts)}</ul>"


def table(caption: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table whose cells hold markup. The roles keep it one for screen readers where narrow pages stack its cells."""
    columns = "".join(f'<th scope="col" role="columnheader">{text}</th>' for text in head)
    lines = "".join(
        f'<tr role="row"><th scope="row" role="rowheader">{first}</th>'
        + "".join(f'<td role="cell" data-label="{name}">{text}</td>' for name, text in zip(head[1:], rest, strict=True))
        + "</tr>"
        for first, *rest in rows
    )
    return (
        f'<table role="table"><caption class="unseen">{caption}</caption>'
        f'<thead role="rowgroup"><tr role="row">{columns}</tr></thead><tbody role="rowgroup">{lines}</tbody></table>'
    )
