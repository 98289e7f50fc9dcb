"""Errors about checkpoint files."""

from __future__ import annotations

import os
from collections.abc import Sequence

from manifold_nets.errors.base import ManifoldNetsError

__all__ = ["CheckpointError", "CheckpointFormatError", "CheckpointMismatchError", "CheckpointTensorError"]


class CheckpointError(ManifoldNetsError):
    """Base of the errors about checkpoint files; ``path`` is the file."""

    def __init__(self, path: str | os.PathLike[str], message: str) -> None:
        super().__init__(f"{os.fspath(path)}: {message}")
        self.path = os.fspath(path)


class CheckpointFormatError(CheckpointError, ValueError):
    """A file is not a checkpoint that this release can read."""

    def __init__(self, path: str | os.PathLike[str], found: str, remedy: str) -> None:
        super().__init__(path, f"found {found}; expected a checkpoint written by manifold_nets.save. {remedy}")


class CheckpointMismatchError(CheckpointError, ValueError):
    """A checkpoint does not fit the model it was to be loaded into; the model was not touched."""

    def __init__(self, path: str | os.PathLike[str], model: str, differences: Sequence[str]) -> None:
        super().__init__(
            path,
            f"does not fit this {model}, which was left as it was: {'; '.join(differences)}. Make the model with the "
            "arguments it was saved with, in the same dtype, and save and load the bare module rather than one "
            "wrapped by torch.compile or a parallel trainer.",
        )
        self.differences = tuple(differences)


class CheckpointTensorError(CheckpointError, TypeError):
    """A model holds something that a checkpoint cannot store; no file was written."""

    def __init__(self, path: str | os.PathLike[str], name: str, found: str, remedy: str) -> None:
        super().__init__(path, f"{name} is {found}; expected a dense tensor with values. {remedy}")
