"""Ranks of optimizers over blocks, Friedman's test, and the critical differences of mean ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from manifold_nets.errors import OptionError

__all__ = ["Friedman", "cliques", "critical_difference", "friedman", "rank_runs"]


def rank_runs(errors: ArrayLike) -> NDArray[np.float64]:
    """Ranks within each block, 1 for the smallest error; equal errors share their mean rank, diverged runs the worst.

    Args:
        errors: shape (blocks, optimizers); NaN or infinite for a run that diverged.

    Raises:
        OptionError: not two dimensions, or one is empty.

    Example:
        >>> rank_runs([[0.1, 0.3, 0.1], [0.2, float("nan"), 0.1]]).tolist()
        [[1.5, 3.0, 1.5], [2.0, 3.0, 1.0]]
    """
    from scipy import stats

    table = np.asarray(errors, dtype=np.float64)
    if table.ndim != 2 or not table.size:
        raise OptionError("errors", f"shape {table.shape}", "(blocks, optimizers), at least one of each")
    worst = np.where(np.isfinite(table), table, np.inf)
    ranked: NDArray[np.float64] = stats.rankdata(worst, axis=1)
    return ranked


@dataclass(frozen=True)
class Friedman:
    """Friedman's test of whether any optimizers differ.

    Args:
        mean_ranks: one per optimizer; smaller is better.
        statistic: χ², corrected for ties.
        p_value: of χ² with optimizers − 1 degrees of freedom; conservative with few blocks.
        blocks: how many blocks the ranks are over.
    """

    mean_ranks: tuple[float, ...]
    statistic: float
    p_value: float
    blocks: int


def friedman(errors: ArrayLike) -> Friedman:
    """Friedman's test on the ranks rᵢⱼ in n blocks of k optimizers.

    χ² = (k − 1) Σⱼ (Σᵢ rᵢⱼ − n(k+1)/2)² / Σᵢⱼ (rᵢⱼ − (k+1)/2)², which equals the classical statistic with its
    correction for ties. When the blocks are seeds of one task, the test speaks of further seeds of that task, not of
    other tasks.

    Args:
        errors: shape (blocks, optimizers); NaN or infinite for a run that diverged, which ranks worst.

    Raises:
        OptionError: fewer than two blocks or optimizers.

    Source: M. Friedman (1937), https://doi.org/10.1080/01621459.1937.10503522; for comparisons of learning methods
    J. Demšar (2006), https://www.jmlr.org/papers/v7/demsar06a.html.

    Example:
        >>> found = friedman([[1, 2, 3], [1, 2, 3], [1, 3, 2], [1, 2, 3]])
        >>> found.mean_ranks, round(found.statistic, 2), round(found.p_value, 3)
        ((1.0, 2.25, 2.75), 6.5, 0.039)
    """
    from scipy import stats

    ranked = rank_runs(errors)
    blocks, optimizers = ranked.shape
    if blocks < 2 or optimizers < 2:
        raise OptionError("errors", f"shape {ranked.shape}", "at least two blocks and two optimizers")
    centred = ranked - (optimizers + 1) / 2
    spread = float((centred**2).sum())
    statistic = (optimizers - 1) * float((centred.sum(axis=0) ** 2).sum()) / spread if spread else 0.0
    p = float(stats.chi2.sf(statistic, optimizers - 1))
    return Friedman(tuple(ranked.mean(axis=0).tolist()), statistic, p, blocks)


def critical_difference(optimizers: int, blocks: int, significance: float = 0.05) -> float:
    """Nemenyi's critical difference of two mean ranks, q √(k(k+1) / 6n).

    Mean ranks that are further apart differ at the given significance, all pairs together. q is the upper quantile of
    the studentized range of k normal variables, divided by √2.

    Args:
        optimizers: k, at least 2.
        blocks: n, at least 2.
        significance: between 0 and 1.

    Raises:
        OptionError: a value is out of its range.

    Source: J. Demšar (2006), *Statistical comparisons of classifiers over multiple data sets*, section 3.2.2 and
    table 5, https://www.jmlr.org/papers/v7/demsar06a.html.

    Example:
        >>> round(critical_difference(4, 14, 0.10), 2)
        1.12
    """
    from scipy import stats

    if optimizers < 2:
        raise OptionError("optimizers", optimizers, "at least 2")
    if blocks < 2:
        raise OptionError("blocks", blocks, "at least 2")
    if not 0 < significance < 1:
        raise OptionError("significance", significance, "a number between 0 and 1, such as 0.05")
    q = float(stats.studentized_range.ppf(1 - significance, optimizers, np.inf)) / np.sqrt(2)
    return float(q * np.sqrt(optimizers * (optimizers + 1) / (6 * blocks)))


def cliques(mean_ranks: Sequence[float], difference: float) -> tuple[tuple[int, ...], ...]:
    """The largest sets of optimizers of which no two mean ranks are further apart than the critical difference.

    Args:
        mean_ranks: one per optimizer.
        difference: the critical difference.

    Returns:
        Sets of at least two places in ``mean_ranks``, each by increasing rank; none lies within another.

    Example:
        >>> cliques([1.0, 3.5, 1.8, 2.6], 1.0)
        ((0, 2), (2, 3), (3, 1))
    """
    order = sorted(range(len(mean_ranks)), key=lambda i: (mean_ranks[i], i))
    found: list[tuple[int, ...]] = []
    reached = 0
    for start, first in enumerate(order):
        end = start
        while end < len(order) and mean_ranks[order[end]] - mean_ranks[first] <= difference:
            end += 1
        if end > reached and end - start > 1:
            found.append(tuple(order[start:end]))
        reached = max(reached, end)
    return tuple(found)
