"""Errors of comparisons: settings, names, data, folders, databases and runs."""

from __future__ import annotations

import shlex
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
]

# Names that earlier versions had built in, and where they are now.
_MOVED = {
    "camvid": "camvid.py:camvid",
    **{
        name: f"series.py:{name.replace('-', '_')}" for name in ("japanese-vowels", "osuleaf", "acsf1", "basic-motions")
    },
    "python-manual": "text.py:python_manual",
    "movielens": "ratings.py:movielens",
    "segnet-basic": "camvid.py:segnet_basic",
    "conv1d": "series.py:conv1d",
    "transformer": "text.py:transformer",
    "towers": "ratings.py:towers",
    **{name: f"protocol.py:{name.replace('-', '_')}" for name in ("un", "sm-columns", "rsgd-all", "radam-all")},
}


def _unknown(option: str, name: str, known: Iterable[str]) -> str:
    """What to do about a name that is not known: where it has moved to, or which names look like it."""
    moved = _MOVED.get(name.partition(":")[0])
    if moved is not None:
        return f"It is no longer built in; from the source repository, use {option} examples/paper/{moved}."
    return f"{near_matches(name, known)} Correct the name.".strip()


class _FoundError(ManifoldNetsError):
    """Base of errors that say where something else was found than expected, and what to do.

    Args:
        where: file, place or setting.
        found: what is there.
        expected: what should be.
        remedy: what to do; that of the class when left out.
    """

    remedy = ""

    def __init__(self, where: object, found: object, expected: str, remedy: str | None = None) -> None:
        super().__init__(f"{where}: found {found}; expected {expected}. {self.remedy if remedy is None else remedy}")


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


class StorageError(_FoundError, RuntimeError):
    """The database of a comparison cannot be opened, or lacks the study."""


class OptimizerNameError(ManifoldNetsError, ValueError):
    """No optimizer has this name."""

    def __init__(self, name: str, known: Iterable[str]) -> None:
        names = sorted(known)
        super().__init__(
            f"optimizers: found {name!r}; expected one of {', '.join(names)}, or file.py:NAME of an optimizer class. "
            f"{_unknown('--optimizers', name, names)}"
        )


class TaskNameError(_FoundError, ValueError):
    """No task or model of a comparison has this name, or its settings are invalid."""

    def __init__(self, what: str, found: str, expected: str, remedy: str) -> None:
        super().__init__(what, repr(found), expected, remedy)

    @classmethod
    def unknown(cls, what: str, found: str, expected: str, known: Iterable[str]) -> TaskNameError:
        """The error for a name that is not known, with similar names or the file that it has moved to."""
        return cls(what, found, expected, _unknown(f"--{what}", found.partition(":")[0], known))


class DifferentCommandError(ManifoldNetsError, ValueError):
    """A folder or a study holds the runs of a command with other settings."""

    def __init__(self, place: object, differences: Sequence[str]) -> None:
        super().__init__(
            f"{place}: it holds a comparison with other settings: {'; '.join(differences)}. "
            "Start it with the same settings to continue it, with more optimizers, learning rates or seeds to extend "
            "it, or choose another folder."
        )
        self.differences = tuple(differences)


class FolderInUseError(ManifoldNetsError, RuntimeError):
    """Another process works in the same folder."""

    def __init__(self, folder: object) -> None:
        super().__init__(
            f"{folder}: another process runs a comparison in this folder; expected none. Wait for it or end it; "
            "for several processes at once use --workers N, or --storage URL for several machines."
        )


class RunFailedError(ManifoldNetsError, RuntimeError):
    """A run ended without a result, for a reason other than divergence."""

    def __init__(self, run: object, reasons: Sequence[str]) -> None:
        super().__init__(
            f"run {run}: found {listed(reasons)}; expected a result. Correct the cause and start the same command "
            "again: the runs that are done are kept."
        )


class OptimizerBuildError(RunFailedError):
    """An optimizer cannot be made for the model of the comparison, so that none of its runs could be carried out."""

    def __init__(self, run: object, name: str, reason: str) -> None:
        ManifoldNetsError.__init__(
            self,
            f"run {run}: found {reason.rstrip('.')}; expected an optimizer that can be made for this model; no run was "
            f"carried out. Correct the cause, or leave {name} out of the optimizers.",
        )


class CodeNotAllowedError(ManifoldNetsError, RuntimeError):
    """The study in a shared database names code that the worker was not allowed to run."""

    def __init__(self, study: str, refused: Sequence[str]) -> None:
        flags = " ".join(f"--allow {shlex.quote(spec)}" for spec in refused)
        super().__init__(
            f"study {study}: found {listed(refused)}, code of this machine that the worker was not allowed to run; "
            f"expected built-in tasks, models and optimizers. If you trust it, start the worker with {flags} "
            f"(in Python allow={list(refused)!r})."
        )
