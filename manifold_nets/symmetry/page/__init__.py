"""The report as one self-contained HTML page: no network access, no scripts, light or dark, of any width."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import resources

from torch import Tensor, nn

from manifold_nets.errors import ReportMismatchError
from manifold_nets.files import atomic_file
from manifold_nets.page import Section, document
from manifold_nets.page.markup import dotted, escape, listed, plural, table
from manifold_nets.symmetry.page.drawings import (
    STATUSES,
    Norms,
    card,
    certificate_chart,
    certificate_text,
    group_norms,
    groups_text,
    histogram,
    mark,
    remedy_text,
    status_style,
    symbols,
)
from manifold_nets.symmetry.page.graph import network
from manifold_nets.symmetry.report import FamilyMember, ShiftSymmetry, SymmetryFamily, SymmetryReport, WeightFinding

__all__ = ["page_html", "write_page"]


def write_page(report: SymmetryReport, model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write the page of `page_html` to a file, atomically: a reader finds either the old file or the complete new one.

    Args:
        report: the report of `diagnose`.
        model: its model.
        path: the file; its folder must exist.

    Raises:
        ReportMismatchError: the model lacks a weight of the report, or has it in another shape.
        OSError: the file cannot be written.

    Example:
        >>> import tempfile, manifold_nets, torch
        >>> net = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_page(manifold_nets.diagnose(net, torch.randn(4, 5)), net, f"{folder}/report.html")
        ...     os.listdir(folder)
        ['report.html']
    """
    text = page_html(report, model)
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def page_html(report: SymmetryReport, model: nn.Module) -> str:
    """Return the report as a self-contained HTML page.

    It holds a summary in words, the network's graph, the certificate values, the remedies, and for each weight its
    groups, a histogram of their norms, what absorbs them and what must change with them, or why it has none.

    Args:
        report: the report of `diagnose`.
        model: its model, whose weights give the norms.

    Raises:
        ReportMismatchError: the model lacks a weight of the report, or has it in another shape.
    """
    weights = dict(model.named_parameters(remove_duplicate=False))
    other = [w.name for w in report.weights if w.name not in weights or tuple(weights[w.name].shape) != w.shape]
    if other:
        raise ReportMismatchError(type(model).__name__, report.model, other)
    anchors = {finding.name: f"w{i}" for i, finding in enumerate(report.weights)}
    style = resources.files("manifold_nets.symmetry.page").joinpath("page.css").read_text(encoding="utf-8")
    sections = [
        Section("summary", "Summary", _summary(report)),
        Section("network", "The network", _network(report, anchors)),
        Section("certificates", "Certificates", _certificates(report)),
        Section("families", "Symmetries of several weights", _families(report)),
        Section("shifts", "Shifts", _shifts(report)),
        Section("remedies", "Remedies", _remedies(report, anchors)),
        Section("weights", "All weights", _weights(report, weights, anchors)),
    ]
    return document(report.model, "weight symmetries", sections, style=style, before=symbols())


# ---- summary ---------------------------------------------------------------------------------------------------------


def _summary(report: SymmetryReport) -> str:
    rows = []
    for status, n in sorted(report.counts().items(), key=lambda item: _rank(item[0])):
        entries = sum(math.prod(w.shape) for w in report.weights if w.status == status)
        count = f'<span class="figure">{entries:,}</span>'.replace(",", "\u202f")
        rows.append((f"{mark(status)} {escape(status)}", str(n), count, escape(status_style(status).meaning)))
    counted = table("Weights by status", ("Status", "Weights", "Entries", "Meaning"), rows)
    return f'<p class="lead">{" ".join(_sentences(report))}</p>{counted}'


