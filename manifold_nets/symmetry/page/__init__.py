"""The report as one HTML page that needs nothing else: no network, no scripts, light or dark, of any width."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import resources

from torch import Tensor, nn

from manifold_nets.errors import ReportMismatchError
from manifold_nets.files import atomic_file
from manifold_nets.page import Section, document
from manifold_nets.page.markup import dotted, escape, facts, listed, plural, table
from manifold_nets.symmetry.page.charts import Norms, certificate_chart, group_norms, histogram
from manifold_nets.symmetry.page.families import families, joint_families, shifts
from manifold_nets.symmetry.page.markup import (
    STATUSES,
    certificate_text,
    groups_text,
    mark,
    remedy_text,
    status_style,
    symbols,
)
from manifold_nets.symmetry.page.network import network
from manifold_nets.symmetry.report import ShiftSymmetry, SymmetryFamily, SymmetryReport, WeightFinding

__all__ = ["page_html", "write_page"]


def write_page(report: SymmetryReport, model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write the page of `page_html` to a file, atomically: a reader finds the old file or the whole new one.

    Args:
        report: what `diagnose` found.
        model: the model that it was found in.
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
    groups, a histogram of their norms, what absorbs them and what moves along, or why it has none.

    Args:
        report: what `diagnose` found.
        model: the model that it was found in; the norms are those of its weights.

    Raises:
        ReportMismatchError: the model lacks a weight of the report, or has it in another shape.
    """
    weights = _weights_of(report, model)
    anchors = {finding.name: f"w{i}" for i, finding in enumerate(report.weights)}
    style = resources.files("manifold_nets.symmetry.page").joinpath("page.css").read_text(encoding="utf-8")
    sections = [
        Section("summary", "Summary", _summary(report)),
        Section("network", "The network", _network(report, anchors)),
        Section("certificates", "Certificates", _certificates(report)),
        Section("families", "Symmetries that join several weights", families(report)),
        Section("shifts", "Shifts", shifts(report)),
        Section("remedies", "Remedies", _remedies(report, anchors)),
        Section("weights", "The weights one by one", _weights(report, weights, anchors)),
    ]
    return document(report.model, "weight symmetries", sections, style=style, before=symbols())


def _weights_of(report: SymmetryReport, model: nn.Module) -> dict[str, Tensor]:
    found = dict(model.named_parameters(remove_duplicate=False))
    other = [w.name for w in report.weights if w.name not in found or tuple(found[w.name].shape) != w.shape]
    if other:
        raise ReportMismatchError(type(model).__name__, report.model, other)
    return {finding.name: found[finding.name].detach() for finding in report.weights}


# ---- sections --------------------------------------------------------------------------------------------------------


def _summary(report: SymmetryReport) -> str:
    counts, total = report.counts(), len(report.weights)
    on_spheres, free = counts.get("constrained", 0), counts.get("invariant", 0)
    groups = sum(w.partition.n_groups for w in report.invariant if w.partition is not None)
    found = f"{free + on_spheres or 'none'} {'is' if free + on_spheres < 2 else 'are'}"
    said = [f"Of {plural(total, 'weight')} with at least two dimensions, {found} scale-invariant"]
    said[0] += f": {plural(groups, 'group')} of entries whose length the network does not see." if groups else "."
    if free:
        what = "It" if free == 1 else f"All {free} of them" if not on_spheres else f"{free} of them"
        said.append(f"{what} can be put on spheres with <code>manifold_nets.convert</code>: the function stays.")
    if on_spheres:
        said.append(f"{on_spheres} {'is' if on_spheres == 1 else 'are'} on spheres already.")
    for place, count, what in (
        ("families", _certified(joint_families(report)), "join several weights"),
        ("shifts", _certified(report.shifts), "are shifts"),
    ):
        if count:
            said.append(f'<a href="#{place}">{plural(count, "further symmetry")} {what}</a>.')
    if report.unexplained:
        further = plural(report.unexplained_groups + report.unexplained_shifts, "further group")
        named = "; ".join(escape(str(found)) for found in report.unexplained[:5])
        more = f" and {len(report.unexplained) - 5} more" if report.unexplained[5:] else ""
        said.append(f"The certificate calls {further} invariant that structure does not explain: {named}{more}.")
    if report.not_searched:
        said.append(f"Left out: {escape(report.not_searched)}.")
    if total and not groups:
        said.append("There is nothing to convert.")
    if report.disagreements:
        names = ", ".join(escape(w.name) for w in report.disagreements)
        said.append(
            f"<strong>Structure, certificate and finite moves contradict each other for {names}: leave them.</strong>"
        )
    rows = []
    for status, n in sorted(counts.items(), key=lambda item: _rank(item[0])):
        entries = sum(_entries(w) for w in report.weights if w.status == status)
        rows.append(
            (
                f"{mark(status)} {escape(status)}",
                str(n),
                f'<span class="figure">{entries:,}</span>'.replace(",", "\u202f"),
                escape(status_style(status).meaning),
            )
        )
    counted = table("Weights by status", ("Status", "Weights", "Entries", "Meaning"), rows)
    return f'<p class="lead">{" ".join(said)}</p>{counted}'


