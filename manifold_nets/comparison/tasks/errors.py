"""Errors about the data of a task and about names of tasks and models."""

from __future__ import annotations

from collections.abc import Iterable

from manifold_nets.errors import ManifoldNetsError, listed

__all__ = ["DataFileError", "DataFolderError", "TaskNameError", "TaskSourceError"]


class DataFolderError(ManifoldNetsError, FileNotFoundError):
    """The folder of a data set does not exist or lacks a file."""

    def __init__(self, folder: object, found: str, expected: Iterable[str], remedy: str) -> None:
        super().__init__(f"{folder}: found {found}; expected {listed(expected)}. {remedy}")


class DataFileError(ManifoldNetsError, ValueError):
    """A file of data is damaged or is of another format."""

    def __init__(self, path: object, found: str, expected: str, remedy: str = "Fetch the file again.") -> None:
        super().__init__(f"{path}: found {found}; expected {expected}. {remedy}")


class TaskNameError(ManifoldNetsError, ValueError):
    """A text names no task or no model of a comparison, or its settings have no meaning."""

    def __init__(self, what: str, found: str, expected: str, remedy: str) -> None:
        super().__init__(f"{what}: found {found!r}; expected {expected}. {remedy}")


class TaskSourceError(ManifoldNetsError, RuntimeError):
    """A callable that a specification names made no task, or no model."""

    def __init__(self, spec: str, found: str, expected: str) -> None:
        super().__init__(f"{spec}: found {found}; expected {expected}. Check that it runs in Python as written.")
