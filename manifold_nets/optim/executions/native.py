"""Steps on the CPU by a small kernel in C, compiled at first use: for all weights of a parameter group in one call.

The source lies beside this file (``spheres.c``, ``rows.h``). It is compiled once per machine, in about a second, with
the compiler that the environment variable ``CC`` names, else ``cc``, ``gcc`` or ``clang``, for the processor at hand,
and kept in the user's cache folder (`manifold_nets.optim.executions.build`). Where there is no compiler, or it fails,
`available` says why, and the optimizers take their steps by torch's operations.
"""

from __future__ import annotations

import ctypes
import functools
import shlex
import shutil
import subprocess
from pathlib import Path

import numpy as np
import torch

from manifold_nets.optim.executions import build
from manifold_nets.optim.executions.build import UnavailableError

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
    command = build.compiler()
    folder, is_new = build.cache_folder()
    problems = []
    try:
        for options in build.CHOICES:
            path = folder / build.file_name(command, options)
            # What was found is built anew where it cannot be loaded either.
            for is_found in (True, False):
                if is_found and not build.is_sound(path):
                    continue
                try:
                    if not is_found:
                        build.compile_to(path, command, options)
                    return _opened(path)
                except (OSError, AttributeError, subprocess.SubprocessError) as error:
                    problems.append(build.words(error))
    finally:
        if is_new:  # what is loaded stays
            shutil.rmtree(folder, ignore_errors=True)
    raise UnavailableError(f"{shlex.join(command)} could not compile the kernel: {problems[-1]}")


def _opened(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    for function in (library.spheres_step, library.spheres_measure, library.spheres_write):
        function.argtypes = [pointer, pointer, number, number]
    library.spheres_know.argtypes = [number]
    return library
