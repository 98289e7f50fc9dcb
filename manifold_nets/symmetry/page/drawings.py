"""Elements of the page: marks of the statuses, findings in words, cards, and charts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from manifold_nets.groups import Partition
from manifold_nets.page.markup import escape, facts, number, plural
from manifold_nets.symmetry.report import Certificate, ShiftSymmetry, SymmetryFamily, SymmetryReport, WeightFinding


@dataclass(frozen=True)
class Status:
    """The look and meaning of a status.

    Args:
        css: name of its style class and of its mark.
        shape: its mark, drawn in a square from −5 to 5; no two differ by colour alone.
        meaning: a sentence for the reader.
    """

    css: str
    shape: str
    meaning: str


STATUSES = {
    "invariant": Status(
        "invariant", '<circle r="4.5"/>', "The scale of its groups has no effect: explained and certified."
    ),
    "constrained": Status(
        "constrained",
        '<path d="M0-5.2 5.2 0 0 5.2-5.2 0z"/>',
        "Invariant, and its groups are on their spheres already.",
    ),
    "not invariant": Status("fixed", '<circle r="3.8" class="hollow"/>', "Its scale matters to the function."),
    "unknown": Status("unknown", '<path d="M0-5 5 4.2h-10z" class="hollow"/>', "An operation behind it has no rule."),
    "no evidence": Status(
        "silent", '<path d="M-4.5 0h9" class="hollow"/>', "Its gradient vanishes on the example inputs."
    ),
    "disagreement": Status(
        "disagreement",
        '<path d="M-4-4 4 4M4-4-4 4" class="hollow"/>',
        "Structure, certificate and finite moves contradict each other.",
    ),
}


def status_style(status: str) -> Status:
    """Look and meaning of a status."""
    return STATUSES.get(status, Status("unknown", "", "A status that this page does not know."))


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


# ---- findings in words -----------------------------------------------------------------------------------------------


def groups_text(finding: WeightFinding) -> str:
    """The invariant groups of a weight, in words."""
    partition, joined, finer = finding.partition, finding.filters_per_group, finding.finer_groups
    if partition is None:
        return ""
    if not partition.kept:
        more = f" (joined from {finer} finer groups that no view can express)" if finer else ""
        return f"the whole tensor of {partition.group_size} entries{more}"
    count = plural(partition.n_groups, "filter" if joined == 1 else "group")
    return f"{count} of {partition.group_size}" + (f", {joined} filters each" if joined != 1 else "")


def remedy_text(found: WeightFinding | SymmetryFamily | ShiftSymmetry) -> str:
    """What to do, and the name under which `convert` does it."""
    name = found.convert_remedy
    return escape(found.remedy) + (f" (<code>convert --remedies {name}</code>)" if name else "")


def certificate_text(certificate: Certificate) -> str:
    """The certificate in words, with its number of groups."""
    counts = {
        "certified": certificate.groups_certified,
        "refuted": certificate.groups_refuted,
        "without evidence": certificate.groups_without_evidence,
    }
    counted = ", ".join(f"{plural(count, 'group')} {what}" for what, count in counts.items() if count)
    return f"{certificate}; {counted}" if counted else str(certificate)


def card(
    picture: str,
    name: str,
    said: str,
    pairs: Iterable[tuple[str, str]],
    *,
    anchor: str = "",
    small: str = "",
    large: str = "",
) -> str:
    """One finding: a mark, a name, a few words and a small chart, which open to facts and a large chart."""
    place = f'id="{anchor}" ' if anchor else ""
    return (
        f'<li><details class="card"><summary>{picture}<span class="who"><span class="name">{name}</span>'
        f'<span class="said">{said}</span></span>{small}</summary>'
        f'<div {place}class="body">{facts(pairs)}{large}</div></details></li>'
    )


# ---- certificate values on a logarithmic scale -----------------------------------------------------------------------

# Rounding in float64 leaves values near 1e-16; those below the lowest decade are drawn on it.
LOWEST_DECADE = -18
TOP, BOTTOM, HEIGHT = 14, 222, 262


def certificate_chart(report: SymmetryReport) -> str:
    """Draw the certificate value of every weight over its place in the model, with the tolerance as a line."""
    count, limit = len(report.weights), _y(report.tolerance)
    shown = [w.certificate.value for w in report.weights if w.certificate.value is not None]
    below = sum(value <= report.tolerance for value in shown)
    label = (
        f"Certificate values of {plural(count, 'weight')}: {below} at or below the tolerance "
        f"{number(report.tolerance)}, {len(shown) - below} above it, {count - len(shown)} without evidence."
    )
    heights = {decade: _y(10.0**decade) for decade in range(LOWEST_DECADE, 1, 3)}
    grid = "".join(f'<line x1="0" x2="100%" y1="{y:.1f}" y2="{y:.1f}"/>' for y in [*heights.values()])
    ticks = "".join(
        f'<text x="38" y="{y + 4:.1f}">10<tspan class="power" dy="-4">{d}</tspan></text>' for d, y in heights.items()
    )
    points = "".join(_point(finding, (i + 0.5) / count) for i, finding in enumerate(report.weights))
    return (
        f'<div class="chart"><svg class="axis" aria-hidden="true" width="42" height="{HEIGHT}">{ticks}'
        f'<text x="38" y="{HEIGHT - 12}">none</text></svg>'
        f'<svg class="plot" role="img" aria-label="{escape(label)}" width="100%" height="{HEIGHT}">'
        f'<rect class="band" x="0" width="100%" y="{limit:.1f}" height="{BOTTOM - limit:.1f}"/>'
        f'<g class="grid">{grid}<line x1="0" x2="100%" y1="{HEIGHT - 16}" y2="{HEIGHT - 16}"/></g>'
        f'<line class="limit" x1="0" x2="100%" y1="{limit:.1f}" y2="{limit:.1f}"/>'
        f'<text class="note" x="4" y="{limit - 5:.1f}">tolerance {number(report.tolerance)}</text>{points}</svg></div>'
    )


def _y(value: float) -> float:
    exponent = math.log10(value) if value > 0 else LOWEST_DECADE
    return TOP + (BOTTOM - TOP) * min(max(exponent, LOWEST_DECADE), 0) / LOWEST_DECADE


def _point(finding: WeightFinding, place: float) -> str:
    value, css = finding.certificate.value, status_style(finding.status).css
    y = HEIGHT - 16 if value is None or math.isnan(value) else _y(value)
    text = "no evidence" if value is None else number(value)
    # The percentage is that of the width, whatever it is: points move apart, marks and text keep their size.
    return (
        f'<svg x="{1 + 98 * place:.2f}%" y="{y:.1f}" overflow="visible" class="s-{css}">'
        f"<title>{escape(finding.name)}: {escape(text)}, {finding.status}</title>"
        f'<use href="#m-{css}" x="-5" y="-5" width="10" height="10"/></svg>'
    )


# ---- histograms of group norms ---------------------------------------------------------------------------------------

BINS = 20
# Norms that range over more than this are binned by their logarithm.
WIDE_RANGE = 50.0


@dataclass(frozen=True)
class Norms:
    """Norms of the groups of one weight.

    Args:
        unit: the kind of group: ``"group"`` (invariant), ``"filter"`` or ``"entry of axis 0"``.
        values: the finite norms, increasing.
        zero: number of zero norms.
        lost: number of norms that are not finite.
    """

    unit: str
    values: tuple[float, ...]
    zero: int
    lost: int

    def __str__(self) -> str:
        if not self.values:
            return f"no finite norm among {plural(self.lost, self.unit)}"
        smallest, middle, largest = (number(self.values[k]) for k in (0, len(self.values) // 2, -1))
        spread = f"{smallest} to {largest}, median {middle}" if len(self.values) > 1 else smallest
        others = [f"{n} {what}" for n, what in ((self.zero, "zero"), (self.lost, "not finite")) if n]
        return "; ".join([f"{spread} ({plural(len(self.values), self.unit)})", *others])


def group_norms(finding: WeightFinding, weight: Tensor) -> Norms | None:
    """Norms of the invariant groups of a weight, or else of its filters (axis 0); None without values."""
    if weight.device.type == "meta" or not weight.numel():
        return None
    partition = finding.partition or Partition.filters(finding.shape)
    single = finding.partition is None or finding.filters_per_group == 1
    norms = partition.norms(weight.detach().to(torch.float64).cpu()).flatten()
    finite = norms[norms.isfinite()].sort().values
    unit = "filter" if single and partition.kept else "group"
    return Norms(unit, tuple(finite.tolist()), int((finite == 0).sum()), len(norms) - len(finite))


def histogram(norms: Norms, width: int, height: int, *, labelled: bool = False) -> str:
    """Draw the distribution of the norms, in equal bins between the smallest and the largest."""
    counts, logarithmic = _counts(norms.values)
    step, tallest = width / len(counts), max(counts)
    bars = "".join(
        f"M{i * step + 0.5:.1f} {height}v{-max(count * (height - 2) / tallest, 1.5):.1f}h{step - 1:.1f}V{height}z"
        for i, count in enumerate(counts)
        if count
    )
    role, space, text = 'aria-hidden="true"', 0, ""
    if labelled:
        space = 18
        label = f"Histogram of {plural(len(norms.values), 'norm')}, {norms}"
        role = f'role="img" aria-label="{escape(label)}"'
        axis = "norm, logarithmic" if logarithmic else "norm"
        said = (0.0, "start", number(norms.values[0])), (0.5, "middle", axis), (1.0, "end", number(norms.values[-1]))
        text = "".join(
            f'<text x="{place * width}" y="{height + 14}" text-anchor="{anchor}">{words}</text>'
            for place, anchor, words in said
        )
    # The line below the bars marks the range where they are low.
    return (
        f'<svg class="hist" {role} width="{width}" height="{height + space}" viewBox="0 0 {width} {height + space}">'
        f'<path class="base" d="M0 {height - 0.5}H{width}"/><path d="{bars}"/>{text}</svg>'
    )


def _counts(norms: Sequence[float]) -> tuple[list[int], bool]:
    """The number of values in each bin, and whether the bins are logarithmic."""
    logarithmic = norms[0] > 0 and norms[-1] / norms[0] > WIDE_RANGE
    values = np.log(norms) if logarithmic else np.asarray(norms)
    if values[-1] - values[0] <= 1e-6 * np.abs(values).max():
        values = np.zeros(len(values))  # norms that differ by rounding only are one value, drawn in the middle
    counts, _ = np.histogram(values, BINS)
    return counts.tolist(), logarithmic
