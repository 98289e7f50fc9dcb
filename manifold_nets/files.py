"""Writing files so that a reader finds the old file or the whole new one."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["atomic_file"]


@contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a temporary file in the folder of ``path``, which takes its place when the block ends without an error.

    The file is flushed to the disk before it is renamed, so that a reader finds the old file or the whole new one.
    When the block raises, ``path`` is as it was and the temporary file is gone. A symbolic link is followed, and a
    file that is replaced hands on its permissions.

    Raises:
        FileNotFoundError: the folder does not exist.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with atomic_file(Path(folder) / "notes.txt") as temporary:
        ...         _ = temporary.write_text("all or nothing")
        ...     [file.name for file in Path(folder).iterdir()]
        ['notes.txt']
    """
    final = Path(path).resolve()
    if not final.parent.is_dir():
        raise FileNotFoundError(f"{final}: its folder does not exist. Make it first, or choose another path.")
    temporary = final.with_name(f".{final.name}.{secrets.token_hex(4)}.tmp")
    try:
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        # The writer may put a file of its own in place of this one, with other permissions.
        mode = (final if final.exists() else temporary).stat().st_mode
        yield temporary
        temporary.chmod(mode & 0o7777)
        _flush(temporary)
        temporary.replace(final)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _flush(final.parent)


def _flush(path: Path) -> None:
    """Have the system write a file, or the names in a folder, to the disk."""
    if path.is_dir() and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
