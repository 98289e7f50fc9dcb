"""Steps on the CPU by a small kernel in C, compiled at first use: for all weights of a parameter group in one call.

The source lies beside this file (``spheres.c``, ``rows.h``). It is compiled once a machine, in about a second, with the
compiler that the environment variable ``CC`` names, else ``cc``, ``gcc`` or ``clang``, for the processor at hand, and
kept in the user's cache folder under a name that says which source, compiler, options and processor it is for. Where
there is no compiler, or it fails, `available` says why, and the optimizers take their steps by torch's operations.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

__all__ = [
    "ALONE",
    "CARRIED",
    "JOB",
    "KINDS",
    "RULE",
    "SHORT",
    "UnavailableError",
    "available",
    "code_of",
    "know",
    "measure",
    "step",
    "write",
]

_SOURCES = ("spheres.c", "rows.h")
_OPTIONS = ("-O3", "-fPIC", "-shared", "-std=gnu11", "-fno-math-errno", "-fno-trapping-math")
# Tried in turn: a compiler may lack OpenMP, or know no options for the processor at hand.
_CHOICES = (("-march=native", "-fopenmp"), ("-fopenmp",), ("-march=native", "-fopenmp-simd"), ())
_DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}

# Entries of the longest rows that are stepped by one thread, without cutting them: ``is_long`` of spheres.c.
SHORT = 2**16
# The rules that spheres.c knows.
KINDS = {"sgd": 0, "adam": 1, "angular-adam": 2}

# How spheres.c is told to put a row back on its sphere: with its moment, or without.
CARRIED, ALONE = 1, 2

# The structs `Job` and `Rule` of spheres.c.
JOB = np.dtype(
    [(name, np.int64) for name in ("w", "g", "b", "v", "v_max", "square", "rows", "size", "squares")]
    + [(name, np.float64) for name in ("take", "first", "second", "rounding")]
    + [(name, np.int64) for name in ("products", "written", "far")]
)
RULE = np.dtype(
    [(name, np.int64) for name in ("kind", "dtype", "nesterov", "maximize")]
    + [(name, np.float64) for name in ("lr", "keep", "beta2", "eps")]
)


class UnavailableError(Exception):
    """Why there is no kernel here."""


@functools.cache
def _library() -> ctypes.CDLL | UnavailableError:
    try:
        return _load()
    except (OSError, subprocess.SubprocessError, UnavailableError) as error:
        return UnavailableError(f"{error}")


def available() -> str | None:
    """Compile the kernel if that has not been done; return None, or why there is none."""
    library = _library()
    return str(library) if isinstance(library, UnavailableError) else None


@functools.cache
def know(dtype: torch.dtype) -> bool:
    """Whether the kernel steps weights of a dtype; some compilers have no float16."""
    library = _library()
    return not isinstance(library, UnavailableError) and dtype in _DTYPES and bool(library.spheres_know(_DTYPES[dtype]))


def code_of(dtype: torch.dtype) -> int:
    """Return the number by which the kernel knows a dtype."""
    return _DTYPES[dtype]


def step(rule: np.ndarray, jobs: np.ndarray, threads: int) -> None:
    """Take one step of every job.

    Args:
        rule: one entry of dtype `RULE`.
        jobs: entries of dtype `JOB`; the memory that they point to is read and written.
        threads: number of threads to use.

    Raises:
        MemoryError: there is no memory for the kernel's working space; nothing was changed.
    """
    _call("spheres_step", rule, jobs, threads)


def measure(rule: np.ndarray, jobs: np.ndarray, threads: int) -> None:
    """Measure ⟨w, w⟩, ⟨w, g⟩, ⟨g, g⟩, ⟨w, b⟩, ⟨g, b⟩, ⟨b, b⟩ of every row, into memory at each job's ``"products"``.

    Arguments and errors as for `step`.
    """
    _call("spheres_measure", rule, jobs, threads)


def write(rule: np.ndarray, jobs: np.ndarray, threads: int) -> None:
    """Write ``ww w + wb b + wg g`` to w and ``bw w + bb b + bg g`` to b, with the numbers at each job's ``"written"``.

    Rows with a mark at ``"far"`` are put on their spheres afterwards, `CARRIED` ones with their moments. Arguments and
    errors as for `step`.
    """
    _call("spheres_write", rule, jobs, threads)


def _call(name: str, rule: np.ndarray, jobs: np.ndarray, threads: int) -> None:
    library = _library()
    if isinstance(library, UnavailableError):
        raise library
    if getattr(library, name)(rule.ctypes.data, jobs.ctypes.data, len(jobs), threads):
        raise MemoryError("the working space of an optimizer step")


def _load() -> ctypes.CDLL:
    compiler = _compiler()
    folder = _cache_folder()
    problems = []
    for options in _CHOICES:
        path = folder / f"spheres-{_fingerprint(compiler, options)}.so"
        if not path.exists():
            try:
                _compile([*compiler, *_OPTIONS, *options], path)
            except (OSError, subprocess.SubprocessError) as error:
                problems.append(_words(error))
                continue
        library = ctypes.CDLL(str(path))
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        for function in (library.spheres_step, library.spheres_measure, library.spheres_write):
            function.argtypes = [pointer, pointer, number, number]
        library.spheres_know.argtypes = [number]
        return library
    raise UnavailableError(f"{shlex.join(compiler)} could not compile the kernel: {problems[-1]}")


def _compiler() -> list[str]:
    named = shlex.split(os.environ.get("CC", ""))
    for command in [named] if named else [["cc"], ["gcc"], ["clang"]]:
        if shutil.which(command[0]):
            return command
    found = f"CC={shlex.join(named)} names no program" if named else "found none of cc, gcc, clang; set CC"
    raise UnavailableError(f"no C compiler: {found}")


def _cache_folder() -> Path:
    """Return a folder of the user's own for compiled kernels."""
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        folder = (Path(base) if base else Path.home() / ".cache") / "manifold_nets"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    except (OSError, RuntimeError):
        pass
    return Path(tempfile.mkdtemp(prefix="manifold_nets-"))


def _fingerprint(compiler: Sequence[str], options: Sequence[str]) -> str:
    """Return a hash of everything that the compiled file depends on."""
    parts: list[bytes] = [(Path(__file__).parent / name).read_bytes() for name in _SOURCES]
    words = [*compiler, shutil.which(compiler[0]) or "", *_OPTIONS, *options, platform.machine(), sys.platform]
    parts += [word.encode() for word in (*words, _processor())]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:24]


def _processor() -> str:
    """Return what tells processors apart that share a home folder."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU "))}))


def _compile(command: Sequence[str], path: Path) -> None:
    """Compile to a file of another name and move it into place, so that nobody loads half of it."""
    handle, name = tempfile.mkstemp(suffix=".so", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    source = Path(__file__).parent / _SOURCES[0]
    try:
        subprocess.run(
            [*command, str(source), "-o", name, "-lm"], check=True, capture_output=True, text=True, timeout=300
        )
        temporary.chmod(0o700)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _words(error: Exception) -> str:
    output = getattr(error, "stderr", None)
    lines = [line for line in str(output or error).splitlines() if "error" in line] or [str(error)]
    return lines[0]
