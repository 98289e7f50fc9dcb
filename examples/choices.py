"""Choices among stored runs that no single comparison made: of a weight decay, and of a recipe; by validation alone."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
from evidence import Run, Runs

from manifold_nets.comparison.statistics import PairedDifference, paired_difference

__all__ = ["at_the_end_of_the_grid", "best", "difference", "merged", "verdict", "with_interval"]


def validation_error(runs: Sequence[Run]) -> tuple[int, float]:
    """How many runs diverged, and the mean validation error of the others: what to choose by."""
    errors = [run.validation_error for run in runs if math.isfinite(run.validation_error)]
    return len(runs) - len(errors), math.fsum(errors) / len(errors) if errors else math.inf


def merged(runs: Runs, name: str, arms: Iterable[str]) -> Runs:
    """The runs of arms that differ in weight decay, or in learning rates, as one arm with one choice an optimizer.

    Each arm has chosen a learning rate for each optimizer; of these choices the one of the smallest mean validation
    error stays, that of the first arm where two are equal.

    Args:
        runs: with all these arms.
        name: of the new arm.
        arms: their names.
    """
    names = list(arms)
    rows = [run for arm in names for run in runs.rows if run.arm == arm]
    kept: dict[tuple[str, str], str] = {}
    for key in dict.fromkeys((run.optimizer, run.initial_scale) for run in rows):
        choices = {arm: runs.chosen(arm, *key) for arm in names}
        present = [arm for arm in names if choices[arm]]
        if present:
            kept[key] = min(present, key=lambda arm: validation_error(choices[arm]))
    return Runs(
        tuple(
            replace(run, arm=name, chosen=run.chosen and run.arm == kept[run.optimizer, run.initial_scale])
            for run in rows
        )
    )


def at_the_end_of_the_grid(runs: Runs, arm: str, optimizer: str) -> bool:
    """Whether the chosen learning rate is the smallest or the largest that was tried, so that others may be better."""
    rates = {run.learning_rate for run in runs.of(arm, optimizer)}
    chosen = {run.learning_rate for run in runs.chosen(arm, optimizer)}
    return bool(chosen & {min(rates), max(rates)})


def best(runs: Runs, arm: str, optimizers: Iterable[str]) -> str:
    """Of some optimizers the one whose chosen runs have the smallest mean validation error."""
    present = [name for name in optimizers if runs.chosen(arm, name)]
    return min(present, key=lambda name: validation_error(runs.chosen(arm, name)))


def difference(first: Sequence[Run], second: Sequence[Run]) -> PairedDifference:
    """Test error in percent of the first minus that of the second, by seed; of no pair where all of one diverged."""
    errors = [[100 * run.test_error for run in runs] for runs in (first, second)]
    count = max(map(len, errors))
    return paired_difference(*(np.array(values or [math.nan] * count) for values in errors))


def with_interval(found: PairedDifference, unit: str = "points") -> str:
    """A difference with Student's interval of 95 %.

    Example: ``−0.40 points (−0.61 … −0.19)``.
    """
    if not found.count:
        return "no pair of runs came through"
    value = f"{found.value:+z.2f} {unit}"
    if found.count < 2:
        return f"{value} (one pair)"
    if found.is_constant:
        return f"{value} (in every pair)".replace("-", "−")
    return f"{value} ({found.t_low:+z.2f} … {found.t_high:+z.2f})".replace("-", "−")


def verdict(low: float, high: float, below: str, above: str, neither: str = "cannot be told apart") -> str:
    """What an interval of a difference says: all of it below zero, all of it above, or neither."""
    if high < 0:
        return below
    return above if low > 0 else neither
