"""Errors about files that are to be written."""

from __future__ import annotations

import os

from manifold_nets.errors.base import ManifoldNetsError

__all__ = ["DiskFullError", "OutputFileError"]


class OutputFileError(ManifoldNetsError, OSError):
    """A path cannot be written to, for what is there is neither a file nor a stream."""

    def __init__(self, path: str | os.PathLike[str], found: str) -> None:
        super().__init__(
            f"{os.fspath(path)}: found {found}; expected a file, a path where there is none yet, a named pipe or a "
            "character device; nothing was written. Choose another path."
        )


class DiskFullError(ManifoldNetsError, OSError):
    """There is no room for a file; the one that it would have replaced is unchanged."""

    def __init__(self, path: str | os.PathLike[str], found: str) -> None:
        super().__init__(
            f"{os.fspath(path)}: it could not be written ({found}); a file that it would have replaced is unchanged. "
            "Make room, or choose another path."
        )
