"""What can be found out before the first run: devices, numbers of examples, whether every contestant can be made."""

from __future__ import annotations

from dataclasses import replace

import torch

from manifold_nets.comparison.errors import ContestantError, SettingsError
from manifold_nets.comparison.records import RunKey, Settings
from manifold_nets.comparison.starts import Starts, Subjects

__all__ = ["require_contestants", "require_device", "require_examples"]


def require_device(settings: Settings) -> None:
    """Refuse a device that torch does not know or this machine does not have.

    Not part of `Settings`, which are also read where others ran them.

    Raises:
        SettingsError: it is such a device.

    Example:
        >>> require_device(Settings(optimizers=("sgd",), learning_rates=(0.1,), seeds=(0,), epochs=1, device="cpu"))
    """
    name = settings.device
    if not isinstance(name, str) or not _is_there(name):
        found = ("cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count())))
        raise SettingsError("device", name, f"a device that torch has on this machine, such as {', '.join(found)}")


def _is_there(name: str) -> bool:
    try:
        device = torch.device(name)
        if device.type == "cuda":
            # Only asked: an allocation would take memory of the device for as long as this process lives.
            return torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count()
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError, ImportError):
        return False
    return device.type != "meta"  # which holds no values


def require_examples(settings: Settings, subjects: Subjects) -> None:
    """Refuse more examples than the task has.

    Raises:
        SettingsError: ``subset`` or ``tune_on`` asks for more.
    """
    subjects.reduced(settings.subset)
    if settings.tune_on is not None:
        train, validation, _ = settings.tune_on
        subjects.reduced((train, validation), setting="tune_on")


def require_contestants(settings: Settings, subjects: Subjects) -> Starts:
    """Refuse contestants that cannot be made for the model, on the processor.

    Returns:
        Where the runs start, for whoever carries them out.

    Raises:
        ContestantError: one cannot; it is named, with the cause.
    """
    starts = Starts(subjects, replace(settings, device="cpu"))
    for name, scale in ((n, s) for n in settings.optimizers for s in settings.initial_scales):
        rate, decay = settings.trials(name, scale)[0]
        key = RunKey(name, rate, settings.seeds[0], scale, decay)
        own = replace(settings, device="cpu", weight_decay=settings.decay_of(key), weight_decays=())
        try:
            with torch.random.fork_rng():
                subjects.contestants[name].make(starts.model(key), rate, own)
        except Exception as error:
            raise ContestantError(key, name, f"{type(error).__name__}: {error}") from error
    return starts
