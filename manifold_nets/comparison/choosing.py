"""Choosing learning rate and weight decay for each contestant by validation data alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from manifold_nets.comparison.records import Choice, InitialScale, RunKey, RunResult, Settings, Trial
from manifold_nets.page.markup import plural

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
    trials: Sequence[Trial] | None = None,
) -> Choice:
    """Choose learning rate and weight decay of a contestant by the mean validation error at the end of training.

    No epoch is picked and no test data are looked at. A run that diverged counts as worse than any error, so that the
    trials are first ordered by how many of their runs diverged. Equal means are decided by the mean validation loss,
    then by the smaller rate, then by the smaller weight decay.

    Args:
        settings: of the comparison.
        results: of at least all runs of these trials.
        optimizer: name of the contestant.
        initial_scale: of the runs.
        trials: the pairs of learning rate and weight decay to choose from; all of the settings when left out.

    Example:
        >>> settings = Settings(optimizers=("sgd",), learning_rates=(0.1, 1.0), seeds=(0,), epochs=1)
        >>> runs = {k: RunResult(k, "diverged", (), (), 1, None, None, 0.0, "") for k in settings.run_keys()}
        >>> print(choose(settings, runs, "sgd", "plain").reason)
        every run diverged at every learning rate
    """
    grid = tuple(settings.trials(optimizer, initial_scale) if trials is None else trials)
    table = {
        (rate, decay): [results[RunKey(optimizer, rate, seed, initial_scale, decay)] for seed in settings.seeds]
        for rate, decay in grid
    }
    lost = {trial: sum(run.diverged for run in runs) for trial, runs in table.items()}
    errors = {trial: _mean([run.validation_error for run in runs]) for trial, runs in table.items()}
    losses = {trial: _mean([run.validation_loss for run in runs]) for trial, runs in table.items()}
    best = min(grid, key=lambda trial: (lost[trial], errors[trial], losses[trial], trial[0], trial[1] or 0.0))
    survived = lost[best] < len(settings.seeds)
    return Choice(
        optimizer=optimizer,
        initial_scale=initial_scale,
        learning_rate=best[0] if survived else None,
        validation_errors=tuple(errors[trial] if math.isfinite(errors[trial]) else None for trial in grid),
        diverged=tuple(lost[trial] for trial in grid),
        reason=_reason(best, errors, losses, lost, len(settings.seeds)) if survived else _ALL_DIVERGED,
        weight_decay=best[1] if survived else None,
    )


_ALL_DIVERGED = "every run diverged at every learning rate"


def _mean(values: Sequence[float | None]) -> float:
    finite = [value for value in values if value is not None]
    return math.fsum(finite) / len(finite) if finite else math.inf


def _reason(
    best: Trial, errors: Mapping[Trial, float], losses: Mapping[Trial, float], lost: Mapping[Trial, int], seeds: int
) -> str:
    among = _among(best, len(errors))
    reason = f"smallest mean validation error at the end of training, {errors[best]:.4g}, {among}"
    reason += f" and {plural(seeds, 'seed')}"
    rivals = [trial for trial in errors if (lost[trial], errors[trial]) == (lost[best], errors[best]) and trial != best]
    if rivals:
        equal = ", ".join(map(_told, rivals))
        by_loss = any(losses[trial] != losses[best] for trial in rivals)
        smaller = "smaller rate" if best[1] is None else "smaller rate, then the smaller weight decay"
        reason += f"; equal at {equal}, decided by the {'mean validation loss' if by_loss else smaller}"
    if lost[best]:
        fewest = ", and at no other rate fewer" if len(errors) > 1 else ""
        reason += f"; {lost[best]} of its {plural(seeds, 'run')} diverged{fewest}"
    elif any(lost.values()):
        reason += f"; rates with diverged runs ({', '.join(_told(trial) for trial in lost if lost[trial])}) come last"
    return reason


def _among(best: Trial, count: int) -> str:
    if best[1] is None:
        return f"of {count} learning rates" if count > 1 else "of one learning rate"
    return f"of {count} pairs of learning rate and weight decay" if count > 1 else "of one learning rate"


def _told(trial: Trial) -> str:
    rate, decay = trial
    return f"{rate:.3g}" if decay is None else f"{rate:.3g} with weight decay {decay:.3g}"
