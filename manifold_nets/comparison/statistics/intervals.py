"""Means with confidence intervals, over runs of which some may have diverged."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from manifold_nets.errors import OptionError

__all__ = ["MeanInterval", "as_runs", "mean_interval"]


@dataclass(frozen=True)
class MeanInterval:
    """A mean over runs and how well it is known.

    Args:
        value: mean of the finite values; NaN where there is none.
        low: lower end of the confidence interval; NaN with fewer than two finite values.
        high: upper end.
        deviation: standard deviation, with n − 1 in the denominator; NaN with fewer than two finite values.
        confidence: the share of intervals made like this that hold the true mean, for normal values.
        count: how many finite values the mean is over.
        lost: how many were not finite: the runs that diverged.
    """

    value: float
    low: float
    high: float
    deviation: float
    confidence: float
    count: int
    lost: int

    @property
    def survivors_only(self) -> bool:
        """Whether runs are missing from the mean, so that it speaks of the survivors and not of the method."""
        return self.lost > 0

    @property
    def half_width(self) -> float:
        """Half the length of the interval; NaN where there is none."""
        return (self.high - self.low) / 2

    def __str__(self) -> str:
        total = self.count + self.lost
        if not self.count:
            return f"none: all {total} diverged" if total else "none"
        spread = f" ± {self.half_width:.3g}" if self.count > 1 else ""
        over = f"{self.count} of {total}, {self.lost} diverged" if self.lost else f"{total}"
        return f"{self.value:.4g}{spread} (n = {over})"


def as_runs(values: ArrayLike, name: str = "values") -> NDArray[np.float64]:
    """A vector of float64, one entry a run; what is not finite stays, as the mark of a run that diverged.

    Raises:
        OptionError: the values are no vector of numbers.
    """
    try:
        runs = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        raise OptionError(name, type(values).__name__, "a sequence of numbers, one a run") from None
    if runs.ndim != 1:
        raise OptionError(name, f"shape {runs.shape}", "one dimension, one number a run")
    return runs


def mean_interval(values: ArrayLike, confidence: float = 0.95) -> MeanInterval:
    """Mean of the finite values with Student's interval, x̄ ± t₍ₙ₋₁₎ s/√n; the others are counted as lost.

    The mean over the survivors of a method that diverges flatters it; `MeanInterval.survivors_only` says when a mean is
    one.

    Args:
        values: one number a run; NaN or infinite for a run that diverged.
        confidence: between 0 and 1.

    Raises:
        OptionError: the values are no vector of numbers, or the confidence is not between 0 and 1.

    Source: W. S. Gosset (1908), https://doi.org/10.1093/biomet/6.1.1.

    Example:
        >>> print(mean_interval([1.0, 2.0, 3.0]))
        2 ± 2.48 (n = 3)
        >>> print(mean_interval([1.0, 2.0, float("nan")]))
        1.5 ± 6.35 (n = 2 of 3, 1 diverged)
    """
    from scipy import stats

    check_confidence(confidence)
    runs = as_runs(values)
    kept = runs[np.isfinite(runs)]
    count, lost = len(kept), len(runs) - len(kept)
    nan = float("nan")
    if not count:
        return MeanInterval(nan, nan, nan, nan, confidence, 0, lost)
    mean = float(kept.mean())
    if count == 1:
        return MeanInterval(mean, nan, nan, nan, confidence, 1, lost)
    deviation = float(kept.std(ddof=1)) if np.ptp(kept) else 0.0  # not the rounding of the mean of equal numbers
    half = float(stats.t.ppf((1 + confidence) / 2, count - 1)) * deviation / float(np.sqrt(count))
    return MeanInterval(mean, mean - half, mean + half, deviation, confidence, count, lost)


def check_confidence(confidence: float) -> None:
    """Refuse a confidence that is not between 0 and 1."""
    if not 0 < confidence < 1:
        raise OptionError("confidence", confidence, "a number between 0 and 1, such as 0.95")