def _sentences(report: SymmetryReport) -> Iterator[str]:
    counts, total = report.counts(), len(report.weights)
    on_spheres, free = counts.get("constrained", 0), counts.get("invariant", 0)
    groups = sum(w.partition.n_groups for w in report.invariant if w.partition is not None)
    found = f"{free + on_spheres or 'none'} {'is' if free + on_spheres < 2 else 'are'}"
    seen = f": {plural(groups, 'group')} of entries whose norm has no effect on the output." if groups else "."
    yield f"Of {plural(total, 'weight')} with at least two dimensions, {found} scale-invariant{seen}"
    if free:
        what = "It" if free == 1 else f"All {free} of them" if not on_spheres else f"{free} of them"
        yield f"{what} can be put on spheres with <code>manifold_nets.convert</code>, which keeps the function."
    if on_spheres:
        yield f"{on_spheres} {'is' if on_spheres == 1 else 'are'} on spheres already."
    joint = ("families", joint_families(report), "of several weights"), ("shifts", report.shifts, "by shifts")
    for place, symmetries, what in joint:
        if count := sum(one.count for one in symmetries if one.certificate.verdict == "invariant"):
            yield f'<a href="#{place}">{plural(count, "further symmetry")} {what}</a>.'
    if report.unexplained:
        further = plural(report.unexplained_groups + report.unexplained_shifts, "further group")
        named = "; ".join(escape(str(found)) for found in report.unexplained[:5])
        more = f" and {len(report.unexplained) - 5} more" if report.unexplained[5:] else ""
        yield f"By the certificate, {further} that the structure does not explain are invariant: {named}{more}."
    if report.not_searched:
        yield f"Left out: {escape(report.not_searched)}."
    if total and not groups:
        yield "There is nothing to convert."
    if report.disagreements:
        names = ", ".join(escape(w.name) for w in report.disagreements)
        yield f"<strong>Structure, certificate and finite moves contradict each other for {names}: leave them.</strong>"


def _rank(status: str) -> int:
    known = list(STATUSES)
    return known.index(status) if status in known else len(known)


# ---- graph and certificates ------------------------------------------------------------------------------------------


def _network(report: SymmetryReport, anchors: Mapping[str, str]) -> str:
    if not report.graph:
        return ""
    legend = "".join(f"<li>{mark(status)} {escape(status)}</li>" for status in sorted(report.counts(), key=_rank))
    shapes = {
        "normalization that absorbs a scale": '<rect class="absorbs" x="-5" y="-5" width="10" height="10" rx="2"/>',
        "other normalization": '<rect class="passes" x="-5" y="-5" width="10" height="10" rx="2"/>',
        "joins several results": '<path class="join" d="M-4 0h8M0-4v8"/>',
        "other step": '<circle class="step" r="2.5"/>',
    }
    legend += "".join(
        '<li><svg class="mark" aria-hidden="true" width="12" height="12" viewBox="-6 -6 12 12">'
        f"{shape}</svg> {text}</li>"
        for text, shape in shapes.items()
    )
    return (
        "<p>Steps in the order of execution, from top to bottom; a weight's mark tells its status. "
        "Lines beside the steps carry results past them.</p>"
        f'<ul class="legend" aria-label="Legend">{legend}</ul>{network(report, anchors)}'
    )


def _certificates(report: SymmetryReport) -> str:
    if not report.weights:
        return ""
    return (
        "<p>For each weight, in the order of the model, the largest value over its groups of "
        "|⟨w, ∂L/∂w⟩| / (‖w‖ ‖∂L/∂w‖), in float64. For an invariant group this is rounding error; for other groups it "
        f"is of order one.</p>{certificate_chart(report)}"
    )


# ---- symmetries that are not the scale of one weight -----------------------------------------------------------------

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


def _families(report: SymmetryReport) -> str:
    joint = joint_families(report)
    kinds = {
        "scale": "in a <em>scale</em> family all members grow together, and a normalization absorbs this",
        "rescaling": "in a <em>rescaling</em> family some members shrink as others grow",
    }
    meant = "; ".join(kinds[kind] for kind in kinds if any(family.kind == kind for family in joint))
    cards = [_symmetry(family, family.kind, [("Members", listed(map(_member, family.members)))]) for family in joint]
    return _cards(
        "Each symmetry of a family multiplies parts of several parameters by powers of one factor α without changing "
        f"the function: {meant}.", cards,
    )  # fmt: skip


def _shifts(report: SymmetryReport) -> str:
    cards = []
    for shift in report.shifts:
        pairs = [("Shifted", listed(map(dotted, shift.parameters)))]
        if shift.absorbers:
            pairs.append(("Absorbed by", listed(map(dotted, shift.absorbers))))
        if shift.condition:
            pairs.append(("Holds", escape(shift.condition)))
        cards.append(_symmetry(shift, "shift", pairs))
    text = "Constants can be added to these parameters without changing the network's output in training mode."
    return _cards(text, cards)


def _cards(introduction: str, cards: Sequence[str]) -> str:
    return f'<p>{introduction}</p><ul class="cards">{"".join(cards)}</ul>' if cards else ""


