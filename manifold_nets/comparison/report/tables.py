"""The tables of a report as plain text, which the page, the Markdown file and the terminal show alike."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from manifold_nets.comparison.report.summary import ContestantSummary, Summary
from manifold_nets.comparison.report.unit import Unit
from manifold_nets.comparison.statistics import MeanInterval, PairedDifference

__all__ = ["Table", "conclusions", "difference_table", "markdown", "rescaled_table", "result_table", "robustness_table"]

SIGNIFICANCE = 0.05


@dataclass(frozen=True)
class Table:
    """A table of plain text; the first column names the rows.

    Args:
        caption: what it shows.
        head: names of the columns.
        rows: as many cells each.
    """

    caption: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def result_table(summary: Summary) -> Table:
    """Test errors at the chosen learning rates, and their differences from the reference."""
    head = (
        "optimizer",
        "learning rate",
        summary.unit.label("test error"),
        "diverged",
        f"difference from {summary.reference}",
        "p (Holm)",
        "mean rank",
    )
    rows = []
    for place, contestant in enumerate(summary.contestants):
        found = _from_reference(summary, contestant.name)
        rank = summary.friedman.mean_ranks[place] if summary.friedman is not None else math.nan
        rows.append(
            (
                contestant.name,
                _or_none(contestant.learning_rate, "{:.3g}"),
                mean_text(contestant.test, summary.unit),
                f"{contestant.test.lost} of {len(contestant.seeds)}",
                "reference" if found is None else difference_text(found, summary.unit),
                "" if found is None else _p(found.adjusted_p),
                _or_none(rank, "{:.2f}"),
            )
        )
    return Table("Test error at the learning rate that validation data chose", head, tuple(rows))


def robustness_table(summary: Summary) -> Table:
    """Spread over seeds, width of the good learning rates, time to the target, and cost."""
    head = (
        "optimizer",
        summary.unit.label("deviation"),
        "good learning rates",
        "diverged, all rates",
        f"until {summary.unit.short(summary.target)}",
        "time a step",
        "memory",
    )
    rows = tuple(
        (
            contestant.name,
            summary.unit.number(contestant.test.deviation) if contestant.test.count > 1 else "–",
            str(contestant.sensitivity),
            f"{contestant.failed} of {contestant.runs}",
            str(contestant.reach),
            _cost(contestant),
            str(contestant.memory_ratio) if contestant.memory_ratio is not None else "not measured",
        )
        for contestant in summary.contestants
    )
    told = (
        f"Robustness and cost: standard deviation of the test error over seeds, width of the learning rates within "
        f"10 % of the best, diverged runs at all rates, time until the validation error is at most "
        f"{summary.unit.short(summary.target)}, time and peak memory of a step relative to {summary.reference} "
        "(quartiles)"
    )
    return Table(told, head, rows)


def rescaled_table(summary: Summary) -> Table:
    """What a rescaled start does, at the same learning rate and at one chosen anew; no rows where it was not run."""
    head = (
        "optimizer",
        "learning rate",
        summary.unit.label("validation error"),
        "rescaled, same rate",
        "rate chosen anew",
        summary.unit.label("test error"),
    )
    rows = tuple(
        (
            c.name,
            _or_none(c.learning_rate, "{:.3g}"),
            mean_text(c.rescaled.plain, summary.unit),
            mean_text(c.rescaled.same_rate, summary.unit),
            _or_none(c.rescaled.learning_rate, "{:.3g}"),
            mean_text(c.rescaled.test, summary.unit),
        )
        for c in summary.contestants
        if c.rescaled is not None
    )
    return Table("Rescaled initial filters, at the learning rate of the plain start and at one chosen anew", head, rows)


def difference_table(summary: Summary) -> Table:
    """All pairs of contestants."""
    head = ("pair", "difference, bootstrap interval", "Student's interval", "pairs of runs", "p", "p (Holm)")
    rows = tuple(
        (
            f"{d.first} − {d.second}",
            difference_text(d, summary.unit),
            _interval(d.t_low, d.t_high, summary.unit),
            f"{d.count}" + (f", lost {d.lost_first} and {d.lost_second}" if d.lost_first or d.lost_second else ""),
            _p(d.p_value),
            _p(d.adjusted_p),
        )
        for d in summary.differences
    )
    return Table(summary.unit.label("Differences of test errors seed by seed"), head, rows)


def conclusions(summary: Summary) -> list[str]:
    """What the numbers say, in sentences: who is best, who cannot be told apart from it, and what diverged."""
    told = []
    whole = [c for c in summary.contestants if c.test.count and not c.test.lost]
    if whole:
        best = min(whole, key=lambda c: c.test.value)
        tied = [c.name for c in whole if c is not best and c.test.value == best.test.value]
        have = "have" if tied else "has"
        lowest = summary.unit.behind(mean_text(best.test, summary.unit))
        told.append(f"{_and([best.name, *tied])} {have} the lowest mean test error: {lowest}.")
        told.extend(_compared(summary, best, tied))
    lost = sum(c.failed for c in summary.contestants)
    runs = sum(c.runs for c in summary.contestants)
    if lost:
        told.append(f"{lost} of all {runs} runs diverged.")
    hopeless = [c.name for c in summary.contestants if not c.test.count]
    if hopeless and len(hopeless) < len(summary.contestants):
        told.append(f"No run of {_and(hopeless)} came through at any learning rate.")
    partial = [c.name for c in summary.contestants if c.test.lost and c.test.count]
    if partial:
        told.append(f"Even at the chosen learning rate runs of {_and(partial)} diverged: a mean is that of survivors.")
    return told


def _compared(summary: Summary, best: ContestantSummary, tied: Sequence[str]) -> list[str]:
    pairs = [
        d
        for d in summary.differences
        if best.name in (d.first, d.second) and not {d.first, d.second}.intersection(tied)
    ]
    other = {d: d.second if d.first == best.name else d.first for d in pairs}
    apart = [other[d] for d in pairs if d.differs(SIGNIFICANCE)]
    unknown = [other[d] for d in pairs if math.isnan(d.adjusted_p)]
    together = [other[d] for d in pairs if other[d] not in apart and other[d] not in unknown]
    told = []
    if together:
        told.append(f"It cannot be told apart from {_and(together)}.")
    if apart:
        told.append(f"It differs from {_and(apart)} at the 5 % level, corrected for {len(summary.differences)} pairs.")
    if unknown:
        told.append(f"There are too few pairs of runs to compare it with {_and(unknown)}.")
    return told


def markdown(table: Table) -> str:
    r"""The table in Markdown.

    Example:
        >>> print(markdown(Table("", ("optimizer", "error"), (("sgd", "2 | 3"),))))
        | optimizer | error |
        |---|---|
        | sgd | 2 \| 3 |
    """
    lines = [table.head, *table.rows]
    text = ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]
    return "\n".join([text[0], "|" + "---|" * len(table.head), *text[1:]])


# ---- cells -----------------------------------------------------------------------------------------------------------


def mean_text(found: MeanInterval, unit: Unit) -> str:
    """A mean error and half the length of its interval; a mean over survivors says so."""
    if not found.count:
        return "all diverged"
    spread = f" ± {unit.number(found.half_width)}" if found.count > 1 else ""
    total = found.count + found.lost
    return f"{unit.number(found.value)}{spread}" + (f" (survivors, {found.count} of {total})" if found.lost else "")


def difference_text(found: PairedDifference, unit: Unit) -> str:
    """A difference and its bootstrap interval."""
    if not found.count:
        return "no pair"
    return f"{unit.signed(found.value)} {_interval(found.low, found.high, unit)}".rstrip()


def _interval(low: float, high: float, unit: Unit) -> str:
    return f"[{unit.signed(low)}, {unit.signed(high)}]" if math.isfinite(low) else ""


def _p(value: float) -> str:
    if math.isnan(value):
        return "–"
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _or_none(value: float, form: str) -> str:
    return form.format(value) if math.isfinite(value) else "–"


def _cost(contestant: ContestantSummary) -> str:
    if contestant.step_ratio is None:
        return "not measured"
    return str(contestant.step_ratio)


def _from_reference(summary: Summary, name: str) -> PairedDifference | None:
    from dataclasses import replace

    for d in summary.differences:
        if (d.first, d.second) == (name, summary.reference):
            return d
        if (d.second, d.first) == (name, summary.reference):
            return replace(
                d,
                first=d.second,
                second=d.first,
                value=-d.value,
                low=-d.high,
                high=-d.low,
                t_low=-d.t_high,
                t_high=-d.t_low,
                lost_first=d.lost_second,
                lost_second=d.lost_first,
            )
    return None


def _and(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
