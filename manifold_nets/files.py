"""Write files atomically: a reader finds either the old file or the complete new one."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from manifold_nets.errors import OutputFileError

__all__ = ["atomic_file", "is_link_loop", "is_stream", "path_of_open", "resolved"]

_STREAMS = (stat.S_ISFIFO, stat.S_ISCHR)
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_KINDS = {stat.S_IFDIR: "a folder", stat.S_IFBLK: "a block device", stat.S_IFSOCK: "a socket"}


@contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a temporary file in the folder of ``path`` that replaces it if the block ends without an error.

    The file is flushed to disk before it is renamed, so a reader finds either the old file or the complete new one. If
    the block raises, ``path`` is unchanged and the temporary file is deleted. Symbolic links are followed, and a
    replaced file passes on its permissions. A named pipe, a character device and an open descriptor such as
    ``/dev/stdout`` are not replaced: they receive the whole content at the end of the block.

    Raises:
        FileNotFoundError: the folder does not exist.
        OutputFileError: the path is a folder, a block device, a socket, or a loop of symbolic links.
        OutputFileError: the disk is full.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with atomic_file(Path(folder) / "notes.txt") as temporary:
        ...         _ = temporary.write_text("all or nothing")
        ...     [file.name for file in Path(folder).iterdir()]
        ['notes.txt']
    """
    write = _sent if is_stream(path) else _replaced
    try:
        with write(Path(path)) as temporary:
            yield temporary
    except Exception as error:
        full = _no_room(error)
        if full is None:
            raise
        raise OutputFileError(
            f"{os.fspath(path)}: it could not be written ({full}); an existing file there is unchanged. "
            "Free disk space, or choose another path."
        ) from error


@contextmanager
def _replaced(path: Path) -> Iterator[Path]:
    """Give a temporary file that replaces a path if the block ends without an error."""
    final = resolved(path)
    if not final.parent.is_dir():
        raise FileNotFoundError(f"{final}: its folder does not exist. Create the folder, or choose another path.")
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


def is_stream(path: str | os.PathLike[str]) -> bool:
    """Whether a path can only be written into, not replaced by a file.

    Raises:
        OutputFileError: the path is a folder, a block device, a socket or a loop of links, so neither is possible.

    Example:
        >>> is_stream("a file that does not exist")
        False
    """
    final = resolved(path)
    if _descriptor(Path(path)) is not None:
        return True
    try:
        mode = final.stat().st_mode
    except OSError:
        return False
    if any(is_kind(mode) for is_kind in _STREAMS):
        return True
    if not stat.S_ISREG(mode):
        raise _no_file(path, _KINDS.get(stat.S_IFMT(mode), "something that is not a file"))
    return False


@contextmanager
def _sent(path: Path) -> Iterator[Path]:
    """Give a temporary file whose content is written to a stream if the block ends without an error."""
    with tempfile.TemporaryDirectory(prefix="manifold-nets-") as folder:
        temporary = Path(folder) / "content.tmp"
        temporary.touch()
        yield temporary
        number = _descriptor(path)
        # A duplicate continues at the descriptor's position; an opened file would be written from its start.
        target = path.open("wb") if number is None else os.fdopen(os.dup(number), "wb")
        with temporary.open("rb") as source, target:
            shutil.copyfileobj(source, target)


def resolved(path: str | os.PathLike[str]) -> Path:
    """Return the absolute path behind all symbolic links.

    Raises:
        OutputFileError: the links form a loop.
    """
    if is_link_loop(path):
        raise _no_file(path, "a loop of symbolic links")
    return Path(path).resolve()


def _no_file(path: str | os.PathLike[str], found: str) -> OutputFileError:
    return OutputFileError(
        f"{os.fspath(path)}: found {found}; expected a new or existing file, a named pipe or a character device; "
        "nothing was written. Choose another path."
    )


def is_link_loop(path: str | os.PathLike[str]) -> bool:
    """Whether the symbolic links of a path form a loop.

    Example:
        >>> is_link_loop("a file that does not exist")
        False
    """
    try:
        Path(path).stat()
    except OSError as error:
        return error.errno == errno.ELOOP
    return False


def path_of_open(file: BinaryIO) -> Path:
    """A path of an open file that stays valid if another file is renamed to its name.

    Example:
        >>> with open(__file__, "rb") as file:
        ...     path_of_open(file).read_bytes() == file.read()
        True
    """
    path = Path(f"/dev/fd/{file.fileno()}")
    # Where descriptors have no paths, a file that is open cannot be replaced either.
    return path if path.exists() else Path(file.name)


def _no_room(error: BaseException | None) -> str | None:
    """The system's message if an error, or its cause, is a full disk or quota."""
    while error is not None:
        for code in _FULL:
            # Writers in other languages pass on only the text.
            if getattr(error, "errno", None) == code or os.strerror(code) in str(error):
                return os.strerror(code)
        error = error.__cause__ or error.__context__
    return None


def _descriptor(path: Path) -> int | None:
    """The open descriptor of this process that a path names, as ``/dev/stdout`` and ``/dev/fd/3`` do."""
    seen: set[Path] = set()
    while path not in seen:
        seen.add(path)
        folder = path.absolute().parent.resolve()
        if str(folder) in (f"/proc/{os.getpid()}/fd", "/dev/fd") and path.name.isdecimal():
            return int(path.name)
        if not path.is_symlink():
            return None
        path = path.parent / path.readlink()
    return None


def _flush(path: Path) -> None:
    """Have the system write a file, or the names in a folder, to the disk."""
    if path.is_dir() and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
