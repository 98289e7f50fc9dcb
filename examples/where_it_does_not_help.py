"""Where spheres do not help, found by looking, and what helps there.

``python examples/where_it_does_not_help.py --write examples/results`` trains on scikit-learn's digits where spheres are
expected to lose: each case has a plain optimizer to compare with, spheres, and remedies, all with learning rates chosen
on validation data from the same grid.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from choices import difference, verdict, with_interval
from difference_figure import DifferenceRow, draw_differences
from evidence import Arm, Run, Runs, collect, options_for, preamble, show, table
from limit_cases import CASES, COMMON, Case, Entry
from limit_optimizers import LIMIT_OPTIMIZERS
from sphere_recipes import entrants

from manifold_nets.comparison import OptimizerSpec
from manifold_nets.comparison.statistics import PairedDifference, mean_interval

NAME = "limits"
COLOURS = {"spheres": "#D55E00", "remedy": "#009E73"}


def arms() -> list[Arm]:
    """One comparison for each case and for each remedy under other conditions."""
    found: dict[str, tuple[Case, Entry, list[str]]] = {}
    for case in CASES:
        for entry in case.entries:
            found.setdefault(entry.arm(case), (case, entry, []))[2].append(entry.optimizer)
    return [
        Arm(name, {**_loaded({**COMMON, **case.options, **entry.options}), "optimizers": optimizers(names)})
        for name, (case, entry, names) in found.items()
    ]


def _loaded(options: dict[str, Any]) -> dict[str, Any]:
    """The options with the task in place of what makes it."""
    return {**options, "task": options["task"]() if callable(options["task"]) else options["task"]}


def optimizers(names: list[str]) -> list[OptimizerSpec]:
    """The optimizers of these names."""
    return [LIMIT_OPTIMIZERS.get(name) or entrants([name])[0] for name in names]


def chosen(runs: Runs, case: Case, entry: Entry) -> tuple[Run, ...]:
    """The runs of an entry at the learning rate that validation chose, by seed."""
    return runs.chosen(entry.arm(case), entry.optimizer)


def against_reference(runs: Runs, case: Case, entry: Entry) -> PairedDifference:
    """Test error in percent minus that of the reference of the case, seed by seed."""
    return difference(chosen(runs, case, entry), chosen(runs, case, case.entries[0]))


def judged(found: PairedDifference) -> str:
    """What an interval of a difference of errors says."""
    return verdict(found.t_low, found.t_high, "better", "worse")


def row_of(runs: Runs, case: Case, entry: Entry) -> list[str]:
    """One optimizer of a case."""
    own = chosen(runs, case, entry)
    if not own:
        return [case.name, entry.role, entry.optimizer, entry.told, "none", "every run diverged", "", "", ""]
    errors = mean_interval([100 * run.test_error for run in own])
    loss = mean_interval([run.train_loss for run in own])
    is_reference = entry is case.entries[0]
    return [
        case.name,
        entry.role,
        entry.optimizer,
        entry.told,
        f"{own[0].learning_rate:.3g}",
        f"{errors.value:.2f} ± {errors.deviation:.2f}",
        f"{loss.value:.3f}",
        "" if is_reference else with_interval(against_reference(runs, case, entry)),
        "" if is_reference else judged(against_reference(runs, case, entry)),
    ]


HEAD = (
    "case",
    "role",
    "optimizer",
    "what is changed",
    "learning rate",
    "test error (%)",
    "training loss",
    "difference from the reference",
    "verdict",
)


def present(runs: Runs) -> list[Case]:
    """The cases all of whose optimizers have runs."""
    stored = {(run.arm, run.optimizer) for run in runs.rows}
    return [case for case in CASES if all((entry.arm(case), entry.optimizer) in stored for entry in case.entries)]


def statement(runs: Runs, case: Case) -> str:
    """What the runs of a case say, in sentences."""
    lost, *remedies = case.entries[1:]
    reference = case.entries[0].optimizer
    found = against_reference(runs, case, lost)
    measured = f"{lost.optimizer} against {reference} {with_interval(found)}"
    words = [f"- **{case.name}.** Expected: {case.why} Measured: {measured}: "]
    said = {"worse": "spheres lose", "better": "spheres win all the same"}
    words.append(said.get(judged(found), "no difference that these seeds show") + ". ")
    for entry in remedies:
        after = against_reference(runs, case, entry)
        words.append(f"With {entry.told} ({entry.optimizer}): {with_interval(after)}, {_outcome(found, after)}. ")
    return "".join(words).strip()


def _outcome(before: PairedDifference, after: PairedDifference) -> str:
    """Whether a remedy brings spheres level with the reference."""
    if judged(after) == "worse":
        return "still worse" if after.value < before.value else "no remedy"
    return "better than the reference" if judged(after) == "better" else "not told apart from the reference"


def counts(runs: Runs) -> str:
    """In how many cases spheres are worse, and for how many of these there is a remedy."""
    cases = present(runs)
    worse = [case for case in cases if judged(against_reference(runs, case, case.entries[1])) == "worse"]
    cured = [
        case
        for case in worse
        if any(judged(against_reference(runs, case, entry)) != "worse" for entry in case.entries[2:])
    ]
    return (
        f"In {len(worse)} of {len(cases)} cases spheres are worse than the plain optimizer that they are compared with;"
        f" in {len(cured)} of these a remedy leaves no such difference"
    )


def as_markdown(runs: Runs) -> str:
    """What was found in words, and the table."""
    cases = present(runs)
    return "\n".join(
        (
            "# Where spheres do not help\n",
            preamble(runs) + "\n",
            (
                f"{counts(runs)}. Differences of test errors are paired by seed, with Student's interval of 95 %; each"
                " optimizer has the learning rate that validation data chose from the same grid.\n"
            ),
            *(statement(runs, case) for case in cases),
            "",
            table(HEAD, [row_of(runs, case, entry) for case in cases for entry in case.entries]),
        )
    )


def draw(runs: Runs, path: Path) -> None:
    """Difference from the reference with its interval, one row per optimizer."""
    rows = [
        DifferenceRow(
            f"{case.name}: {entry.optimizer}" + (f" ({entry.told})" if entry.told else ""),
            against_reference(runs, case, entry),
            COLOURS[entry.role],
        )
        for case in present(runs)
        for entry in case.entries[1:]
    ]
    told = "test error minus that of the plain optimizer (points, 95 %); spheres red, remedies green"
    draw_differences(rows, told, path)


def main() -> None:
    """Train, or read what was stored, and write table and figure."""
    options = options_for(NAME, "Where spheres do not help, and what helps there.").parse_args()
    runs = collect(NAME, arms(), options)
    show(NAME, as_markdown(runs), lambda path: draw(runs, path), options)


if __name__ == "__main__":
    main()
