"""Choosing a learning rate for each contestant by validation data alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from manifold_nets.comparison.records import Choice, InitialScale, RunKey, RunResult, Settings

__all__ = ["choose", "choose_all"]


def choose_all(settings: Settings, results: Mapping[RunKey, RunResult]) -> tuple[Choice, ...]:
    """One choice for each contestant and initial scale, in the order of the settings."""
    return tuple(
        choose(settings, results, optimizer, scale)
        for scale in settings.initial_scales
        for optimizer in settings.optimizers
    )


def choose(
    settings: Settings,
    results: Mapping[RunKey, RunResult],
    optimizer: str,
    initial_scale: InitialScale,
    *,
    rates: Sequence[float] | None = None,
) -> Choice:
    """Choose the learning rate of a contestant by the mean validation error at the end of training.

    No epoch is picked and no test data are looked at. A run that diverged counts as worse than any error, so that the
    rates are first ordered by how many of their runs diverged. Equal means are decided by the mean validation loss,
    then by the smaller rate.

    Args:
        settings: of the comparison.
        results: of at least all runs at these rates.
        optimizer: name of the contestant.
        initial_scale: of the runs.
        rates: the learning rates to choose from; all of the settings when left out.

    Example:
        >>> settings = Settings(optimizers=("sgd",), learning_rates=(0.1, 1.0), seeds=(0,), epochs=1)
        >>> runs = {k: RunResult(k, "diverged", (), (), 1, None, None, 0.0, "") for k in settings.run_keys()}
        >>> print(choose(settings, runs, "sgd", "plain").reason)
        every run diverged at every learning rate
    """
    grid = tuple(settings.learning_rates if rates is None else rates)
    table = {rate: [results[RunKey(optimizer, rate, seed, initial_scale)] for seed in settings.seeds] for rate in grid}
    lost = {rate: sum(run.diverged for run in runs) for rate, runs in table.items()}
    errors = {rate: _mean([run.validation_error for run in runs]) for rate, runs in table.items()}
    losses = {rate: _mean([run.validation_loss for run in runs]) for rate, runs in table.items()}
    best = min(grid, key=lambda rate: (lost[rate], errors[rate], losses[rate], rate))
    survived = lost[best] < len(settings.seeds)
    return Choice(
        optimizer=optimizer,
        initial_scale=initial_scale,
        learning_rate=best if survived else None,
        validation_errors=tuple(errors[rate] if math.isfinite(errors[rate]) else None for rate in grid),
        diverged=tuple(lost[rate] for rate in grid),
        reason=_reason(best, errors, losses, lost, len(settings.seeds)) if survived else _ALL_DIVERGED,
    )


_ALL_DIVERGED = "every run diverged at every learning rate"


def _mean(values: Sequence[float | None]) -> float:
    finite = [value for value in values if value is not None]
    return math.fsum(finite) / len(finite) if finite else math.inf


def _reason(
    best: float, errors: Mapping[float, float], losses: Mapping[float, float], lost: Mapping[float, int], seeds: int
) -> str:
    among = f"of {len(errors)} learning rates" if len(errors) > 1 else "of one learning rate"
    reason = f"smallest mean validation error at the end of training, {errors[best]:.4g}, {among} and {seeds} seeds"
    rivals = [rate for rate in errors if (lost[rate], errors[rate]) == (lost[best], errors[best]) and rate != best]
    if rivals:
        equal = ", ".join(f"{rate:.3g}" for rate in rivals)
        by_loss = any(losses[rate] != losses[best] for rate in rivals)
        reason += f"; equal at {equal}, decided by the {'mean validation loss' if by_loss else 'smaller rate'}"
    if lost[best]:
        reason += f"; {lost[best]} of its runs diverged, and at no rate fewer"
    elif any(lost.values()):
        reason += f"; rates with diverged runs ({', '.join(f'{r:.3g}' for r in lost if lost[r])}) come last"
    return reason
