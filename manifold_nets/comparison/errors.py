"""Errors of comparisons: settings, names, data, folders, databases and runs."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence

from manifold_nets.errors import ManifoldNetsError, listed, near_matches

__all__ = [
    "CodeNotAllowedError",
    "ComparisonFolderError",
    "DataFileError",
    "DataFolderError",
    "DifferentCommandError",
    "FolderInUseError",
    "OptimizerBuildError",
    "OptimizerNameError",
    "RecordError",
    "RunFailedError",
    "SettingsError",
    "StorageError",
    "TaskNameError",
    "TaskSourceError",
    "what_to_write",
]

# Names that earlier versions had built in, by the files of examples/paper that have them now.
_MOVED = {
    "camvid": "camvid segnet-basic",
    "protocol": "un sm-columns rsgd-all radam-all",
    "ratings": "movielens towers",
    "series": "japanese-vowels osuleaf acsf1 basic-motions conv1d",
    "text": "python-manual transformer",
}


def what_to_write(option: str, name: str, known: Iterable[str]) -> str:
    """What to do about a name that is not known: where it has moved to, or which names look like it."""
    name = name.partition(":")[0]
    for file, names in _MOVED.items():
        if name in names.split():
            place = f"examples/paper/{file}.py:{name.replace('-', '_')}"
            return f"It is no longer built in; from the source repository, use {option} {place}."
    return f"{near_matches(name, known)} Correct the name.".strip()


class _FoundError(ManifoldNetsError):
    """Base of errors that say where something else was found than expected, and what to do.

    Args:
        where: file, place or setting.
        found: what is there.
        expected: what should be; that of the class when left out.
        remedy: what to do; that of the class when left out.
    """

    expected = remedy = ""

    def __init__(self, where: object, found: object, expected: str = "", remedy: str = "") -> None:
        super().__init__(f"{where}: found {found}; expected {expected or self.expected}. {remedy or self.remedy}")


class RecordError(_FoundError, ValueError):
    """Stored data of a comparison do not have the form in which they were written."""

    remedy = "The file is damaged or of another version: restore it, or run the comparison into an empty folder."


class SettingsError(_FoundError, ValueError):
    """A setting of a comparison has an invalid value."""

    remedy = "Change it and start again."

    def __init__(self, setting: str, found: object, expected: str) -> None:
        super().__init__(setting, repr(found), expected)


class TaskSourceError(_FoundError, RuntimeError):
    """A callable did not return a task or a model, or the model does not fit the task."""

    remedy = "Check that it runs in Python as written."


class DataFolderError(_FoundError, FileNotFoundError):
    """The folder of a data set does not exist or lacks a file."""

    def __init__(self, folder: object, found: str, expected: Iterable[str], remedy: str) -> None:
        super().__init__(folder, found, listed(expected), remedy)


class DataFileError(_FoundError, ValueError):
    """A data file is damaged or has another format."""

    remedy = "Fetch the file again."


class ComparisonFolderError(_FoundError, OSError):
    """A folder holds no finished comparison."""

    expected = "a finished comparison"
    remedy = "Name the --output folder of a comparison that has ended, or start its command again."


class StorageError(_FoundError, RuntimeError):
    """The database of a comparison cannot be opened, or lacks the study."""


class OptimizerNameError(_FoundError, ValueError):
    """No optimizer has this name."""

    def __init__(self, name: str, known: Iterable[str]) -> None:
        expected = f"one of {', '.join(sorted(known))}, or file.py:NAME of an optimizer class"
        super().__init__("optimizers", repr(name), expected, what_to_write("--optimizers", name, known))


class TaskNameError(_FoundError, ValueError):
    """No task or model of a comparison has this name, or its settings are invalid."""


class DifferentCommandError(ManifoldNetsError, ValueError):
    """A folder or a study holds the runs of a command with other settings."""

    def __init__(self, place: object, differences: Sequence[str]) -> None:
        super().__init__(
            f"{place}: it holds a comparison with other settings: {'; '.join(differences)}. "
            "Start it with the same settings to continue it, with more optimizers, learning rates or seeds to extend "
            "it, or choose another folder."
        )
        self.differences = tuple(differences)


class FolderInUseError(_FoundError, RuntimeError):
    """Another process works in the same folder."""

    expected = "none"
    remedy = (
        "Wait for it or end it; for several processes at once use --workers N, or --storage URL for several machines."
    )


class RunFailedError(_FoundError, RuntimeError):
    """A run ended without a result, for a reason other than divergence."""

    expected = "a result"
    remedy = "Correct the cause and start the same command again: the runs that are done are kept."


class OptimizerBuildError(RunFailedError):
    """An optimizer cannot be made for the model of the comparison, so that none of its runs could be carried out."""

    expected = "an optimizer that can be made for this model; no run was carried out"


class CodeNotAllowedError(_FoundError, RuntimeError):
    """The study in a shared database names code that the worker was not allowed to run."""

    expected = "built-in tasks, models and optimizers"


def __getattr__(name: str) -> object:
    if name != "ContestantError":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warnings.warn(f"{__name__}.{name} is now called OptimizerBuildError", DeprecationWarning, stacklevel=2)
    return OptimizerBuildError
