"""The tables and sentences of a report, as text for the page, Markdown and LaTeX, and the numbers as CSV and JSON."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from manifold_nets.comparison.report.summary import OptimizerSummary, Summary, Unit
from manifold_nets.comparison.results import Comparison, RunResult
from manifold_nets.comparison.statistics import MeanInterval, PairedDifference
from manifold_nets.page.markup import plural

__all__ = [
    "Table",
    "conclusions",
    "difference_table",
    "epochs_csv",
    "explanation",
    "latex",
    "markdown",
    "markdown_text",
    "mean_text",
    "rescaled_table",
    "result_table",
    "robustness_table",
    "runs_csv",
    "summary_json",
    "times_csv",
]

SIGNIFICANCE = 0.05
Item = TypeVar("Item")


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


def _tabulated(caption: str, columns: Mapping[str, Callable[[Item], str]], items: Iterable[Item]) -> Table:
    """A table with a row per item; columns are given by their names and what they say of an item."""
    rows = tuple(tuple(cell(item) for cell in columns.values()) for item in items)
    return Table(caption, tuple(columns), rows)


def result_table(summary: Summary) -> Table:
    """Test errors at the chosen learning rates, and their differences from the reference."""
    unit, found = summary.unit, {o.name: _from_reference(summary, o.name) for o in summary.optimizers}
    ranks = {o.name: "–" for o in summary.optimizers}
    if summary.friedman is not None:
        ranks = {o.name: f"{rank:.2f}" for o, rank in zip(summary.optimizers, summary.friedman.mean_ranks, strict=True)}

    def difference(o: OptimizerSummary) -> str:
        d = found[o.name]
        return "reference" if d is None else difference_text(d, unit)

    def p_value(o: OptimizerSummary) -> str:
        d = found[o.name]
        return "" if d is None else _p(d.adjusted_p, d)

    columns: dict[str, Callable[[OptimizerSummary], str]] = {
        "optimizer": lambda o: o.name,
        "learning rate": lambda o: _rate(o.learning_rate) + (" (edge of the grid)" if o.at_edge else ""),
        unit.label("test error"): lambda o: mean_text(o.test, unit, o.not_finite),
        "diverged": lambda o: f"{o.test.lost - o.not_finite} of {len(o.seeds)}",
        f"difference from {summary.reference}": difference,
        "p (Holm)": p_value,
        "mean rank": lambda o: ranks[o.name],
    }
    return _tabulated("Test error at the learning rate that validation data chose", columns, summary.optimizers)


def robustness_table(summary: Summary) -> Table:
    """Spread over seeds, width of the good learning rates, time to the target, and cost."""
    unit, target = summary.unit, summary.unit.short(summary.target)
    columns: dict[str, Callable[[OptimizerSummary], str]] = {
        "optimizer": lambda o: o.name,
        unit.label("deviation"): lambda o: unit.number(o.test.deviation) if o.test.count > 1 else "–",
        "good learning rates": lambda o: str(o.sensitivity),
        "diverged, all rates": lambda o: f"{o.failed} of {o.runs}",
        f"until {target}": lambda o: str(o.reach),
        "time a step": lambda o: str(o.step_ratio or "not measured"),
        "memory": lambda o: str(o.memory_ratio or "not measured"),
    }
    caption = (
        f"Robustness and cost: standard deviation of the test error over seeds, width of the learning rates within "
        f"10 % of the best, diverged runs at all rates, time until the validation error is at most {target}, time and "
        f"peak memory of a step relative to {summary.reference} (quartiles)"
    )
    return _tabulated(caption, columns, summary.optimizers)


def rescaled_table(summary: Summary) -> Table:
    """What a rescaled start does, at the same learning rate and at one chosen anew; no rows where it was not run."""
    unit, rows = summary.unit, []
    for o in summary.optimizers:
        if o.rescaled is not None:
            plain, same, test = (mean_text(m, unit) for m in (o.rescaled.plain, o.rescaled.same_rate, o.rescaled.test))
            rows.append((o.name, _rate(o.learning_rate), plain, same, _rate(o.rescaled.learning_rate), test))
    head = ("optimizer", "learning rate", unit.label("validation error"), "rescaled, same rate", "rate chosen anew")
    caption = "Rescaled initial filters, at the learning rate of the plain start and at one chosen anew"
    return Table(caption, (*head, unit.label("test error")), tuple(rows))


def difference_table(summary: Summary) -> Table:
    """All pairs of optimizers."""
    unit = summary.unit

    def pairs(d: PairedDifference) -> str:
        lost = f", lost {d.lost_first} and {d.lost_second}" if d.lost_first or d.lost_second else ""
        return f"{d.count}{lost}"

    columns: dict[str, Callable[[PairedDifference], str]] = {
        "pair": lambda d: f"{d.first} − {d.second}",
        "difference, bootstrap interval": lambda d: difference_text(d, unit),
        "Student's interval": lambda d: _interval(d.t_low, d.t_high, unit),
        "pairs of runs": pairs,
        "p": lambda d: _p(d.p_value, d),
        "p (Holm)": lambda d: _p(d.adjusted_p, d),
    }
    return _tabulated(unit.label("Differences of test errors seed by seed"), columns, summary.differences)


# ---- sentences -------------------------------------------------------------------------------------------------------


def explanation(summary: Summary) -> str:
    """How the means, intervals and p-values of `result_table` are to be read."""
    seeds = len(summary.optimizers[0].seeds)
    if seeds == 1:
        return "One seed: there are no confidence intervals and no tests."
    said = f"Means over {seeds} seeds ± half of Student's 95 % interval."
    if len(summary.optimizers) > 1:
        said += (
            " Differences are taken seed by seed, with 95 % bootstrap intervals, which are too narrow for few seeds; "
            "p-values are of the paired t-test, corrected for all pairs by Holm's method. Where all differences of a "
            "pair are equal there is no interval, and the p-value is of the sign test."
        )
    return said


def conclusions(summary: Summary) -> list[str]:
    """What the numbers say, in sentences: who is best, what differs from it, what diverged, and notes on choices."""
    every = summary.optimizers
    sentences = _best(summary)
    lost, runs = sum(o.failed for o in every), sum(o.runs for o in every)
    if lost:
        all_lost = lost == runs > 1
        sentences.append(f"All {runs} runs diverged." if all_lost else f"{lost} of {plural(runs, 'run')} diverged.")
    hopeless = [o.name for o in every if o.failed and not o.test.count and not o.not_finite]
    if hopeless and len(hopeless) < len(every):
        sentences.append(f"Runs of {_and(hopeless)} diverged at every learning rate, so that there is no test error.")
    partial = [o.name for o in every if o.test.lost > o.not_finite and o.test.count]
    if partial:
        rest = "diverged even at the chosen learning rate: a mean is over the runs that did not."
        sentences.append(f"Runs of {_and(partial)} {rest}")
    return [*sentences, *summary.notes]


def _best(summary: Summary) -> list[str]:
    """Which optimizers have the lowest test error, among those that have one on every seed, and what differs."""
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
        sentences.append(f"Too few runs of {_and(unknown)} have a test error for a test of the difference.")
    return sentences


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


def _rate(value: float) -> str:
    return f"{value:.3g}" if math.isfinite(value) else "–"


def _from_reference(summary: Summary, name: str) -> PairedDifference | None:
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
    r"""A text that Markdown shows as it is: no HTML, no links, no code.

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
    r"""The table in LaTeX, for the packages ``booktabs`` and, as rows may be wide, ``graphicx``.

    Args:
        table: the table.
        label: what ``\ref`` finds it by, behind ``tab:``.

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
    """One row per run, without anything that is measured on a machine: the same command gives the same text.

    Empty cells are values that a run does not have: it diverged, or the test data were not read for it. Texts that a
    spreadsheet would take for a formula begin with an apostrophe.
    """
    chosen = {(c.optimizer, c.initial_scale, c.trial) for c in comparison.choices}
    rows = []
    for run in comparison.results:
        key, last = run.key, run.epochs[-1] if run.epochs else None
        first = run.first_at(comparison.settings.target_error)
        row = {
            **_key(run, comparison),
            "status": run.status,
            "chosen": int((key.optimizer, key.initial_scale, (key.learning_rate, key.weight_decay)) in chosen),
            "epochs": len(run.epochs),
            "steps": run.steps,
            "passes": last and last.evaluations,
            "train_loss": last and last.train_loss,
        }
        results = ("validation_loss", "validation_error", "test_loss", "test_error")
        rows.append(row | {name: getattr(run, name) for name in results} | {"epoch_at_target": first and first.epoch})
    return _csv(list(rows[0]), rows)


def epochs_csv(comparison: Comparison) -> str:
    """One row per run and epoch, without anything that is measured on a machine; norm and rotation of every layer."""
    layers = list(dict.fromkeys(name for run in comparison.results for name in run.layers))
    recorded = ("train_loss", "validation_loss", "validation_error")
    rows = []
    for run in comparison.results:
        for epoch in run.epochs:
            row = {"epoch": epoch.epoch, "steps": epoch.steps, "passes": epoch.evaluations}
            row |= {name: getattr(epoch, name) for name in recorded}
            for name, layer in zip(run.layers, epoch.layers, strict=True):
                row |= {f"norm:{name}": layer.norm, f"rotation:{name}": layer.rotation}
            rows.append({**_key(run, comparison), **row})
    head = [*_key(comparison.results[0], comparison), "epoch", "steps", "passes", *recorded]
    return _csv([*head, *(f"{field}:{name}" for name in layers for field in ("norm", "rotation"))], rows)


def times_csv(comparison: Comparison) -> str:
    """What was measured on the machine: one row per run, with the training time to the end of each epoch."""
    measured = ("seconds_per_step", "peak_memory_bytes", "harness_seconds", "validation_seconds", "machine")
    rows = [
        {
            **_key(run, comparison),
            **{name: getattr(run, name) for name in measured},
            **{f"seconds_to_epoch_{epoch.epoch}": epoch.seconds for epoch in run.epochs[: comparison.settings.epochs]},
        }
        for run in comparison.results
    ]
    epochs = [f"seconds_to_epoch_{i}" for i in range(1, comparison.settings.epochs + 1)]
    return _csv([*_key(comparison.results[0], comparison), *measured, *epochs], rows)


def _key(run: RunResult, comparison: Comparison) -> dict[str, Any]:
    key = run.key
    names = ("optimizer", "initial_scale", "learning_rate", "weight_decay", "seed")
    values = (key.optimizer, key.initial_scale, key.learning_rate, comparison.settings.decay_of(key), key.seed)
    return dict(zip(names, values, strict=True))


def _csv(head: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(map(_cell, head))
    writer.writerows([_cell(row.get(name)) for name in head] for row in rows)
    return text.getvalue()


def _cell(value: object) -> object:
    if isinstance(value, float):
        return repr(value)  # the shortest text from which it is read back bit for bit
    return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")) else value


def summary_json(summary: Summary) -> str:
    """Everything that the tables and figures show as one JSON document; null for what is not finite."""
    data = {{"optimizers": "contestants"}.get(name, name): value for name, value in dataclasses.asdict(summary).items()}
    return json.dumps(_finite(data), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
