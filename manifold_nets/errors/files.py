"""Errors about files that are to be written."""

from __future__ import annotations

import os

from manifold_nets.errors.base import ManifoldNetsError

__all__ = ["OutputFileError"]


class OutputFileError(ManifoldNetsError, OSError):
    """A path cannot be written to, for what is there is neither a file nor a stream."""

    def __init__(self, path: str | os.PathLike[str], found: str) -> None:
        super().__init__(
            f"{os.fspath(path)}: found {found}; expected a file, a path where there is none yet, a named pipe or a "
            "character device; nothing was written. Choose another path."
        )
