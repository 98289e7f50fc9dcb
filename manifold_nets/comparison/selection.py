"""Select learning rates and weight decays by validation data alone, and keep final weights until then."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from manifold_nets.comparison.results import Choice, RunResult
from manifold_nets.comparison.settings import InitialScale, RunKey, Settings, Trial, Tuned
from manifold_nets.conversion.storage import read_tensors, tensors_checksum
from manifold_nets.files import atomic_file
from manifold_nets.page.markup import plural

_ALL_DIVERGED = "every run diverged at every learning rate"


def choose_all(settings: Settings, results: Mapping[RunKey, RunResult]) -> tuple[Choice, ...]:
    """One choice for each optimizer and initial scale, in the order of the settings."""
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
    """Choose the learning rate and weight decay of an optimizer by the mean validation error at the end of training.

    No epoch is picked and no test data are read. A diverged run counts as worse than any error: trials are ordered
    first by the number of their diverged runs. Ties are broken by the mean validation loss, then by the smaller rate,
    then by the smaller weight decay.

    Args:
        settings: settings of the comparison.
        results: at least all runs of these trials.
        optimizer: name of the optimizer.
        initial_scale: initial scale of the runs.
        trials: pairs of learning rate and weight decay to choose from (default: all of the settings).

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


def _mean(values: Sequence[float | None]) -> float:
    finite = [value for value in values if value is not None]
    return math.fsum(finite) / len(finite) if finite else math.inf


def _reason(
    best: Trial, errors: Mapping[Trial, float], losses: Mapping[Trial, float], lost: Mapping[Trial, int], seeds: int
) -> str:
    pairs = "learning rates" if best[1] is None else "pairs of learning rate and weight decay"
    among = f"of {len(errors)} {pairs}" if len(errors) > 1 else "of one learning rate"
    reason = f"smallest mean validation error at the end of training, {errors[best]:.4g}, {among}"
    reason += f" and {plural(seeds, 'seed')}"
    rivals = [trial for trial in errors if (lost[trial], errors[trial]) == (lost[best], errors[best]) and trial != best]
    if rivals:
        by_loss = any(losses[trial] != losses[best] for trial in rivals)
        smaller = "smaller rate" if best[1] is None else "smaller rate, then the smaller weight decay"
        reason += f"; equal at {', '.join(map(_trial_text, rivals))}, decided by the "
        reason += "mean validation loss" if by_loss else smaller
    if lost[best]:
        fewest = ", and at no other rate fewer" if len(errors) > 1 else ""
        reason += f"; {lost[best]} of its {plural(seeds, 'run')} diverged{fewest}"
    elif any(lost.values()):
        rates = ", ".join(_trial_text(trial) for trial in lost if lost[trial])
        reason += f"; rates with diverged runs ({rates}) come last"
    return reason


def _trial_text(trial: Trial) -> str:
    rate, decay = trial
    return f"{rate:.3g}" if decay is None else f"{rate:.3g} with weight decay {decay:.3g}"


def tuning_settings(settings: Settings) -> Settings:
    """The settings for tuning: the same with the examples and epochs of `Settings.tune_on`.

    Example:
        >>> grid = Settings(("sgd",), (0.1, 1.0), seeds=(0,), epochs=30, tune_on=(1000, 500, 50))
        >>> small = tuning_settings(grid)
        >>> small.subset, small.epochs, small.tune_on
        ((1000, 500), 50, None)
    """
    if settings.tune_on is None:
        return settings
    train, validation, epochs = settings.tune_on
    seeds, subset = settings.seeds[: settings.tune_seeds], (train, validation)
    return replace(settings, seeds=seeds, subset=subset, epochs=epochs, tune_on=None, tune_seeds=None, early_stop=False)


def tuned_settings(settings: Settings, choices: Sequence[Choice]) -> Settings:
    """The settings with the tuned hyperparameters.

    An optimizer whose runs all diverged gets the smallest of the learning rates and of the weight decays.

    Args:
        settings: the settings with the grid.
        choices: of the comparison of `tuning_settings`.
    """
    least = min(settings.learning_rates), min(settings.weight_decays, default=None)
    return replace(settings, tuned=tuple(Tuned(c.optimizer, c.initial_scale, *(c.trial or least)) for c in choices))


# ---- final weights ---------------------------------------------------------------------------------------------------


def weights_file(folder: Path, key: RunKey) -> Path:
    """The weights file of a run, named after its optimizer and a hash of its settings.

    Example:
        >>> weights_file(Path("out"), RunKey("sgd", 0.1, 0)).name
        'sgd-36a97cd0877d.safetensors'
    """
    digits = hashlib.sha256(json.dumps(key.to_dict(), sort_keys=True).encode()).hexdigest()[:12]
    return folder / f"{''.join(c if c.isalnum() or c in '-_' else '_' for c in key.optimizer)}-{digits}.safetensors"


def keep_weights(folder: Path, key: RunKey, weights: Mapping[str, Tensor]) -> None:
    """Write the final weights of a run, with its name and a checksum in the metadata."""
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_file(weights_file(folder, key)) as temporary:
        save_file(dict(weights), temporary, metadata=_metadata(key, weights))


def kept_weights(folder: Path, key: RunKey) -> dict[str, Tensor] | None:
    """Read the final weights of a run; None if the file is missing or damaged."""
    try:
        with weights_file(folder, key).open("rb") as file:
            weights, metadata = read_tensors(file)
    except Exception:  # noqa: BLE001 (the reader goes by what the file says of itself, and may raise anything)
        return None
    return weights if metadata == _metadata(key, weights) else None


def _metadata(key: RunKey, weights: Mapping[str, Tensor]) -> dict[str, str]:
    run = {"run": str(key)}
    dense = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    return {"run": json.dumps({**run, "checksum": tensors_checksum(dense, run)})}


def prune_weights(folder: Path, settings: Settings, results: Mapping[RunKey, RunResult], last: RunKey) -> None:
    """Delete the weights of trials that can no longer be chosen for the optimizer of the run that ended last.

    Among the trials whose runs have all ended, only the best so far can still be chosen.
    """
    keys = {
        trial: [replace(last, learning_rate=trial[0], weight_decay=trial[1], seed=seed) for seed in settings.seeds]
        for trial in settings.trials(last.optimizer, last.initial_scale)
    }
    ended = [trial for trial in keys if all(key in results for key in keys[trial])]
    if len(ended) > 1:
        best = choose(settings, results, last.optimizer, last.initial_scale, trials=ended).trial
        for key in (key for trial in ended if trial != best for key in keys[trial]):
            weights_file(folder, key).unlink(missing_ok=True)
