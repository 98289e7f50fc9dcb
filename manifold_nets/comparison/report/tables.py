"""The tables and sentences of a report, as text for the page, Markdown and LaTeX, and the numbers as CSV and JSON."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from manifold_nets.comparison.report.summary import OptimizerSummary, Summary, Unit
from manifold_nets.comparison.results import Comparison, RunResult
from manifold_nets.comparison.statistics import MeanInterval, PairedDifference
from manifold_nets.documents import without_infinities
from manifold_nets.page.markup import plural

SIGNIFICANCE = 0.05


@dataclass(frozen=True)
class Table:
    """A table of plain text; the first column names the rows.

    Args:
        caption: what it shows.
        head: names of the columns.
        rows: the rows, with the same number of cells.
    """

    caption: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def result_table(summary: Summary) -> Table:
    """Test errors at the chosen learning rates, and their differences from the reference."""
    unit, reference = summary.unit, summary.reference
    compared = {d.second: d for d in summary.differences if d.first == reference}
    rows = []
    for place, o in enumerate(summary.optimizers):
        difference, p_value = "reference", ""
        if o.name in compared:
            d = compared[o.name]
            difference = difference_text(replace(d, value=-d.value, low=-d.high, high=-d.low), unit)
            p_value = _p(d.adjusted_p, d)
        rate = f"{_rate(o.learning_rate)}{' (edge of the grid)' if o.at_edge else ''}"
        diverged = f"{o.test.lost - o.not_finite} of {len(o.seeds)}"
        rank = "–" if summary.friedman is None else f"{summary.friedman.mean_ranks[place]:.2f}"
        rows.append((o.name, rate, mean_text(o.test, unit, o.not_finite), diverged, difference, p_value, rank))
    head = ("optimizer", "learning rate", unit.label("test error"), "diverged", f"difference from {reference}")
    caption = "Test error at the learning rate with the lowest validation error"
    return Table(caption, (*head, "p (Holm)", "mean rank"), tuple(rows))


def robustness_table(summary: Summary) -> Table:
    """Spread over seeds, width of the good learning rates, time to the target, and cost."""
    unit, target = summary.unit, summary.unit.short(summary.target)
    rows = []
    for o in summary.optimizers:
        deviation = unit.number(o.test.deviation) if o.test.count > 1 else "–"
        costs = (str(ratio or "not measured") for ratio in (o.step_ratio, o.memory_ratio))
        rows.append((o.name, deviation, str(o.sensitivity), f"{o.failed} of {o.runs}", str(o.reach), *costs))
    head = ("optimizer", unit.label("deviation"), "good learning rates", "diverged, all rates", f"until {target}")
    caption = (
        f"Robustness and cost: standard deviation of the test error over seeds, width of the range of learning rates "
        f"within 10 % of the best, diverged runs over all rates, time until the validation error is at most {target}, "
        f"time and peak memory of a step relative to {summary.reference} (quartiles)"
    )
    return Table(caption, (*head, "time a step", "memory"), tuple(rows))


def rescaled_table(summary: Summary) -> Table:
    """The effect of a rescaled start, at the same learning rate and at a newly chosen one; empty if not run."""
    unit, rows = summary.unit, []
    for o in summary.optimizers:
        if o.rescaled is not None:
            plain, same, test = (mean_text(m, unit) for m in (o.rescaled.plain, o.rescaled.same_rate, o.rescaled.test))
            rows.append((o.name, _rate(o.learning_rate), plain, same, _rate(o.rescaled.learning_rate), test))
    head = ("optimizer", "learning rate", unit.label("validation error"), "rescaled, same rate", "rate chosen anew")
    caption = "Rescaled initial filters, at the learning rate of the plain start and at a newly chosen one"
    return Table(caption, (*head, unit.label("test error")), tuple(rows))


def difference_table(summary: Summary) -> Table:
    """All pairs of optimizers."""
    unit, rows = summary.unit, []
    for d in summary.differences:
        lost = f", lost {d.lost_first} and {d.lost_second}" if d.lost_first or d.lost_second else ""
        texts = (difference_text(d, unit), _interval(d.t_low, d.t_high, unit), f"{d.count}{lost}")
        rows.append((f"{d.first} − {d.second}", *texts, _p(d.p_value, d), _p(d.adjusted_p, d)))
    head = ("pair", "difference, bootstrap interval", "Student's interval", "pairs of runs", "p", "p (Holm)")
    return Table(unit.label("Differences of test errors seed by seed"), head, tuple(rows))


# ---- sentences -------------------------------------------------------------------------------------------------------


def explanation(summary: Summary) -> str:
    """How to read the means, intervals and p-values of `result_table`."""
    seeds = len(summary.optimizers[0].seeds)
    if seeds == 1:
        return "One seed: there are no confidence intervals and no tests."
    said = f"Means over {seeds} seeds ± half of Student's 95 % interval."
    if len(summary.optimizers) > 1:
        said += (
            " Differences are paired by seed, with 95 % bootstrap intervals, which are too narrow for few seeds; "
            "p-values are from the paired t-test with Holm's correction for all pairs. Where all differences of a "
            "pair are equal there is no interval, and the p-value is from the sign test."
        )
    return said


def conclusions(summary: Summary) -> list[str]:
    """The conclusions in sentences: the best optimizer, what differs from it, what diverged, and notes."""
    every = summary.optimizers
    sentences = _best(summary)
    lost, runs = sum(o.failed for o in every), sum(o.runs for o in every)
    if lost:
        all_lost = lost == runs > 1
        sentences.append(f"All {runs} runs diverged." if all_lost else f"{lost} of {plural(runs, 'run')} diverged.")
    hopeless = [o.name for o in every if o.failed and not o.test.count and not o.not_finite]
    if hopeless and len(hopeless) < len(every):
        sentences.append(f"Runs of {_and(hopeless)} diverged at every learning rate, so there is no test error.")
    partial = [o.name for o in every if o.test.lost > o.not_finite and o.test.count]
    if partial:
        rest = "diverged even at the chosen learning rate: means are over the runs that did not."
        sentences.append(f"Runs of {_and(partial)} {rest}")
    return [*sentences, *summary.notes]


def _best(summary: Summary) -> list[str]:
    """Sentences on the optimizers with the lowest test error, among those with one on every seed."""
    whole = [o for o in summary.optimizers if o.test.count and not o.test.lost]
    if not whole:
        return []
    best = min(whole, key=lambda o: o.test.value)
    tied = [o.name for o in whole if o.test.value == best.test.value]
    error = "mean test error" if len(best.seeds) > 1 else "test error"
    value = mean_text(best.test, summary.unit, sign=True)
    some = len(whole) < len(summary.optimizers)
    among = "Of the optimizers with a test error on every seed, " if some else ""
    if len(tied) > 1:
        value = summary.unit.behind(summary.unit.number(best.test.value))
        sentence = f"{among}{_and(tied)} share the lowest {error}: {value}."
    elif len(summary.optimizers) > 1:
        sentence = f"{among}{best.name} has the lowest {error}: {value}."
    else:
        sentence = f"The {error} of {best.name} is {value}."
    return [sentence, *_compared(summary, best, tied)]


def _compared(summary: Summary, best: OptimizerSummary, tied: Sequence[str]) -> list[str]:
    """Which others differ significantly from the best, of which there may be several."""
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
    sentences = []
    if apart:
        sentences.append(f"{subject} {'differs' if single else 'differ'} significantly from {_and(apart)} {level}.")
    if rest:
        sentences.append(
            f"{subject} {'does' if single else 'do'} not differ significantly from {_and(rest, 'or')} {level}."
        )
    if unknown:
        sentences.append(f"Too few runs of {_and(unknown)} have a test error to test the difference.")
    return sentences


# ---- cells -----------------------------------------------------------------------------------------------------------


def mean_text(found: MeanInterval, unit: Unit, not_finite: int = 0, *, sign: bool = False) -> str:
    """A mean error and half the length of its interval; a mean over survivors is marked as such.

    Args:
        found: the mean.
        unit: unit of the errors.
        not_finite: how many of the runs missing from the mean have not diverged.
        sign: whether to write the unit.
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


