"""Errors of comparisons: settings, names, folders, runs."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence

from manifold_nets.errors import ManifoldNetsError, listed, near_matches

__all__ = [
    "CodeNotAllowedError",
    "ComparisonFolderError",
    "ContestantError",
    "DifferentCommandError",
    "FolderInUseError",
    "OptimizerNameError",
    "RecordError",
    "RunFailedError",
    "SettingsError",
    "StorageError",
]


class RecordError(ManifoldNetsError, ValueError):
    """Stored data of a comparison do not have the form that was written."""

    def __init__(self, where: str, found: str, expected: str) -> None:
        super().__init__(
            f"{where}: found {found}; expected {expected}. The file is damaged or of another version: "
            "restore it, or run the comparison into an empty folder."
        )


class SettingsError(ManifoldNetsError, ValueError):
    """A setting of a comparison has a value that has no meaning."""

    def __init__(self, setting: str, found: object, expected: str) -> None:
        super().__init__(f"{setting}: found {found!r}; expected {expected}. Change it and start again.")


class OptimizerNameError(ManifoldNetsError, ValueError):
    """A name is that of no contestant."""

    def __init__(self, name: str, known: Iterable[str]) -> None:
        names = sorted(known)
        remedy = f"{near_matches(name, names)} Correct the name.".strip()
        super().__init__(
            f"optimizers: found {name!r}; expected one of {', '.join(names)}, or file.py:NAME of an optimizer class. "
            f"{remedy}"
        )


class DifferentCommandError(ManifoldNetsError, ValueError):
    """A folder or a study holds the runs of another command."""

    def __init__(self, place: object, differences: Sequence[str]) -> None:
        super().__init__(
            f"{place}: it holds a comparison with other settings: {'; '.join(differences)}. "
            "Start it with the same settings to continue it, with more optimizers, learning rates or seeds to extend "
            "it, or choose another folder."
        )
        self.differences = tuple(differences)


class ComparisonFolderError(ManifoldNetsError, OSError):
    """A folder is not one that a comparison can be kept in or read from."""

    def __init__(self, folder: object, found: str, expected: str, remedy: str) -> None:
        super().__init__(f"{folder}: found {found}; expected {expected}. {remedy}")


class FolderInUseError(ManifoldNetsError, RuntimeError):
    """Another process works on the same folder."""

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


class ContestantError(RunFailedError):
    """A contestant cannot be made for the model of the comparison, so that none of its runs could be carried out."""

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


class StorageError(ManifoldNetsError, RuntimeError):
    """The database of a comparison cannot be opened, or lacks the study."""

    def __init__(self, place: str, found: str, expected: str, remedy: str) -> None:
        super().__init__(f"{place}: found {found}; expected {expected}. {remedy}")
