"""The content of a report about each optimizer and their differences: the data of tables and figures."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import get_args

import numpy as np

from manifold_nets.comparison import measures, statistics
from manifold_nets.comparison.measures import CostRatio, Reach, Sensitivity
from manifold_nets.comparison.results import Comparison, RunResult
from manifold_nets.comparison.settings import InitialScale, Settings
from manifold_nets.comparison.statistics import Friedman, MeanInterval, PairedDifference, mean_interval


@dataclass(frozen=True)
class Unit:
    """A unit of errors.

    Args:
        scale: factor of errors.
        sign: written after the number; empty for none.
    """

    scale: float
    sign: str

    def label(self, text: str) -> str:
        """A heading with the unit.

        Example:
            >>> PERCENT.label("test error"), PLAIN.label("test error")
            ('test error (%)', 'test error')
        """
        return f"{text} ({self.sign})" if self.sign else text

    def number(self, value: float) -> str:
        """Two decimals of a percent, or four significant digits."""
        return f"{self.scale * value:.2f}" if self.sign else f"{value:.4g}"

    def signed(self, value: float) -> str:
        """The same of a difference, with its sign; zero has none.

        Example:
            >>> PERCENT.signed(0.0123), PERCENT.signed(-1e-7), PLAIN.signed(-0.5)
            ('+1.23', '0.00', '−0.5')
        """
        text = self.number(abs(value))
        if float(text) == 0:
            return text
        return f"{'−' if value < 0 else '+'}{text}"

    def short(self, value: float) -> str:
        """At most three significant digits, and the sign.

        Example:
            >>> PERCENT.short(0.0312), PERCENT.short(0.25), PLAIN.short(1.5)
            ('3.12 %', '25 %', '1.5')
        """
        return self.behind(f"{self.scale * value:.3g}" if math.isfinite(value) else "∞")

    def behind(self, text: str) -> str:
        """A text with the sign behind it."""
        return f"{text} {self.sign}" if self.sign else text


PERCENT, PLAIN = Unit(100.0, "%"), Unit(1.0, "")


def unit_of(errors: Iterable[float]) -> Unit:
    """Percent if no error exceeds 1, as for shares of wrong answers; values that are not finite are ignored.

    Example:
        >>> unit_of([0.1, 1.0, float("inf")]).sign, unit_of([0.1, 1.5]).sign
        ('%', '')
    """
    return PERCENT if all(error <= 1 for error in errors if math.isfinite(error)) else PLAIN


@dataclass(frozen=True)
class LayerTrace:
    """One layer over time, a median over the runs.

    Args:
        name: the weight's name.
        rotation: angle in radians by which a filter turns per step, after each epoch.
        norm: mean norm of its filters after each epoch.
    """

    name: str
    rotation: tuple[float, ...]
    norm: tuple[float, ...]


@dataclass(frozen=True)
class RescaledStart:
    """The effect of multiplying every initial filter by its own power of ten between 10⁻² and 10².

    Args:
        plain: mean validation error of the runs from plain initial filters, at the learning rate chosen for them.
        same_rate: the same from rescaled ones, at that learning rate.
        learning_rate: the rate chosen by validation for the rescaled start.
        test: test error from the rescaled start at its own learning rate.
    """

    plain: MeanInterval
    same_rate: MeanInterval
    learning_rate: float
    test: MeanInterval


@dataclass(frozen=True)
class OptimizerSummary:
    """One optimizer: its runs at the learning rate chosen by validation, and its grid.

    Args:
        name: its name.
        sensitivity: validation error over the grid of learning rates.
        learning_rate: the chosen rate.
        seeds: seeds of its runs.
        test_errors: one per seed; infinite for a run that diverged.
        test: their mean.
        not_finite: number of runs that have not diverged but have a NaN or infinite test error.
        at_edge: whether the chosen rate is the smallest or the largest of several.
        losses: training loss, runs × epochs, infinite after divergence.
        errors: the same for the validation error.
        passes: passes over the training data to the end of each epoch.
        seconds: the same for training time.
        reach: how soon it reaches the target.
        step_seconds: median seconds per step; NaN if not measured.
        step_ratio: the same relative to the reference.
        memory_ratio: peak memory relative to the reference.
        layers: rotation and norms.
        rescaled: the effect of rescaled initial filters; None if they were not run.
        failed: number of diverged runs over all learning rates.
        runs: number of runs over all learning rates.
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
        optimizers: in the order of the settings.
        reference: name of the optimizer to which costs and differences are relative.
        differences: all pairs of test errors, paired by seed.
        friedman: the test on ranks of test errors; None with fewer than two seeds or optimizers.
        critical_difference: of mean ranks; NaN if there is no test.
        cliques: sets of optimizers that it cannot distinguish, as indices into `optimizers`.
        unit: the unit in which errors are shown; they are stored without it.
        target: the validation error of the time-to-target table.
        choices: how each learning rate was chosen: optimizer and reason.
        settings: the settings, name and value.
        notes: further remarks, in sentences; see `Comparison.notes`.
    """

    title: str
    optimizers: tuple[OptimizerSummary, ...]
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


def summarise(comparison: Comparison) -> Summary:
    """Compute means, intervals, differences, ranks, robustness and cost of every optimizer.

    The runs of an optimizer are those at the learning rate chosen by validation. An optimizer whose runs diverged at
    every rate counts as diverged on every seed. Test errors are compared; grids and learning curves use the validation
    data.

    Args:
        comparison: a finished comparison.
    """
    settings = comparison.settings
    scale: InitialScale = "plain" if "plain" in settings.initial_scales else settings.initial_scales[0]
    runs = {
        name: [run for run in comparison.results if (run.key.optimizer, run.key.initial_scale) == (name, scale)]
        for name in settings.optimizers
    }
    optimizers = tuple(_optimizer(comparison, name, scale, runs) for name in settings.optimizers)
    tests = {found.name: found.test_errors for found in optimizers}
    ranked = len(optimizers) > 1 and len(settings.seeds) > 1
    ranks = statistics.friedman(np.array([found.test_errors for found in optimizers]).T) if ranked else None
    difference = statistics.critical_difference(len(optimizers), len(settings.seeds)) if ranked else math.nan
    every = [epoch.validation_error for run in comparison.results for epoch in run.epochs]
    every += [_number(run.test_error) for run in comparison.results]
    return Summary(
        title=f"{settings.task}, {settings.model}",
        optimizers=optimizers,
        reference=settings.optimizers[0],
        differences=statistics.all_differences(tests),
        friedman=ranks,
        critical_difference=difference,
        cliques=() if ranks is None else statistics.cliques(ranks.mean_ranks, difference),
        unit=unit_of(every),
        target=settings.target_error,
        choices=tuple((str(choice), choice.reason) for choice in comparison.choices),
        settings=_described(comparison),
        notes=comparison.notes(),
    )


def _optimizer(
    comparison: Comparison, name: str, scale: InitialScale, every: dict[str, list[RunResult]]
) -> OptimizerSummary:
    settings, choice, runs = comparison.settings, comparison.choice(name, scale), comparison.chosen_runs(name, scale)
    step, memory = (
        [[_number(getattr(run, field), math.nan) for run in every[one]] for one in (name, settings.optimizers[0])]
        for field in ("seconds_per_step", "peak_memory_bytes")
    )
    losses, errors, seconds = (
        _padded(runs, settings, field) for field in ("train_loss", "validation_error", "seconds")
    )
    passes = _passes(runs, settings)
    tests = tuple(_number(run.test_error) for run in runs) or (math.inf,) * len(settings.seeds)
    return OptimizerSummary(
        name=name,
        sensitivity=measures.learning_rate_sensitivity(*_grid(comparison, name, scale)),
        learning_rate=_number(choice.learning_rate, math.nan),
        seeds=settings.seeds,
        test_errors=tests,
        test=mean_interval(tests),
        not_finite=sum(run.test_error is not None and not math.isfinite(run.test_error) for run in runs),
        at_edge=comparison.is_at_edge(choice),
        losses=losses,
        errors=errors,
        passes=passes,
        seconds=seconds,
        reach=measures.reach(errors, [passes] * len(errors), seconds, settings.target_error),
        step_seconds=_median(step[0]),
        step_ratio=measures.cost_ratio(*step),
        memory_ratio=measures.cost_ratio(*memory),
        layers=_layers(runs, settings),
        rescaled=_rescaled(comparison, name),
        failed=sum(run.diverged for run in every[name]),
        runs=len(every[name]),
    )


def _passes(runs: Sequence[RunResult], settings: Settings) -> tuple[float, ...]:
    """Passes over the training data to the end of each epoch, of the run with the most."""
    passes = np.arange(1.0, settings.epochs + 1)
    for run in runs:
        made = [round(epoch.evaluations, 6) for epoch in run.epochs]
        passes[: len(made)] = np.maximum(passes[: len(made)], made)
    return tuple(np.maximum.accumulate(passes).tolist())


def _number(value: float | None, missing: float = math.inf) -> float:
    return missing if value is None else value


def _median(values: Iterable[float]) -> float:
    """The median of the finite values; NaN if there is none."""
    known = [value for value in values if math.isfinite(value)]
    return float(np.median(known)) if known else math.nan


def _grid(comparison: Comparison, name: str, scale: InitialScale) -> tuple[list[float], list[list[float]]]:
    """Learning rates and validation errors at the end of training: a row per learning rate, a column per seed.

    If weight decay is tuned, at the chosen one, or at the first one if every run diverged.
    """
    trials, chosen = comparison.settings.trials(name, scale), comparison.choice(name, scale)
    decay = trials[0][1] if chosen.trial is None else chosen.weight_decay
    rates = [rate for rate, other in trials if other == decay]
    return rates, [[_number(r.validation_error) for r in comparison.runs(name, rate, scale, decay)] for rate in rates]


def _padded(runs: Sequence[RunResult], settings: Settings, field: str) -> tuple[tuple[float, ...], ...]:
    """A field over the epochs of each run: infinite from where it diverged, the last value from where it stopped."""
    rows = []
    for run in runs:
        values = tuple(float(getattr(epoch, field)) for epoch in run.epochs[: settings.epochs])
        filling = math.inf if run.diverged or not values else values[-1]
        rows.append(values + (filling,) * (settings.epochs - len(values)))
    return tuple(rows) or ((math.inf,) * settings.epochs,) * len(settings.seeds)


def _layers(runs: Sequence[RunResult], settings: Settings) -> tuple[LayerTrace, ...]:
    traces = []
    for place, name in enumerate(runs[0].layers if runs else ()):
        steps = [[run.epochs[i].layers[place] for run in runs if i < len(run.epochs)] for i in range(settings.epochs)]
        rotation = tuple(_median(layer.rotation for layer in step) for step in steps)
        traces.append(LayerTrace(name, rotation, tuple(_median(layer.norm for layer in step) for step in steps)))
    return tuple(traces)


def _rescaled(comparison: Comparison, name: str) -> RescaledStart | None:
    """The rescaled start at the plain start's learning rate and at its own, if both starts were run."""
    if set(comparison.settings.initial_scales) != {"plain", "rescaled"}:
        return None
    lost = [math.inf] * len(comparison.settings.seeds)
    trial, starts = comparison.choice(name, "plain").trial, get_args(InitialScale)
    plain = same = mean_interval(lost)
    if trial is not None and trial in comparison.settings.trials(name, "rescaled"):
        found = [comparison.runs(name, trial[0], start, trial[1]) for start in starts]
        plain, same = (mean_interval([_number(run.validation_error) for run in runs]) for runs in found)
    tests = [_number(run.test_error) for run in comparison.chosen_runs(name, "rescaled")] or lost
    rate = _number(comparison.choice(name, "rescaled").learning_rate, math.nan)
    return RescaledStart(plain, same, rate, mean_interval(tests))


def _described(comparison: Comparison) -> tuple[tuple[str, str], ...]:
    """Every setting that has a value, and where it ran."""
    shown = [
        (name.replace("_", " "), _text(value))
        for name, value in vars(comparison.settings).items()
        if value not in (None, ()) and name != "tuned"
    ]
    versions = ", ".join(f"{package} {version}" for package, version in comparison.environment.versions)
    return (*shown, ("versions", versions), ("machine", comparison.environment.machine))


def _text(value: object) -> str:
    if isinstance(value, tuple):
        return ", ".join(map(_text, value))
    return f"{value:.6g}" if isinstance(value, float) else str(value)
