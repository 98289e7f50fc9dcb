"""What the stored runs on MNIST say of the paper's claims; for `mnist_paper`."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from choices import best, difference, verdict, with_interval
from difference_figure import DifferenceRow, draw_differences
from evidence import SUMMARY_HEAD, Runs, preamble, summary_table, table
from sphere_recipes import EUCLIDEAN, SPHERES

from manifold_nets.comparison.statistics import PairedDifference, paired_difference

__all__ = ["NAME", "as_markdown", "draw", "paper_arm", "today_arm"]

NAME = "mnist_paper"
ARCHITECTURES = ("Arch1", "Arch2")
DEPTHS = (2, 4)
SCHEDULES = ("bold-driver", "exponential")
#: Names of the paper for optimizers of a comparison.
METHODS = {"sgd": "B-SGD", "un": "UN", "sm-columns": "SM"}


def paper_arm(architecture: str, depth: int, schedule: str) -> str:
    """Name of the runs of the paper's protocol with one network and one schedule."""
    return f"{architecture}, depth {depth}, {schedule}"


def today_arm(depth: int) -> str:
    """Name of the runs of the contest with what is used today."""
    return f"today, Arch2, depth {depth}"


def between(runs: Runs, arm: str, first: str, second: str) -> PairedDifference | None:
    """Paired difference of test errors in points; None where one of the two has no runs."""
    chosen = [runs.chosen(arm, name) for name in (first, second)]
    return difference(*chosen) if all(chosen) else None


def said(found: PairedDifference, below: str = "better", above: str = "worse") -> str:
    """A difference with its interval and what it says."""
    return f"{with_interval(found)}: {verdict(found.t_low, found.t_high, below, above)}"


def present(runs: Runs, names: Iterable[str]) -> list[str]:
    """Those of some arms that have runs."""
    stored = {run.arm for run in runs.rows}
    return [name for name in names if name in stored]


def better(runs: Runs) -> list[str]:
    """The claim that spheres have the smaller test error, arm by arm."""
    lines = []
    for architecture in ARCHITECTURES:
        arms = present(runs, (paper_arm(architecture, d, s) for d in DEPTHS for s in SCHEDULES))
        for name in ("un", "sm-columns"):
            found = {arm: between(runs, arm, name, "sgd") for arm in arms}
            lines += [f"- {METHODS[name]} minus B-SGD, {arm}: {said(d)}." for arm, d in found.items() if d is not None]
    return lines


def deeper(runs: Runs) -> dict[str, PairedDifference]:
    """UN minus plain SGD at depth 4, minus the same at depth 2, seed by seed; for each architecture and schedule."""
    found = {}
    for architecture in ARCHITECTURES:
        for schedule in SCHEDULES:
            arms = present(runs, (paper_arm(architecture, depth, schedule) for depth in DEPTHS))
            if len(arms) == len(DEPTHS):
                shallow, deep = (runs.test_errors(arm, "un") - runs.test_errors(arm, "sgd") for arm in arms)
                found[f"{architecture}, {schedule}"] = paired_difference(deep, shallow)
    return found


def deeper_lines(runs: Runs) -> list[str]:
    """The claim that the advantage is clearer in deeper networks."""
    return [
        f"- UN minus B-SGD at depth 4, minus the same at depth 2, {name}: {said(d, 'clearer', 'less clear')}."
        for name, d in deeper(runs).items()
    ]


def cost(runs: Runs, name: str) -> tuple[float, float, float, int]:
    """Time a step over that of plain SGD: smallest, median and largest ratio of the arms, and how many they are."""
    ratios = [
        runs.seconds_per_step(arm, name) / runs.seconds_per_step(arm, "sgd")
        for arm in present(runs, (paper_arm(a, d, s) for a in ARCHITECTURES for d in DEPTHS for s in SCHEDULES))
        if runs.chosen(arm, name)
    ]
    if not ratios:
        return math.nan, math.nan, math.nan, 0
    return min(ratios), float(np.median(ratios)), max(ratios), len(ratios)


def cost_lines(runs: Runs) -> list[str]:
    """The claim of no extra cost."""
    found = ((name, cost(runs, name)) for name in ("un", "sm-columns"))
    return [
        f"- A step with {METHODS[name]} takes {middle:.2f} times as long as with B-SGD (median over {count} arms;"
        f" {least:.2f} … {most:.2f}), forward and backward included."
        for name, (least, middle, most, count) in found
        if count
    ]


