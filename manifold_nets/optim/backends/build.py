"""Compile the kernel in C and keep the library in the user's cache folder, where only the user can change it.

Beside each library lies a file with its size and checksum. A library that does not fit it (a write that was cut short,
a damaged disk, somebody else's file) is never loaded but compiled again.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = [
    *("PLATFORM", "Platform", "UnavailableError", "cache_folder", "compile_to", "compiler", "file_name", "is_sound"),
    "words",
]

_SOURCES = ("spheres.c", "rows.h")
_OPTIONS = ("-O3", "-fPIC", "-std=gnu11", "-fno-math-errno", "-fno-trapping-math")
_TIMEOUT = 300
# Files under construction that are older were left by a process that was killed.
_ABANDONED = 12 * _TIMEOUT
_TEMPORARY = "tmp"


@dataclass(frozen=True)
class Platform:
    """How the kernel is compiled on a system.

    Args:
        shared: the option for a shared library.
        suffix: the ending of its name.
        choices: further options, tried in turn: a compiler may lack OpenMP, or know no options for the processor at
            hand. None on a system without a build.
        remedy: how to get the kernel where it is missing.
    """

    shared: str
    suffix: str
    choices: tuple[tuple[str, ...], ...]
    remedy: str

    @classmethod
    def of(cls, system: str, machine: str) -> Platform:
        """Return that of a system and a machine, as `sys.platform` and `platform.machine` name them."""
        if system == "win32":
            return cls("", "", (), "Run in WSL to have it")
        # On ARM and POWER -march=native is unknown to many compilers, or chooses no tuning.
        is_other = machine.lower().startswith(("aarch64", "arm", "ppc"))
        native, simd = "-mcpu=native" if is_other else "-march=native", "-fopenmp-simd"
        alone = ((native, simd), (simd,), ())
        if system == "darwin":
            # No OpenMP, also where a compiler has it: torch brings a libomp, and a second one ends the process.
            remedy = "Install the command line tools (xcode-select --install), or set CC to a C compiler"
            return cls("-dynamiclib", ".dylib", alone, remedy)
        threads = ((native, "-fopenmp"), ("-fopenmp",))
        return cls("-shared", ".so", (*threads, *alone), "Install gcc or clang, or set CC to a C compiler")


PLATFORM = Platform.of(sys.platform, platform.machine())


class UnavailableError(Exception):
    """Why there is no kernel here."""


def compiler() -> list[str]:
    """Return the command of a C compiler.

    Raises:
        UnavailableError: there is none, or the kernel has no build for this system.
    """
    if not PLATFORM.choices:
        raise UnavailableError("no build for this system")
    value = os.environ.get("CC", "")
    try:
        named = shlex.split(value)
    except ValueError as error:
        raise UnavailableError(f"no C compiler: CC={value} cannot be read ({error})") from None
    for command in [named] if named else [["cc"], ["gcc"], ["clang"]]:
        if shutil.which(command[0]):
            return command
    found = f"CC={shlex.join(named)} names no program" if named else "found none of cc, gcc, clang; set CC"
    raise UnavailableError(f"no C compiler: {found}")


def cache_folder() -> tuple[Path, bool]:
    """Return a folder for compiled kernels that nobody else can write to, and whether it is a new one to be removed."""
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        folder = (Path(base) if base else Path.home() / ".cache") / "manifold_nets"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder = folder.resolve()
        if _is_private(folder, stat.S_ISDIR) and _keeps_names(folder.parent):
            if os.access(folder, os.W_OK):
                return folder, False
        else:
            warnings.warn(
                f"{folder} can be changed by other users, and no compiled code is loaded from it: the kernel for steps "
                f"on spheres is compiled again in every process. Make it yours alone (chmod 700 {folder}), or let "
                "XDG_CACHE_HOME name another folder.",
                stacklevel=2,
            )
    except (OSError, RuntimeError):
        pass
    return Path(tempfile.mkdtemp(prefix="manifold_nets-")), True


def is_sound(path: Path) -> bool:
    """Whether a library is the one that was written there, by this user or by root."""
    beside = _beside(path)
    try:
        if not (_is_private(path, stat.S_ISREG) and _is_private(beside, stat.S_ISREG)):
            return False
        with beside.open("rb") as file:
            expected = file.read(200).decode(errors="replace")
        return path.stat().st_size == int(expected.split()[0]) and expected == _seal(path)
    except (OSError, ValueError, IndexError):
        return False


def compile_to(path: Path, command: Sequence[str], options: Sequence[str]) -> None:
    """Compile to a file of another name, and move it into place when all of it is on the disk.

    Raises:
        OSError: a file cannot be written, or the compiler cannot be run.
        subprocess.SubprocessError: the compiler fails.
    """
    _sweep(path.parent)
    handle, name = tempfile.mkstemp(prefix=_TEMPORARY, suffix=PLATFORM.suffix, dir=path.parent)
    os.close(handle)
    library, seal = Path(name), Path(f"{name}.sha256")
    source = str(Path(__file__).parent / _SOURCES[0])
    try:
        subprocess.run(
            [*command, *_OPTIONS, PLATFORM.shared, *options, source, "-o", name, "-lm"],
            check=True,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_TIMEOUT,
        )
        library.chmod(0o700)
        seal.touch(mode=0o600)
        seal.write_text(_seal(library))
        for file in (library, seal):
            _to_disk(file)
        # Several processes may do so at once: a seal of another build is not sound, and the next one builds again.
        library.replace(path)
        seal.replace(_beside(path))
        _to_disk(path.parent)
    finally:
        library.unlink(missing_ok=True)
        seal.unlink(missing_ok=True)


def file_name(command: Sequence[str], options: Sequence[str]) -> str:
    """Return a name with a hash of everything that the compiled library depends on."""
    parts: list[bytes] = [(Path(__file__).parent / name).read_bytes() for name in _SOURCES]
    texts = [*command, shutil.which(command[0]) or "", *_OPTIONS, *options, platform.machine(), sys.platform]
    parts += [text.encode(errors="replace") for text in (*texts, _processor())]
    digest = hashlib.sha256(b"\0".join(parts)).hexdigest()
    return f"spheres-{digest[:24]}{PLATFORM.suffix}"


def words(error: Exception) -> str:
    """Return the first line of what a compiler said of an error."""
    output = getattr(error, "stderr", None)
    lines = [line for line in str(output or error).splitlines() if "error" in line] or [str(error)]
    return lines[0]


def _beside(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def _seal(path: Path) -> str:
    return f"{path.stat().st_size} {hashlib.sha256(path.read_bytes()).hexdigest()}\n"


def _is_private(path: Path, is_kind: Callable[[int], bool]) -> bool:
    """Whether something is of a kind, no link, belongs to this user or root, and nobody else can write to it."""
    found = path.lstat()
    if not hasattr(os, "geteuid"):  # no owners and modes on this system
        return is_kind(found.st_mode)
    own = found.st_uid in (0, os.geteuid())
    return is_kind(found.st_mode) and own and not found.st_mode & 0o022


def _keeps_names(folder: Path) -> bool:
    """Whether other users cannot rename what lies in a folder."""
    mode = folder.stat().st_mode
    return not mode & stat.S_IWOTH or bool(mode & stat.S_ISVTX) or not hasattr(os, "geteuid")


def _to_disk(path: Path) -> None:
    with contextlib.suppress(OSError):  # some file systems cannot, for folders
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _sweep(folder: Path) -> None:
    """Remove files that a killed process has left under construction."""
    for path in folder.glob(f"{_TEMPORARY}*"):
        with contextlib.suppress(OSError):
            if time.time() - path.lstat().st_mtime > _ABANDONED:
                path.unlink()


def _processor() -> str:
    """Return what tells processors apart that share a home folder."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU "))}))