def _symmetry(found: SymmetryFamily | ShiftSymmetry, shape: str, pairs: Sequence[tuple[str, str]]) -> str:
    css = {"scale": "s-constrained", "shift": "s-silent"}.get(shape, "s-invariant")
    refuted, names = found.certificate.verdict == "not invariant", found.parameters
    picture = (
        f'<svg class="mark {"s-disagreement" if refuted else css}" aria-hidden="true" width="14" height="14" '
        f'viewBox="-7 -7 14 14">{_SHAPES.get(shape, "")}</svg>'
    )
    name = dotted(names[0]) + (f" and {len(names) - 1} more" if len(names) > 1 else "")
    said = f"{escape(found.kind)}{', refuted' if refuted else ''} · {plural(found.count, 'symmetry')}"
    rest = [("Certificate", escape(certificate_text(found.certificate))), ("Remedy", remedy_text(found))]
    return card(picture, name, said, [*pairs, *rest])


def _member(member: FamilyMember) -> str:
    if member.exponent is None:
        power = "×\u00a0α to different powers"
    else:
        power = "×\u00a0α" if member.exponent == 1 else f"×\u00a0α<sup>{member.exponent:g}</sup>".replace("-", "\u2212")
    return f"{dotted(member.parameter)} {escape(member.part)} {power}"


# ---- remedies --------------------------------------------------------------------------------------------------------


def _remedies(report: SymmetryReport, anchors: Mapping[str, str]) -> str:
    names: dict[str, list[str]] = {}
    for finding in sorted(report.weights, key=lambda w: _rank(w.status)):
        link = f'<a href="#{anchors[finding.name]}">{dotted(finding.name)}</a>'
        names.setdefault(finding.remedy, []).append(link)
    rows = []
    for remedy, links in names.items():
        where = ", ".join(links)
        if len(links) > 6:
            where = f"<details><summary>{plural(len(links), 'weight')}</summary>{where}</details>"
        rows.append((escape(remedy[:1].upper() + remedy[1:]), where))
    rows += [*_further(joint_families(report), "families"), *_further(report.shifts, "shifts")]
    return table("Remedies", ("What to do", "Where"), rows) if rows else ""


def _further(found: Sequence[SymmetryFamily | ShiftSymmetry], section: str) -> Iterator[tuple[str, str]]:
    """What to do about symmetries that are not the scale of one weight; their own section tells where."""
    counts: dict[str, int] = {}
    for symmetry in found:
        # Beside what is done stands in brackets what differs from one to the next.
        remedy, name = symmetry.remedy.partition(" (")[0], symmetry.convert_remedy
        text = escape(remedy[:1].upper() + remedy[1:]) + (f" (<code>convert --remedies {name}</code>)" if name else "")
        counts[text] = counts.get(text, 0) + symmetry.count
    for text, count in counts.items():
        yield text, f'<a href="#{section}">{plural(count, "symmetry")}</a>'


# ---- weights ---------------------------------------------------------------------------------------------------------


def _weights(report: SymmetryReport, weights: Mapping[str, Tensor], anchors: Mapping[str, str]) -> str:
    introduction = (
        "Histograms show the norms of the invariant groups, or of the filters along axis 0 where a weight has "
        "no such groups."
    )
    return _cards(introduction, [_weight(w, weights[w.name].detach(), anchors[w.name]) for w in report.weights])


def _weight(finding: WeightFinding, weight: Tensor, anchor: str) -> str:
    norms, small, large = group_norms(finding, weight), "", ""
    if norms is not None and norms.values:
        small, large = histogram(norms, 72, 26), histogram(norms, 260, 90, labelled=True)
    said = f"{escape(finding.status)} · {escape(groups_text(finding) or finding.layer)}"
    pairs = _facts(finding, norms)
    return card(mark(finding.status), dotted(finding.name), said, pairs, anchor=anchor, small=small, large=large)


def _facts(finding: WeightFinding, norms: Norms | None) -> Iterable[tuple[str, str]]:
    yield "Layer", f"{escape(finding.layer)}, shape {' × '.join(map(str, finding.shape))}"
    yield "Status", f"{escape(finding.status)}. {escape(status_style(finding.status).meaning)}"
    if finding.partition is not None:
        yield "Groups", escape(groups_text(finding))
    if finding.absorbers:
        absorbers = (f"{a}, {a.kind} statistics" if a.kind != "weight" else str(a) for a in finding.absorbers)
        yield "Absorbed by", listed(map(escape, absorbers))
    if finding.moves_along:
        yield "Moves along", listed(map(dotted, finding.moves_along))
    if finding.broken_by:
        yield "Why not", escape(finding.broken_by)
    yield "Certificate", escape(certificate_text(finding.certificate))
    if norms is not None:
        yield "Norms", escape(norms)
    yield "Remedy", remedy_text(finding)