def spreads(runs: Runs) -> list[str]:
    """The claim of steadier training: standard deviation of the test error over the seeds, over that of plain SGD."""
    lines = []
    for arm in present(runs, (paper_arm(a, d, s) for a in ARCHITECTURES for d in DEPTHS for s in SCHEDULES)):
        ours, theirs = (float(np.nanstd(runs.test_errors(arm, name), ddof=1)) for name in ("un", "sgd"))
        lines.append(f"- {arm}: UN {ours:.3f} points, B-SGD {theirs:.3f}.")
    return lines


def contest(runs: Runs) -> list[str]:
    """The best recipe on spheres, chosen by validation, against tuned SGD and AdamW; then every recipe."""
    lines = []
    for arm in present(runs, map(today_arm, DEPTHS)):
        names = [name for name in SPHERES if runs.chosen(arm, name)]
        ours = best(runs, arm, names)
        found = ((theirs, between(runs, arm, ours, theirs)) for theirs in EUCLIDEAN)
        words = "; ".join(f"minus {theirs} {said(d)}" for theirs, d in found if d is not None)
        lines.append(f"- {arm}: of {len(names)} recipes on spheres validation prefers {ours}; {words}.")
        level = [
            name
            for name in names
            if all((d := between(runs, arm, name, theirs)) is not None and not d.t_low > 0 for theirs in EUCLIDEAN)
        ]
        lines.append(f"  Not worse than either: {'; '.join(level) or 'no recipe'}.")
    return lines


CLAIMS = (
    ("Is it better than batch normalization alone?", better),
    ("Is that clearer in deeper networks?", deeper_lines),
    ("Is there no extra cost?", cost_lines),
    ("Is training steadier? Standard deviation of the test error over the seeds", spreads),
    ("Against tuned SGD and AdamW with momentum, cosine and weight decay", contest),
)


def as_markdown(runs: Runs) -> str:
    """Answers to the claims, then a table an arm."""
    lines = ["# MNIST by the paper's protocol\n", preamble(runs) + "\n", NOTE]
    for question, answer in CLAIMS:
        lines += [f"## {question}\n", *answer(runs), ""]
    for arm in dict.fromkeys(run.arm for run in runs.rows):
        epochs = [run.epochs for run in runs.of(arm) if not run.diverged]
        lines += [f"## {arm}\n", f"{min(epochs)} to {max(epochs)} epochs a run.\n" if epochs else ""]
        rows = [[METHODS.get(row[0], row[0]) if "today" not in arm else row[0], *row[1:-1]] for row in tuned(runs, arm)]
        lines.append(table(SUMMARY_HEAD[:-1], rows))
    return "\n".join(lines)


def tuned(runs: Runs, arm: str) -> list[list[str]]:
    """The table of an arm; plain SGD is the reference, or whichever Euclidean optimizer validation prefers."""
    return summary_table(runs, arm, best(runs, arm, EUCLIDEAN))


NOTE = (
    "Every layer before the softmax has 100 filters. Test errors are means ± standard deviations over the seeds, in"
    " percent; differences are paired by seed, in points, with Student's interval of 95 % in the sentences and a"
    " bootstrap interval in the tables. A difference is called better or worse where its whole interval is on one side"
    " of zero. With so many comparisons some intervals miss zero by chance: the tables' p-values are corrected within"
    " each table. No figure here is the paper's own.\n"
)


def draw(runs: Runs, path: Path) -> None:
    """Differences from plain SGD under the paper's protocol, then from the better Euclidean optimizer of today."""
    rows = []
    for arm in present(runs, (paper_arm(a, d, s) for a in ARCHITECTURES for d in DEPTHS for s in SCHEDULES)):
        for name, colour in (("un", "#0072B2"), ("sm-columns", "#E69F00")):
            found = between(runs, arm, name, "sgd")
            if found is not None:
                rows.append(DifferenceRow(f"{arm}: {METHODS[name]} against B-SGD", found, colour))
    for arm in present(runs, map(today_arm, DEPTHS)):
        reference = best(runs, arm, EUCLIDEAN)
        for name in SPHERES:
            found = between(runs, arm, name, reference)
            if found is not None:
                rows.append(DifferenceRow(f"{arm}: {name} against {reference}", found, "#009E73"))
    draw_differences(
        rows, "test error minus that of the reference (points, 95 %); UN blue, SM orange, today green", path
    )
