"""Choosing learning rates and weight decays on few examples, before the runs on all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from manifold_nets.comparison.records import Choice, Settings, Tuned

__all__ = ["tuned_settings", "tuning_settings"]


def tuning_settings(settings: Settings) -> Settings:
    """The comparison that chooses: the same on fewer examples, for as many epochs as `Settings.tune_on` says.

    Example:
        >>> grid = Settings(("sgd",), (0.1, 1.0), seeds=(0,), epochs=30, tune_on=(1000, 500, 50))
        >>> small = tuning_settings(grid)
        >>> small.subset, small.epochs, small.tune_on
        ((1000, 500), 50, None)
    """
    if settings.tune_on is None:
        return settings
    train, validation, epochs = settings.tune_on
    return replace(
        settings,
        seeds=settings.seeds[: settings.tune_seeds],
        subset=(train, validation),
        epochs=epochs,
        tune_on=None,
        tune_seeds=None,
        early_stop=False,
    )


def tuned_settings(settings: Settings, choices: Sequence[Choice]) -> Settings:
    """The comparison of what was chosen.

    A contestant whose runs all diverged takes part with the smallest of the learning rates, and of the weight decays.

    Args:
        settings: with the grid.
        choices: of the comparison of `tuning_settings`.
    """
    least = min(settings.learning_rates), min(settings.weight_decays, default=None)
    return replace(settings, tuned=tuple(Tuned(c.optimizer, c.initial_scale, *(c.trial or least)) for c in choices))
