"""What a report tells of each contestant and of their differences, as the data of tables and figures."""

from __future__ import annotations

from dataclasses import dataclass

from manifold_nets.comparison.measures import CostRatio, Reach, Sensitivity
from manifold_nets.comparison.ranks import Friedman
from manifold_nets.comparison.report.unit import Unit
from manifold_nets.comparison.statistics import MeanInterval, PairedDifference

__all__ = ["ContestantSummary", "LayerTrace", "RescaledStart", "Summary"]


@dataclass(frozen=True)
class LayerTrace:
    """One layer over time, a median over the runs.

    Args:
        name: the weight's name.
        rotation: angle in radians by which a filter turns in a step, after each epoch.
        norm: mean norm of its filters after each epoch.
    """

    name: str
    rotation: tuple[float, ...]
    norm: tuple[float, ...]


@dataclass(frozen=True)
class RescaledStart:
    """What happens when every initial filter is multiplied by its own power of ten between 10⁻² and 10².

    Args:
        plain: mean validation error of the runs from plain initial filters, at the learning rate chosen for them.
        same_rate: the same from rescaled ones, at that learning rate.
        learning_rate: the one that validation data chose for the rescaled start.
        test: test error from the rescaled start at its own learning rate.
    """

    plain: MeanInterval
    same_rate: MeanInterval
    learning_rate: float
    test: MeanInterval


@dataclass(frozen=True)
class ContestantSummary:
    """One contestant: its runs at the learning rate that validation data chose, and its grid.

    Args:
        name: what it is called.
        sensitivity: validation error over the grid of learning rates.
        learning_rate: the one chosen.
        seeds: of its runs.
        test_errors: one a seed; infinite for a run that diverged.
        test: their mean.
        not_finite: how many of the runs have not diverged, and a test error that is NaN or infinite.
        at_edge: whether the chosen rate is the smallest or the largest of several.
        losses: training loss, runs × epochs, infinite from where a run diverged.
        errors: validation error, likewise.
        passes: passes over the training data to the end of each epoch.
        seconds: training time to the end of each epoch, likewise.
        reach: how soon it comes to the target.
        step_seconds: median seconds a step; NaN where not measured.
        step_ratio: the same relative to the reference.
        memory_ratio: peak memory relative to the reference.
        layers: rotation and norms.
        rescaled: what rescaled initial filters do to it; None where they were not run.
        failed: how many of all its runs, at all learning rates, diverged.
        runs: how many there were.
    """

    name: str
    sensitivity: Sensitivity
    learning_rate: float
    seeds: tuple[int, ...]
    test_errors: tuple[float, ...]
    test: MeanInterval
    not_finite: int
    at_edge: bool
    losses: tuple[tuple[float, ...], ...]
    errors: tuple[tuple[float, ...], ...]
    passes: tuple[float, ...]
    seconds: tuple[tuple[float, ...], ...]
    reach: Reach
    step_seconds: float
    step_ratio: CostRatio | None
    memory_ratio: CostRatio | None
    layers: tuple[LayerTrace, ...]
    rescaled: RescaledStart | None
    failed: int
    runs: int


@dataclass(frozen=True)
class Summary:
    """A whole comparison.

    Args:
        title: the task and the model.
        contestants: in the order in which they were named.
        reference: the name of the one that costs and differences are relative to.
        differences: all pairs of test errors, seed by seed.
        friedman: the test on ranks of test errors; none with fewer than two seeds or contestants.
        critical_difference: of mean ranks; NaN where there is no test.
        cliques: contestants that it cannot tell apart, as places in `contestants`.
        unit: what errors are shown in; they are stored as they are.
        target: the validation error of the time-to-target table.
        choices: how each learning rate was chosen, contestant and reason.
        settings: what was run, name and value.
        notes: what else a reader has to know, in sentences; see `Comparison.notes`.
    """

    title: str
    contestants: tuple[ContestantSummary, ...]
    reference: str
    differences: tuple[PairedDifference, ...]
    friedman: Friedman | None
    critical_difference: float
    cliques: tuple[tuple[int, ...], ...]
    unit: Unit
    target: float
    choices: tuple[tuple[str, str], ...]
    settings: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]
