"""What can be found out before the first run: arguments, devices, numbers of examples, contestants that work."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, TypeVar, cast

import torch
from torch import nn

from manifold_nets.comparison.contestants import AnyOptimizer
from manifold_nets.comparison.errors import ContestantError, SettingsError
from manifold_nets.comparison.protocols import Contestant
from manifold_nets.comparison.records import RunKey, Settings
from manifold_nets.comparison.starts import Starts, Subjects
from manifold_nets.comparison.tasks import Task
from manifold_nets.errors import ArgumentTypeError

__all__ = [
    "chosen_numbers",
    "chosen_optimizers",
    "require_contestants",
    "require_device",
    "require_examples",
    "require_subjects",
]

Number = TypeVar("Number", int, float)


def require_subjects(model: object, task: object) -> None:
    """Refuse what is neither a name nor makes a network, and what is neither a name nor a task.

    Raises:
        ArgumentTypeError: one of them is such a thing.
    """
    if isinstance(model, nn.Module) or not (isinstance(model, str) or callable(model)):
        remedy = "Every run starts from fresh weights: pass the class or the function that makes the network."
        raise ArgumentTypeError("model", model, "a name, or a callable that makes a network", remedy)
    if not isinstance(task, (str, Task)):
        raise ArgumentTypeError("task", task, "a name or a Task", "task_from_data makes one of data.")


def chosen_optimizers(optimizers: AnyOptimizer | Sequence[AnyOptimizer]) -> tuple[AnyOptimizer, ...]:
    """The contestants of an argument that may be one, several, or names separated by commas.

    Raises:
        ArgumentTypeError: there is something else among them.

    Example:
        >>> chosen_optimizers("sgd, rsgd")
        ('sgd', 'rsgd')
    """
    if isinstance(optimizers, str):
        return tuple(name.strip() for name in optimizers.split(","))
    remedy, expected = "Write them as ['sgd', 'rsgd'].", "names, optimizer classes or Contestants"
    try:
        one = isinstance(optimizers, Contestant) or callable(optimizers)
        found: tuple[Any, ...] = (optimizers,) if one else tuple(cast(Iterable[Any], optimizers))
    except TypeError as error:
        raise ArgumentTypeError("optimizers", optimizers, expected, remedy) from error
    for item in found:
        if not (isinstance(item, (str, Contestant)) or callable(item)):
            raise ArgumentTypeError("optimizers", item, expected, remedy)
    return found


def chosen_numbers(
    argument: str, values: Iterable[Number], kind: Callable[[Number], Number], remedy: str
) -> tuple[Number, ...]:
    """The numbers of an argument, converted to one kind.

    Args:
        argument: its name.
        values: the numbers.
        kind: what converts one.
        remedy: what an error advises.

    Raises:
        ArgumentTypeError: these are no numbers, or no sequence of them.
    """
    try:
        if not isinstance(values, str):
            return tuple(kind(value) for value in values)
    except (TypeError, ValueError) as error:
        raise ArgumentTypeError(argument, values, "a sequence of numbers", remedy) from error
    raise ArgumentTypeError(argument, values, "a sequence of numbers", remedy)


def require_device(settings: Settings) -> None:
    """Refuse a device that torch does not know or this machine does not have.

    Not part of `Settings`, which are also read where others ran them.

    Raises:
        SettingsError: it is such a device.

    Example:
        >>> require_device(Settings(optimizers=("sgd",), learning_rates=(0.1,), seeds=(0,), epochs=1, device="cpu"))
    """
    name: object = settings.device
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