def _certified(found: Iterable[SymmetryFamily | ShiftSymmetry]) -> int:
    return sum(symmetry.count for symmetry in found if symmetry.certificate.verdict == "invariant")


def _rank(status: str) -> int:
    known = list(STATUSES)
    return known.index(status) if status in known else len(known)


def _entries(finding: WeightFinding) -> int:
    count = 1
    for size in finding.shape:
        count *= size
    return count


def _network(report: SymmetryReport, anchors: Mapping[str, str]) -> str:
    if not report.graph:
        return ""
    used = sorted(report.counts(), key=_rank)
    legend = "".join(f"<li>{mark(status)} {escape(status)}</li>" for status in used)
    shapes = (
        ('<rect class="absorbs" x="-5" y="-5" width="10" height="10" rx="2"/>', "normalization that absorbs a scale"),
        ('<rect class="passes" x="-5" y="-5" width="10" height="10" rx="2"/>', "other normalization"),
        ('<path class="join" d="M-4 0h8M0-4v8"/>', "joins several results"),
        ('<circle class="step" r="2.5"/>', "other step"),
    )
    legend += "".join(
        f'<li><svg class="mark" aria-hidden="true" width="12" height="12" viewBox="-6 -6 12 12">{shape}</svg> '
        f"{text}</li>"
        for shape, text in shapes
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
        "|⟨w, ∂L/∂w⟩| / (‖w‖ ‖∂L/∂w‖), in float64. An invariant group has none but rounding; the values of the others "
        f"are of order one.</p>{certificate_chart(report)}"
    )


def _remedies(report: SymmetryReport, anchors: Mapping[str, str]) -> str:
    names: dict[str, list[str]] = {}
    for finding in sorted(report.weights, key=lambda w: _rank(w.status)):
        link = f'<a href="#{anchors[finding.name]}">{dotted(finding.name)}</a>'
        names.setdefault(finding.remedy, []).append(link)
    rows = []
    for remedy, links in names.items():
        listed = ", ".join(links)
        if len(links) > 6:
            listed = f"<details><summary>{plural(len(links), 'weight')}</summary>{listed}</details>"
        rows.append((escape(remedy[:1].upper() + remedy[1:]), listed))
    rows += [*_further(joint_families(report), "families"), *_further(report.shifts, "shifts")]
    return table("Remedies", ("What to do", "Where"), rows) if rows else ""


def _further(found: Sequence[SymmetryFamily | ShiftSymmetry], section: str) -> Iterator[tuple[str, str]]:
    """What to do about symmetries that are not the scale of one weight; where is told in their own section."""
    counts: dict[str, int] = {}
    for symmetry in found:
        # Beside what is done stands in brackets what differs from one to the next.
        remedy, name = symmetry.remedy.partition(" (")[0], symmetry.convert_remedy
        text = escape(remedy[:1].upper() + remedy[1:]) + (f" (<code>convert --remedies {name}</code>)" if name else "")
        counts[text] = counts.get(text, 0) + symmetry.count
    for text, count in counts.items():
        yield text, f'<a href="#{section}">{plural(count, "symmetry")}</a>'


def _weights(report: SymmetryReport, weights: Mapping[str, Tensor], anchors: Mapping[str, str]) -> str:
    cards = [_card(finding, weights[finding.name], anchors[finding.name]) for finding in report.weights]
    if not cards:
        return ""
    return (
        "<p>Histograms show the norms of the invariant groups, or of the filters along axis 0 where a weight has "
        f'no such groups.</p><ul class="cards">{"".join(cards)}</ul>'
    )


def _card(finding: WeightFinding, weight: Tensor, anchor: str) -> str:
    norms = group_norms(finding, weight)
    drawn = norms is not None and bool(norms.values)
    small = histogram(norms, 72, 26) if norms is not None and drawn else ""
    short = groups_text(finding) or finding.layer
    return (
        f'<li><details class="card"><summary>{mark(finding.status)}<span class="who"><span class="name">'
        f'{dotted(finding.name)}</span><span class="said">{escape(finding.status)} · {escape(short)}</span></span>'
        f"{small}</summary>"
        f'<div id="{anchor}" class="body">{facts(_told(finding, norms))}'
        f"{histogram(norms, 260, 90, labelled=True) if norms is not None and drawn else ''}</div></details></li>"
    )


def _told(finding: WeightFinding, norms: Norms | None) -> Iterable[tuple[str, str]]:
    yield "Layer", f"{escape(finding.layer)}, shape {' × '.join(map(str, finding.shape))}"
    yield "Status", f"{escape(finding.status)}. {escape(status_style(finding.status).meaning)}"
    if finding.partition is not None:
        yield "Groups", escape(groups_text(finding))
    if finding.absorbers:
        yield (
            "Absorbed by",
            listed(escape(f"{a}, {a.kind} statistics" if a.kind != "weight" else a) for a in finding.absorbers),
        )
    if finding.moves_along:
        yield "Moves along", listed(map(dotted, finding.moves_along))
    if finding.broken_by:
        yield "Why not", escape(finding.broken_by)
    yield "Certificate", escape(certificate_text(finding.certificate))
    if norms is not None:
        yield "Norms", escape(norms)
    yield "Remedy", remedy_text(finding)
