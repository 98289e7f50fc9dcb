"""Statistics of a comparison: pure functions of arrays, in which runs that diverged are counted and never dropped."""

from __future__ import annotations

from manifold_nets.comparison.statistics.differences import (
    PairedDifference,
    all_differences,
    holm,
    paired_difference,
)
from manifold_nets.comparison.statistics.intervals import MeanInterval, mean_interval
from manifold_nets.comparison.statistics.ranks import Friedman, cliques, critical_difference, friedman, rank_runs

__all__ = [
    "Friedman",
    "MeanInterval",
    "PairedDifference",
    "all_differences",
    "cliques",
    "critical_difference",
    "friedman",
    "holm",
    "mean_interval",
    "paired_difference",
    "rank_runs",
]
