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

# Formerly built-in names, by the file of examples/paper that now defines them.
_MOVED = {
    "camvid": "camvid segnet-basic",
    "protocol": "un sm-columns rsgd-all radam-all",
    "ratings": "movielens towers",
    "series": "japanese-vowels osuleaf acsf1 basic-motions conv1d",
    "text": "python-manual transformer",
}


def what_to_write(option: str, name: str, known: Iterable[str]) -> str:
    """Return what to do about an unknown name: where it moved, or which known names are close."""
    name = name.partition(":")[0]
    for file, names in _MOVED.items():
        if name in names.split():
            place = f"examples/paper/{file}.py:{name.replace('-', '_')}"
            return f"It is no longer built in. In a clone of the repository, use {option} {place}."
    return f"{near_matches(name, known)} Correct the name.".strip()


class _FoundError(ManifoldNetsError):
    """Base of the errors of the form "WHERE: found X; expected Y. What to do.".

    Args:
        where: the file, folder, setting or run that is wrong.
        found: its value.
        expected: which values are valid; by default the class attribute ``expected``.
        remedy: what to do; by default the class attribute ``remedy``.
    """

    expected = remedy = ""

    def __init__(self, where: object, found: object, expected: str = "", remedy: str = "") -> None:
        super().__init__(f"{where}: found {found}; expected {expected or self.expected}. {remedy or self.remedy}")


class RecordError(_FoundError, ValueError):
    """Stored data of a comparison are damaged or were written by another version."""

    remedy = "The file is damaged or from another version: restore it, or run the comparison into an empty folder."


class SettingsError(_FoundError, ValueError):
    """A setting of a comparison has an invalid value."""

    remedy = "Change this setting and start again."

    def __init__(self, setting: str, found: object, expected: str) -> None:
        super().__init__(setting, repr(found), expected)


class TaskSourceError(_FoundError, RuntimeError):
    """A callable did not return a task or a model, or the model does not fit the task."""

    remedy = "Check that this call works in Python."


class DataFolderError(_FoundError, FileNotFoundError):
    """The folder of a data set does not exist or lacks a file."""

    def __init__(self, folder: object, found: str, expected: Iterable[str], remedy: str) -> None:
        super().__init__(folder, found, listed(expected), remedy)


class DataFileError(_FoundError, ValueError):
    """A data file is damaged or has another format."""

    remedy = "Download the file again."


class ComparisonFolderError(_FoundError, OSError):
    """A folder does not hold a finished comparison."""

    expected = "a finished comparison"
    remedy = "Pass the --output folder of a finished comparison, or run its command again to finish it."


class StorageError(_FoundError, RuntimeError):
    """The database of a comparison cannot be opened, or does not contain the study."""


class OptimizerNameError(_FoundError, ValueError):
    """No optimizer has this name."""

    def __init__(self, name: str, known: Iterable[str]) -> None:
        expected = f"one of {', '.join(sorted(known))}, or file.py:NAME of an optimizer class"
        super().__init__("optimizers", repr(name), expected, what_to_write("--optimizers", name, known))


class TaskNameError(_FoundError, ValueError):
    """No task or model of a comparison has this name, or its settings are invalid."""


class DifferentCommandError(ManifoldNetsError, ValueError):
    """A folder or study holds the runs of a comparison with other settings."""

    def __init__(self, place: object, differences: Sequence[str]) -> None:
        super().__init__(
            f"{place}: it holds a comparison with other settings: {'; '.join(differences)}. "
            "Use the same settings to continue it, add optimizers, learning rates or seeds to extend it, or choose "
            "another folder."
        )
        self.differences = tuple(differences)


class FolderInUseError(_FoundError, RuntimeError):
    """Another process is running a comparison in the same folder."""

    expected = "none"
    remedy = "Wait for it or stop it. For several processes use --workers N; for several machines, --storage URL."


class RunFailedError(_FoundError, RuntimeError):
    """A run failed for a reason other than divergence."""

    expected = "a result"
    remedy = "Fix the cause and run the same command again: finished runs are kept."


class OptimizerBuildError(RunFailedError):
    """An optimizer cannot be built for the model of the comparison."""

    expected = "an optimizer that can be built for this model; no run was started"


class CodeNotAllowedError(_FoundError, RuntimeError):
    """The study in a shared database uses code that this worker may not run."""

    expected = "built-in tasks, models and optimizers"


def __getattr__(name: str) -> object:
    if name != "ContestantError":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warnings.warn(f"{__name__}.{name} is now called OptimizerBuildError", DeprecationWarning, stacklevel=2)
    return OptimizerBuildError
