"""The two charts of the page: certificate values on a logarithmic scale, and histograms of group norms."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from manifold_nets.groups import Partition
from manifold_nets.page.markup import escape, number, plural
from manifold_nets.symmetry.page.markup import status_style
from manifold_nets.symmetry.report import SymmetryReport, WeightFinding

__all__ = ["Norms", "certificate_chart", "group_norms", "histogram"]

# Rounding in float64 leaves values near 1e-16; those below the lowest decade are drawn on it.
LOWEST_DECADE = -18
TOP, BOTTOM, HEIGHT = 14, 222, 262
BINS = 20
# Norms that range over more than this are binned by their logarithm.
WIDE_RANGE = 50.0


def certificate_chart(report: SymmetryReport) -> str:
    """Draw the certificate value of every weight over its place in the model, with the tolerance as a line."""
    count = len(report.weights)
    shown = [w.certificate.value for w in report.weights if w.certificate.value is not None]
    below = sum(value <= report.tolerance for value in shown)
    label = (
        f"Certificate values of {plural(count, 'weight')}: {below} at or below the tolerance "
        f"{number(report.tolerance)}, {len(shown) - below} above it, {count - len(shown)} without evidence."
    )
    decades = range(LOWEST_DECADE, 1, 3)
    grid = "".join(f'<line x1="0" x2="100%" y1="{_y(10.0**d):.1f}" y2="{_y(10.0**d):.1f}"/>' for d in decades)
    ticks = "".join(
        f'<text x="38" y="{_y(10.0**d) + 4:.1f}">10<tspan class="power" dy="-4">{d}</tspan></text>' for d in decades
    )
    limit = _y(report.tolerance)
    parts = [
        f'<rect class="band" x="0" width="100%" y="{limit:.1f}" height="{BOTTOM - limit:.1f}"/>',
        f'<g class="grid">{grid}<line x1="0" x2="100%" y1="{HEIGHT - 16}" y2="{HEIGHT - 16}"/></g>',
        f'<line class="limit" x1="0" x2="100%" y1="{limit:.1f}" y2="{limit:.1f}"/>',
        f'<text class="note" x="4" y="{limit - 5:.1f}">tolerance {number(report.tolerance)}</text>',
        *(_point(finding, (i + 0.5) / count) for i, finding in enumerate(report.weights)),
    ]
    return (
        f'<div class="chart"><svg class="axis" aria-hidden="true" width="42" height="{HEIGHT}">{ticks}'
        f'<text x="38" y="{HEIGHT - 12}">none</text></svg>'
        f'<svg class="plot" role="img" aria-label="{escape(label)}" width="100%" height="{HEIGHT}">{"".join(parts)}'
        f"</svg></div>"
    )


def _y(value: float) -> float:
    exponent = math.log10(value) if value > 0 else LOWEST_DECADE
    return TOP + (BOTTOM - TOP) * min(max(exponent, LOWEST_DECADE), 0) / LOWEST_DECADE


def _point(finding: WeightFinding, place: float) -> str:
    value = finding.certificate.value
    y = HEIGHT - 16 if value is None or math.isnan(value) else _y(value)
    told = "no evidence" if value is None else number(value)
    css = status_style(finding.status).css
    # The percentage is that of the width, whatever it is: points move apart, marks and text keep their size.
    return (
        f'<svg x="{1 + 98 * place:.2f}%" y="{y:.1f}" overflow="visible" class="s-{css}">'
        f"<title>{escape(finding.name)}: {escape(told)}, {finding.status}</title>"
        f'<use href="#m-{css}" x="-5" y="-5" width="10" height="10"/></svg>'
    )


@dataclass(frozen=True)
class Norms:
    """Norms of the groups of one weight.

    Args:
        unit: what a group is: ``"group"`` (invariant), ``"filter"`` or ``"entry of axis 0"``.
        values: the finite ones, increasing.
        zero: how many are zero.
        lost: how many are not finite.
    """

    unit: str
    values: tuple[float, ...]
    zero: int
    lost: int

    def __str__(self) -> str:
        if not self.values:
            return f"no finite norm among {plural(self.lost, self.unit)}"
        smallest, middle, largest = self.values[0], self.values[len(self.values) // 2], self.values[-1]
        if len(self.values) == 1:
            text = f"{number(smallest)} ({plural(1, self.unit)})"
        else:
            count = plural(len(self.values), self.unit)
            text = f"{number(smallest)} to {number(largest)}, median {number(middle)} ({count})"
        warnings = [f"{n} {what}" for n, what in ((self.zero, "zero"), (self.lost, "not finite")) if n]
        return "; ".join([text, *warnings])


def group_norms(finding: WeightFinding, weight: Tensor) -> Norms | None:
    """Norms of the invariant groups of a weight, or of its filters (axis 0) where it has none; None without values."""
    if weight.device.type == "meta" or not weight.numel():
        return None
    partition = finding.partition or Partition.filters(finding.shape)
    joined = finding.partition is None or finding.filters_per_group == 1
    norms = partition.norms(weight.detach().to(torch.float64).cpu()).flatten()
    finite = norms[norms.isfinite()].sort().values
    unit = "filter" if joined and partition.kept else "group"
    return Norms(unit, tuple(finite.tolist()), int((finite == 0).sum()), len(norms) - len(finite))


def histogram(norms: Norms, width: int, height: int, *, labelled: bool = False) -> str:
    """Draw how the norms are spread, in equal bins between the smallest and the largest."""
    counts, logarithmic = _counts(norms.values)
    step, tallest = width / len(counts), max(counts)
    bars = "".join(
        f"M{i * step + 0.5:.1f} {height}v{-max(count * (height - 2) / tallest, 1.5):.1f}h{step - 1:.1f}V{height}z"
        for i, count in enumerate(counts)
        if count
    )
    # The line below the bars marks the range where they are low.
    drawn = f'<path class="base" d="M0 {height - 0.5}H{width}"/><path d="{bars}"/>'
    if not labelled:
        return (
            f'<svg class="hist" aria-hidden="true" width="{width}" height="{height}" '
            f'viewBox="0 0 {width} {height}">{drawn}</svg>'
        )
    low, high = number(norms.values[0]), number(norms.values[-1])
    axis = "norm, logarithmic" if logarithmic else "norm"
    text = (
        f'<text x="0" y="{height + 14}">{low}</text>'
        f'<text x="{width / 2}" y="{height + 14}" text-anchor="middle">{axis}</text>'
        f'<text x="{width}" y="{height + 14}" text-anchor="end">{high}</text>'
    )
    label = f"Histogram of {plural(len(norms.values), 'norm')}, {norms}"
    return (
        f'<svg class="hist" role="img" aria-label="{escape(label)}" width="{width}" height="{height + 18}" '
        f'viewBox="0 0 {width} {height + 18}">{drawn}{text}</svg>'
    )


def _counts(values: Sequence[float]) -> tuple[list[int], bool]:
    low, high = values[0], values[-1]
    logarithmic = low > 0 and high / low > WIDE_RANGE
    if logarithmic:
        values = [math.log(value) for value in values]
        low, high = values[0], values[-1]
    counts = [0] * BINS
    # Norms that differ by rounding only are one value, drawn in the middle.
    if high - low <= 1e-6 * max(abs(high), abs(low)):
        counts[BINS // 2] = len(values)
        return counts, False
    for value in values:
        counts[min(int((value - low) / (high - low) * BINS), BINS - 1)] += 1
    return counts, logarithmic