def _rate(value: float) -> str:
    return f"{value:.3g}" if math.isfinite(value) else "–"


def _and(names: Sequence[str], word: str = "and") -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} {word} {names[-1]}"


# ---- Markdown and LaTeX ----------------------------------------------------------------------------------------------


def markdown(table: Table) -> str:
    r"""The table in Markdown.

    Example:
        >>> print(markdown(Table("", ("optimizer", "error"), (("sgd", "2 | <3>"),))))
        | optimizer | error |
        |---|---|
        | sgd | 2 \| &lt;3&gt; |
    """
    lines = [table.head, *table.rows]
    text = ["| " + " | ".join(markdown_text(cell).replace("|", "\\|") for cell in line) + " |" for line in lines]
    return "\n".join([text[0], "|" + "---|" * len(table.head), *text[1:]])


def markdown_text(text: str) -> str:
    r"""A text escaped so that Markdown shows it unchanged: no HTML, no links, no code.

    Example:
        >>> print(markdown_text("<b>[a](b)`"))
        &lt;b&gt;[a]\(b)\`
    """
    shown = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"`|(?<=\])\(", r"\\\g<0>", shown)


_LATEX = str.maketrans(
    {
        "\\": r"\textbackslash{}",
        **{sign: f"\\{sign}" for sign in "&%$#_{}"},
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "<": r"\textless{}",
        ">": r"\textgreater{}",
        "−": "$-$",
        "±": r"$\pm$",
        "×": r"$\times$",
        "≥": r"$\ge$",
        "∞": r"$\infty$",
        "–": "--",
        "…": r"\dots{}",
    }
)


