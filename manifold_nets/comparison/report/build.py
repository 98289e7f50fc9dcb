"""From the runs of a comparison to what a report tells of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import fields

import numpy as np

from manifold_nets.comparison.measures import cost_ratio, learning_rate_sensitivity, reach
from manifold_nets.comparison.ranks import cliques, critical_difference, friedman
from manifold_nets.comparison.report.summary import ContestantSummary, LayerTrace, RescaledStart, Summary
from manifold_nets.comparison.report.unit import unit_of
from manifold_nets.comparison.results import Comparison, RunResult
from manifold_nets.comparison.settings import InitialScale, Settings
from manifold_nets.comparison.statistics import (
    all_differences,
    mean_interval,
)

__all__ = ["summarise"]


def summarise(comparison: Comparison) -> Summary:
    """Work out means, intervals, differences, ranks, robustness and cost of every contestant.

    The runs of a contestant are those at the learning rate that validation data chose for it. A contestant whose runs
    diverged at every rate is shown as one that diverged on every seed. Test errors are compared; grids and learning
    curves are those of the validation data.

    Args:
        comparison: a finished comparison.
    """
    settings = comparison.settings
    scale: InitialScale = "plain" if "plain" in settings.initial_scales else settings.initial_scales[0]
    reference = settings.optimizers[0]
    steps, memory = ({name: _costs(comparison, name, scale, which) for name in settings.optimizers} for which in (0, 1))
    contestants = []
    for name in settings.optimizers:
        runs = comparison.chosen_runs(name, scale)
        every = [run for run in comparison.results if (run.key.optimizer, run.key.initial_scale) == (name, scale)]
        errors, seconds = _padded(runs, settings, "validation_error"), _padded(runs, settings, "seconds")
        passes = _passes(runs, settings)
        tests = tuple(_or_infinite(run.test_error) for run in runs) or (math.inf,) * len(settings.seeds)
        contestants.append(
            ContestantSummary(
                name=name,
                sensitivity=learning_rate_sensitivity(*_grid(comparison, name, scale)),
                learning_rate=_or_nan(comparison.choice(name, scale).learning_rate),
                seeds=settings.seeds,
                test_errors=tests,
                test=mean_interval(tests),
                not_finite=sum(run.test_error is not None and not math.isfinite(run.test_error) for run in runs),
                at_edge=comparison.is_at_edge(comparison.choice(name, scale)),
                losses=_padded(runs, settings, "train_loss"),
                errors=errors,
                passes=passes,
                seconds=seconds,
                reach=reach(errors, [passes] * len(errors), seconds, settings.target_error),
                step_seconds=float(np.median(steps[name])) if steps[name] else math.nan,
                step_ratio=cost_ratio(steps[name], steps[reference]),
                memory_ratio=cost_ratio(memory[name], memory[reference]),
                layers=_layers(runs, settings),
                rescaled=_rescaled(comparison, name),
                failed=sum(run.diverged for run in every),
                runs=len(every),
            )
        )
    return _compared(comparison, contestants)


def _compared(comparison: Comparison, contestants: Sequence[ContestantSummary]) -> Summary:
    settings = comparison.settings
    found, difference = None, math.nan
    joined: tuple[tuple[int, ...], ...] = ()
    if len(contestants) > 1 and len(settings.seeds) > 1:
        found = friedman(np.array([contestant.test_errors for contestant in contestants]).T)
        difference = critical_difference(len(contestants), len(settings.seeds))
        joined = cliques(found.mean_ranks, difference)
    return Summary(
        title=f"{settings.task}, {settings.model}",
        contestants=tuple(contestants),
        reference=settings.optimizers[0],
        differences=all_differences({contestant.name: contestant.test_errors for contestant in contestants}),
        friedman=found,
        critical_difference=difference,
        cliques=joined,
        unit=unit_of(_every_error(comparison)),
        target=settings.target_error,
        choices=tuple((str(choice), choice.reason) for choice in comparison.choices),
        settings=_told(comparison),
        notes=comparison.notes(),
    )


def _or_infinite(value: float | None) -> float:
    return math.inf if value is None else value


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value


def _grid(comparison: Comparison, name: str, scale: InitialScale) -> tuple[list[float], list[list[float]]]:
    """Learning rates and validation errors at the end of training: a row a learning rate, a column a seed.

    Where weight decay is tuned, those at the chosen one; at the first where every run diverged.
    """
    trials = comparison.settings.trials(name, scale)
    chosen = comparison.choice(name, scale)
    decay = trials[0][1] if chosen.trial is None else chosen.weight_decay
    rates = [rate for rate, other in trials if other == decay]
    return rates, [
        [_or_infinite(r.validation_error) for r in comparison.runs(name, rate, scale, decay)] for rate in rates
    ]


def _padded(runs: Sequence[RunResult], settings: Settings, field: str) -> tuple[tuple[float, ...], ...]:
    """A field over the epochs of each run: infinite from where it diverged, the last value from where it stopped."""
    rows = []
    for run in runs:
        values = tuple(float(getattr(epoch, field)) for epoch in run.epochs[: settings.epochs])
        filling = math.inf if run.diverged or not values else values[-1]
        rows.append(values + (filling,) * (settings.epochs - len(values)))
    return tuple(rows) or ((math.inf,) * settings.epochs,) * len(settings.seeds)


def _passes(runs: Sequence[RunResult], settings: Settings) -> tuple[float, ...]:
    """Passes over the training data to the end of each epoch: those of the run that needed most."""
    passes = list(map(float, range(1, settings.epochs + 1)))
    for run in runs:
        for i, epoch in enumerate(run.epochs[: settings.epochs]):
            passes[i] = max(passes[i], round(epoch.evaluations, 6))
    return tuple(np.maximum.accumulate(passes).tolist())


def _costs(comparison: Comparison, name: str, scale: InitialScale, which: int) -> list[float]:
    """Seconds a step or peak bytes of all runs of a contestant, as far as they were measured."""
    found = [
        (run.seconds_per_step, run.peak_memory_bytes)[which]
        for run in comparison.results
        if (run.key.optimizer, run.key.initial_scale) == (name, scale)
    ]
    return [float(value) for value in found if value is not None]


def _layers(runs: Sequence[RunResult], settings: Settings) -> tuple[LayerTrace, ...]:
    names = runs[0].layers if runs else ()
    traces = []
    for place, name in enumerate(names):
        steps = [[run.epochs[i].layers[place] for run in runs if i < len(run.epochs)] for i in range(settings.epochs)]
        rotation = tuple(float(np.median([layer.rotation for layer in step])) if step else math.nan for step in steps)
        norm = tuple(float(np.median([layer.norm for layer in step])) if step else math.nan for step in steps)
        traces.append(LayerTrace(name, rotation, norm))
    return tuple(traces)


def _rescaled(comparison: Comparison, name: str) -> RescaledStart | None:
    """The rescaled start at the plain start's learning rate and at its own, where both starts were run."""
    if set(comparison.settings.initial_scales) != {"plain", "rescaled"}:
        return None
    seeds = len(comparison.settings.seeds)
    lost = [math.inf] * seeds
    trial = comparison.choice(name, "plain").trial
    plain, same = lost, lost
    if trial is not None and trial in comparison.settings.trials(name, "rescaled"):
        plain = [_or_infinite(run.validation_error) for run in comparison.runs(name, trial[0], "plain", trial[1])]
        same = [_or_infinite(run.validation_error) for run in comparison.runs(name, trial[0], "rescaled", trial[1])]
    tests = [_or_infinite(run.test_error) for run in comparison.chosen_runs(name, "rescaled")] or lost
    own = _or_nan(comparison.choice(name, "rescaled").learning_rate)
    return RescaledStart(mean_interval(plain), mean_interval(same), own, mean_interval(tests))


def _every_error(comparison: Comparison) -> Iterator[float]:
    for run in comparison.results:
        yield from (epoch.validation_error for epoch in run.epochs)
        yield _or_infinite(run.test_error)


def _told(comparison: Comparison) -> tuple[tuple[str, str], ...]:
    """Every setting, whatever there is, and where it ran."""
    told = []
    for field in fields(comparison.settings):
        value = getattr(comparison.settings, field.name)
        if value is not None and value != () and field.name != "tuned":
            told.append((field.name.replace("_", " "), _text(value)))
    versions = ", ".join(f"{package} {version}" for package, version in comparison.environment.versions)
    return (*told, ("versions", versions), ("machine", comparison.environment.machine))


def _text(value: object) -> str:
    if isinstance(value, tuple):
        return ", ".join(map(_text, value))
    return f"{value:.6g}" if isinstance(value, float) else str(value)
