"""Measures of robustness and speed of an optimizer: functions of arrays with one entry per run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np
from numpy.typing import ArrayLike, NDArray

from manifold_nets.errors import OptionError


@dataclass(frozen=True)
class Sensitivity:
    """Error over a grid of learning rates, and the width of its good part.

    Args:
        rates: the learning rates, increasing.
        errors: mean over the runs at each rate; infinite if any of them diverged.
        survivor_errors: mean over the runs that did not diverge; NaN if all did.
        diverged: number of diverged runs at each rate.
        best_rate: the smallest rate with the smallest error; NaN if runs diverged at every rate.
        best_error: its error.
        low: the smallest rate of the good part; NaN if there is none.
        high: the largest one.
        width: log₁₀(high / low), in decades; 0 if there is no good part.
        open_low: the good part reaches the smallest rate of the grid, so that it may be wider.
        open_high: the good part reaches the largest rate of the grid.
        tolerance: the largest relative excess over the best error that still counts as good.
    """

    rates: tuple[float, ...]
    errors: tuple[float, ...]
    survivor_errors: tuple[float, ...]
    diverged: tuple[int, ...]
    best_rate: float
    best_error: float
    low: float
    high: float
    width: float
    open_low: bool
    open_high: bool
    tolerance: float

    @property
    def is_lower_bound(self) -> bool:
        """Whether the good part reaches an end of the grid, so that a wider grid might show a larger width."""
        return self.open_low or self.open_high

    def __str__(self) -> str:
        if math.isnan(self.best_rate):
            return "none: runs diverged at every rate"
        if len(self.rates) == 1:
            return "one rate tried"
        return f"{'≥ ' if self.is_lower_bound else ''}{self.width:.2f} decades"


def learning_rate_sensitivity(rates: ArrayLike, errors: ArrayLike, tolerance: float = 0.10) -> Sensitivity:
    """The error over the grid, and the width in decades of the learning rates within 10 % of the best.

    The error at a rate is the mean over its runs, and infinite if one of them diverged. Between neighbouring rates of
    finite error it is interpolated linearly in log₁₀ of the rate; next to an infinite one nothing is assumed, and the
    good part ends at the finite rate. The width is that of the largest interval around the best rate on which the error
    is at most (1 + tolerance) times the best error. Where the interval reaches an end of the grid, the width is a lower
    bound and marked as one.

    Args:
        rates: positive, each once, in any order; shape (rates,).
        errors: shape (rates, runs), at least zero; NaN or infinite for a run that diverged, and for a run that a rate
            lacks, so that a rate that was not run on every seed has no finite error.
        tolerance: at least 0.

    Raises:
        OptionError: the shapes do not fit, a rate is not positive or comes twice, or an error or the tolerance is
            negative.

    Example:
        >>> found = learning_rate_sensitivity([0.01, 0.1, 1.0], [[0.2], [0.1], [0.3]])
        >>> print(found, "around", found.best_rate)
        0.15 decades around 0.1
    """
    order, table = _grid(rates, errors)
    if not tolerance >= 0:
        raise OptionError("tolerance", tolerance, "a number that is at least 0, such as 0.1")
    lost = (~np.isfinite(table)).sum(axis=1)
    survivors = np.array([kept.mean() if len(kept := row[np.isfinite(row)]) else np.nan for row in table])
    means = np.where(lost == 0, survivors, np.inf)
    best = int(np.argmin(means))
    low = high = best_rate = best_error = math.nan
    open_low = open_high = False
    if math.isfinite(means[best]):
        best_rate, best_error = float(order[best]), float(means[best])
        limit, logs = best_error * (1 + tolerance), np.log10(order)
        low, open_low = _edge(logs[best::-1], means[best::-1], limit)
        high, open_high = _edge(logs[best:], means[best:], limit)
    return Sensitivity(
        rates=tuple(order.tolist()),
        errors=tuple(means.tolist()),
        survivor_errors=tuple(survivors.tolist()),
        diverged=tuple(lost.tolist()),
        best_rate=best_rate,
        best_error=best_error,
        low=10**low,
        high=10**high,
        width=0.0 if math.isnan(low) else high - low,
        open_low=open_low,
        open_high=open_high,
        tolerance=tolerance,
    )


def _grid(rates: ArrayLike, errors: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    grid, table = np.asarray(rates, dtype=np.float64), np.asarray(errors, dtype=np.float64)
    if grid.ndim != 1 or not grid.size or not (grid > 0).all() or len(np.unique(grid)) != len(grid):
        raise OptionError("rates", grid.tolist(), "at least one learning rate, positive, each once")
    if table.ndim != 2 or len(table) != len(grid) or not table.size:
        raise OptionError("errors", f"shape {table.shape}", f"({len(grid)}, runs), one row for each learning rate")
    if (table < 0).any():
        raise OptionError("errors", float(np.nanmin(table)), "numbers that are at least 0")
    order = np.argsort(grid)
    return grid[order], table[order]


def _edge(logs: NDArray[np.float64], means: NDArray[np.float64], limit: float) -> tuple[float, bool]:
    """Walk away from the best rate as long as the error is within the limit; where that ends, and if it is the end."""
    for i in range(1, len(logs)):
        if means[i] <= limit:
            continue
        if not math.isfinite(means[i]):
            return float(logs[i - 1]), False
        share = (limit - means[i - 1]) / (means[i] - means[i - 1])
        return float(logs[i - 1] + share * (logs[i] - logs[i - 1])), False
    return float(logs[-1]), True


@dataclass(frozen=True)
class Reach:
    """How soon runs reach an error.

    Args:
        target: the error.
        passes: median over all runs of the passes over the data until they first reach the target; infinite if half of
            them never do.
        seconds: the same for the training time.
        reached: number of runs that reach it.
        runs: number of all runs.
    """

    target: float
    passes: float
    seconds: float
    reached: int
    runs: int

    def __str__(self) -> str:
        some = f" ({self.reached} of {self.runs} runs)" if self.reached < self.runs else ""
        if not math.isfinite(self.passes):
            return f"not reached{some}"
        noun = "pass" if self.passes == 1 else "passes"
        return f"{self.passes:.3g} {noun}, {self.seconds:.3g} s{some}"


def first_at(errors: ArrayLike, costs: ArrayLike, target: float) -> float:
    """Return a run's cost up to the first epoch whose error is at most the target; infinite if there is none.

    Args:
        errors: after each epoch.
        costs: passes or seconds from the start to the end of each epoch.
        target: the error.

    Raises:
        OptionError: errors and costs have different lengths.

    Example:
        >>> first_at([0.5, 0.2, 0.3], [1.0, 2.0, 3.0], 0.2), first_at([0.5, float("nan")], [1.0, 2.0], 0.2)
        (2.0, inf)
    """
    run, spent = np.asarray(errors, dtype=np.float64), np.asarray(costs, dtype=np.float64)
    if run.shape != spent.shape or run.ndim != 1:
        raise OptionError("costs", f"shape {spent.shape}", f"shape {run.shape}, one for each error")
    reached = np.flatnonzero(run <= target)
    return float(spent[reached[0]]) if len(reached) else math.inf


def reach(
    errors: Sequence[ArrayLike], passes: Sequence[ArrayLike], seconds: Sequence[ArrayLike], target: float
) -> Reach:
    """Median passes and seconds until runs first reach a target error; those that never do count as infinite.

    Args:
        errors: for each run, the error after each epoch.
        passes: for each run, passes over the training data from its start to the end of each epoch.
        seconds: the same of the training time.
        target: the error.

    Raises:
        OptionError: there is no run, or the lengths do not fit.

    Example:
        >>> print(reach([[0.5, 0.2], [0.2, 0.1], [0.4, 0.4]], [[1, 2]] * 3, [[0.1, 0.2]] * 3, 0.25))
        2 passes, 0.2 s (2 of 3 runs)
    """
    if not len(errors) or not len(errors) == len(passes) == len(seconds):
        raise OptionError("errors", f"{len(errors)} runs", "at least one, and passes and seconds of the same runs")
    spent = [first_at(run, cost, target) for run, cost in zip(errors, passes, strict=True)]
    times = [first_at(run, cost, target) for run, cost in zip(errors, seconds, strict=True)]
    return Reach(target, median(spent), median(times), sum(math.isfinite(cost) for cost in spent), len(spent))


@dataclass(frozen=True)
class CostRatio:
    """A cost relative to the reference optimizer's.

    Args:
        value: ratio of the medians.
        low: lower quartile of the runs' costs, over the reference's median.
        high: upper quartile.
    """

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f} ({self.low:.2f} … {self.high:.2f})"


def cost_ratio(costs: ArrayLike, reference: ArrayLike) -> CostRatio | None:
    """Seconds or bytes per step relative to the reference's; None if either was not measured.

    Args:
        costs: one number per run; a value that is not finite was not measured.
        reference: the same for the reference.

    Example:
        >>> print(cost_ratio([2.0, 4.0, 3.0], [1.0, 3.0, 2.0]))
        1.50 (1.25 … 1.75)
    """
    ours, theirs = (np.asarray(values, dtype=np.float64) for values in (costs, reference))
    ours, theirs = ours[np.isfinite(ours)], theirs[np.isfinite(theirs)]
    if not len(ours) or not len(theirs) or not np.median(theirs) > 0:
        return None
    low, middle, high = np.quantile(ours, [0.25, 0.5, 0.75]) / np.median(theirs)
    return CostRatio(float(middle), float(low), float(high))