def latex(table: Table, label: str) -> str:
    r"""The table in LaTeX, for the packages ``booktabs`` and, for wide rows, ``graphicx``.

    Args:
        table: the table.
        label: its label for ``\ref``, after ``tab:``.

    Example:
        >>> print(latex(Table("Errors", ("optimizer", "error"), (("sgd_1", "2 %"),)), "errors"))
        \begin{table}
        \centering
        \caption{Errors.}
        \label{tab:errors}
        \resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%
        \begin{tabular}{ll}
        \toprule
        optimizer & error \\
        \midrule
        sgd\_1 & 2 \% \\
        \bottomrule
        \end{tabular}}
        \end{table}
    """
    head, *rows = (" & ".join(cell.translate(_LATEX) for cell in line) + r" \\" for line in (table.head, *table.rows))
    return "\n".join(
        [
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{table.caption.translate(_LATEX)}.}}",
            rf"\label{{tab:{label}}}",
            r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%",
            rf"\begin{{tabular}}{{{'l' * len(table.head)}}}",
            r"\toprule",
            head,
            r"\midrule",
            *rows,
            r"\bottomrule",
            r"\end{tabular}}",
            r"\end{table}",
        ]
    )


# ---- CSV and JSON ----------------------------------------------------------------------------------------------------


def runs_csv(comparison: Comparison) -> str:
    """One row per run, without values measured on a machine: the same command gives the same text.

    Cells are empty for values that a run does not have: it diverged, or was not tested. Texts that a spreadsheet would
    take for a formula begin with an apostrophe.
    """

    def row(run: RunResult) -> dict[str, Any]:
        first, last = run.first_at(comparison.settings.target_error), vars(run.epochs[-1]) if run.epochs else {}
        return {
            "chosen": int(any(choice.chose(run.key) for choice in comparison.choices)),
            "epochs": len(run.epochs),
            "passes": last.get("evaluations"),
            "train_loss": last.get("train_loss"),
            "epoch_at_target": first and first.epoch,
        }

    head = "status chosen epochs steps passes train_loss validation_loss validation_error test_loss test_error"
    return _csv(comparison, [*head.split(), "epoch_at_target"], lambda run: [row(run)])


def epochs_csv(comparison: Comparison) -> str:
    """One row per run and epoch, with norm and rotation of every layer, without values measured on a machine."""

    def rows(run: RunResult) -> Iterable[dict[str, Any]]:
        for epoch in run.epochs:
            layers = zip(run.layers, epoch.layers, strict=True)
            yield vars(epoch) | {
                "passes": epoch.evaluations,
                **{f"{field}:{name}": value for name, layer in layers for field, value in vars(layer).items()},
            }

    layers = dict.fromkeys(name for run in comparison.results for name in run.layers)
    fields = [f"{field}:{name}" for name in layers for field in ("norm", "rotation")]
    head = ("epoch", "steps", "passes", "train_loss", "validation_loss", "validation_error")
    return _csv(comparison, [*head, *fields], rows)


def times_csv(comparison: Comparison) -> str:
    """The times measured on the machine: one row per run, with the training time to the end of each epoch."""
    measured = ("seconds_per_step", "peak_memory_bytes", "harness_seconds", "validation_seconds", "machine")
    ends = [f"seconds_to_epoch_{i}" for i in range(1, comparison.settings.epochs + 1)]
    return _csv(
        comparison,
        [*measured, *ends],
        lambda run: [{f"seconds_to_epoch_{epoch.epoch}": epoch.seconds for epoch in run.epochs}],
    )


def _csv(comparison: Comparison, columns: Sequence[str], rows: Callable[[RunResult], Iterable[dict[str, Any]]]) -> str:
    """Rows of each run: which run it is, and columns that are those of its rows or else fields of the run itself."""
    key = ("optimizer", "initial_scale", "learning_rate", "weight_decay", "seed")
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(map(_cell, (*key, *columns)))
    for run in comparison.results:
        which = vars(run.key) | {"weight_decay": comparison.settings.decay_of(run.key)}
        for row in rows(run):
            cells = which | row
            writer.writerow([_cell(cells.get(name, getattr(run, name, None))) for name in (*key, *columns)])
    return text.getvalue()


def _cell(value: object) -> object:
    if isinstance(value, float):
        return repr(value)  # the shortest text from which it is read back bit for bit
    return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")) else value


def summary_json(summary: Summary) -> str:
    """The content of all tables and figures as one JSON document; null for values that are not finite."""
    # Where files of earlier versions have their optimizers.
    data = {"contestants" if name == "optimizers" else name: value for name, value in asdict(summary).items()}
    return json.dumps(without_infinities(data), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
