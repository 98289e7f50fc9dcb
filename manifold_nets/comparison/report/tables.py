"""The tables and sentences of a report as plain text, which the page, Markdown and LaTeX show alike."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from manifold_nets.comparison.report.summary import ContestantSummary, Summary
from manifold_nets.comparison.report.unit import Unit
from manifold_nets.comparison.statistics import MeanInterval, PairedDifference
from manifold_nets.page.markup import plural

__all__ = [
    "Table",
    "conclusions",
    "difference_table",
    "explanation",
    "rescaled_table",
    "result_table",
    "robustness_table",
]

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
                _or_none(contestant.learning_rate, "{:.3g}") + (" (edge of the grid)" if contestant.at_edge else ""),
                mean_text(contestant.test, summary.unit, contestant.not_finite),
                f"{contestant.test.lost - contestant.not_finite} of {len(contestant.seeds)}",
                difference_text(found, summary.unit) if found is not None else "reference",
                _p(found.adjusted_p, found) if found is not None else "",
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
            _p(d.p_value, d),
            _p(d.adjusted_p, d),
        )
        for d in summary.differences
    )
    return Table(summary.unit.label("Differences of test errors seed by seed"), head, rows)


def explanation(summary: Summary) -> str:
    """How the means, intervals and p-values of `result_table` are to be read."""
    seeds = len(summary.contestants[0].seeds)
    if seeds == 1:
        return "One seed: there are no confidence intervals and no tests."
    said = f"Means over {seeds} seeds ± half of Student's 95 % interval."
    if len(summary.contestants) > 1:
        said += (
            " Differences are taken seed by seed, with 95 % bootstrap intervals, which are too narrow for few seeds; "
            "p-values are of the paired t-test, corrected for all pairs by Holm's method. Where all differences of a "
            "pair are equal there is no interval, and the p-value is of the sign test."
        )
    return said


def conclusions(summary: Summary) -> list[str]:
    """What the numbers say, in sentences: who is best, what differs from it, what diverged, and notes on choices."""
    told = []
    whole = [c for c in summary.contestants if c.test.count and not c.test.lost]
    if whole:
        best = min(whole, key=lambda c: c.test.value)
        tied = [c.name for c in whole if c.test.value == best.test.value]
        value = mean_text(best.test, summary.unit, sign=True)
        error = "mean test error" if len(best.seeds) > 1 else "test error"
        among = "" if len(whole) == len(summary.contestants) else "Of the optimizers with a test error on every seed, "
        if len(tied) > 1:
            value = summary.unit.behind(summary.unit.number(best.test.value))
            told.append(f"{among}{_and(tied)} share the lowest {error}: {value}.")
        elif len(summary.contestants) > 1:
            told.append(f"{among}{best.name} has the lowest {error}: {value}.")
        else:
            told.append(f"The {error} of {best.name} is {value}.")
        told.extend(_compared(summary, best, tied))
    lost = sum(c.failed for c in summary.contestants)
    runs = sum(c.runs for c in summary.contestants)
    if lost:
        told.append(f"All {runs} runs diverged." if lost == runs > 1 else f"{lost} of {plural(runs, 'run')} diverged.")
    hopeless = [c.name for c in summary.contestants if c.failed and not c.test.count and not c.not_finite]
    if hopeless and len(hopeless) < len(summary.contestants):
        told.append(f"Runs of {_and(hopeless)} diverged at every learning rate, so that there is no test error.")
    partial = [c.name for c in summary.contestants if c.test.lost > c.not_finite and c.test.count]
    if partial:
        told.append(
            f"Runs of {_and(partial)} diverged even at the chosen learning rate: a mean is over the runs that did not."
        )
    return [*told, *summary.notes]


def _compared(summary: Summary, best: ContestantSummary, tied: Sequence[str]) -> list[str]:
    """What the tests say of the differences of all others from the best, of which there may be several."""
    if len(best.seeds) == 1:
        return ["With one seed, no difference can be tested."] if summary.differences else []
    pairs: dict[str, list[PairedDifference]] = {}
    for d in summary.differences:
        for one, other in ((d.first, d.second), (d.second, d.first)):
            if one in tied and other not in tied:
                pairs.setdefault(other, []).append(d)
    unknown = [name for name, found in pairs.items() if any(math.isnan(d.adjusted_p) for d in found)]
    apart = [name for name, found in pairs.items() if all(d.differs(SIGNIFICANCE) for d in found)]
    rest = [name for name in pairs if name not in (*unknown, *apart)]
    subject, single = _and(tied), len(tied) == 1
    corrected = sum(not math.isnan(d.adjusted_p) for d in summary.differences)
    level = f"(5 % level{f', corrected for {corrected} pairs' if corrected > 1 else ''})"
    told = []
    if apart:
        told.append(f"{subject} {'differs' if single else 'differ'} significantly from {_and(apart)} {level}.")
    if rest:
        told.append(f"{subject} {'does' if single else 'do'} not differ significantly from {_and(rest, 'or')} {level}.")
    if unknown:
        told.append(f"Too few runs of {_and(unknown)} have a test error for a test of the difference.")
    return told


# ---- cells -----------------------------------------------------------------------------------------------------------


def mean_text(found: MeanInterval, unit: Unit, not_finite: int = 0, *, sign: bool = False) -> str:
    """A mean error and half the length of its interval; a mean over survivors says so.

    Args:
        found: the mean.
        unit: of the errors.
        not_finite: how many of the runs that are lost to it have not diverged.
        sign: whether the unit stands behind it.
    """
    if not found.count:
        return "not finite" if not_finite else "all diverged"
    spread = f" ± {unit.number(found.half_width)}" if found.count > 1 and found.deviation else ""
    total = found.count + found.lost
    said = f"{unit.number(found.value)}{spread}"
    said = unit.behind(said) if sign else said
    if found.count > 1 and not found.deviation:  # which says nothing of how well the mean is known
        said += ", all equal"
    return said + (f" (survivors, {found.count} of {total})" if found.lost else "")


def difference_text(found: PairedDifference, unit: Unit) -> str:
    """A difference and its bootstrap interval, or why there is none."""
    if not found.count:
        return "no pair"
    if found.is_constant:
        return f"{unit.signed(found.value)}, all equal"
    if found.count == 1:
        what = "pair" if found.lost_first or found.lost_second else "seed"
        return f"{unit.signed(found.value)} (one {what}: no test)"
    return f"{unit.signed(found.value)} {_interval(found.low, found.high, unit)}"


def _interval(low: float, high: float, unit: Unit) -> str:
    return f"[{unit.signed(low)}, {unit.signed(high)}]" if math.isfinite(low) else "–"


def _p(value: float, of: PairedDifference) -> str:
    if math.isnan(value):
        return "–"
    text = "< 0.001" if value < 0.001 else f"{value:.3f}"
    return f"{text} (sign test)" if of.is_constant else text


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


def _and(names: Sequence[str], word: str = "and") -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} {word} {names[-1]}"
