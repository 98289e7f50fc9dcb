"""Steps on the CPU by a small kernel in C, compiled at first use: for all weights of a parameter group in one call.

The kernel takes whole steps by the rules that it knows, and lends its passes, one that measures and one that writes, to
all others, whose coefficients torch computes in between.

The source lies beside this file (``spheres.c``, ``rows.h``). It is compiled once per machine, in about a second, with
the compiler that the environment variable ``CC`` names, else ``cc``, ``gcc`` or ``clang``, for the processor at hand,
and kept in the user's cache folder (`manifold_nets.optim.backends.build`). Where there is no compiler, or it fails, and
on Windows, `available` says why, and the optimizers take their steps by torch's operations.
"""

from __future__ import annotations

import ctypes
import functools
import shlex
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from manifold_nets.groups import accumulation_dtype
from manifold_nets.optim.backends import build
from manifold_nets.optim.backends.build import UnavailableError
from manifold_nets.optim.backends.inputs import Batch, mark_written
from manifold_nets.optim.backends.products import rounding_of
from manifold_nets.optim.backends.rule import Rule, StepInput, bias_corrections
from manifold_nets.optim.backends.views import rows_of, what_to_write

__all__ = [
    "SHORT",
    "UnavailableError",
    "apart",
    "available",
    "run_in_passes",
    "run_native",
    "suits_by_entries",
    "suits_native",
]

_DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}

# Entries of the longest rows that are stepped by one thread, without cutting them: ``is_long`` of spheres.c.
SHORT = 2**16
# The rules that spheres.c knows.
_KINDS = {
    kind: number
    for number, kind in enumerate(
        ("sgd", "adam", "angular-adam", "adam-entries", "plain-sgd", "plain-adam", "put-back")
    )
}

# Entries that are worth a thread: a quarter of a millisecond's work.
_PER_THREAD = 2**18

# How spheres.c puts a row back on its sphere: with its moment, or without.
_CARRIED, _ALONE = 1, 2

# The structs `Job` and `Rule` of spheres.c.
JOB = np.dtype(
    [(name, np.int64) for name in ("w", "g", "b", "v", "v_max", "square", "rows", "size", "squares")]
    + [(name, np.float64) for name in ("take", "first", "second", "rounding")]
    + [(name, np.int64) for name in ("products", "written", "far", "norms")]
)
RULE = np.dtype(
    [(name, np.int64) for name in ("kind", "dtype", "nesterov", "maximize", "follows")]
    + [(name, np.float64) for name in ("lr", "beta1", "beta2", "eps", "decay", "shrink")]
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


def step(rule: np.ndarray, jobs: np.ndarray, threads: int) -> None:
    """Take one step of every job.

    Args:
        rule: one entry of dtype ``RULE``.
        jobs: entries of dtype ``JOB``; the memory that they point to is read and written.
        threads: number of threads to use.

    Raises:
        MemoryError: there is no memory for the kernel's working space; nothing was changed.
    """
    _call("spheres_step", rule, jobs, threads)


def _call(name: str, rule: np.ndarray, jobs: np.ndarray, threads: int) -> None:
    """Call a function of spheres.c: ``spheres_step``, or one of the passes by themselves.

    ``spheres_measure`` writes ⟨w, w⟩, ⟨w, g⟩, ⟨g, g⟩, ⟨w, b⟩, ⟨g, b⟩, ⟨b, b⟩ of every row to each job's ``"products"``.
    ``spheres_write`` writes ``ww w + wb b + wg g`` to w and ``bw w + bb b + bg g`` to b, with the numbers at each job's
    ``"written"``; rows with a mark at ``"far"`` are put on their spheres afterwards, ``_CARRIED`` ones with moments.
    """
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
        for options in build.PLATFORM.choices:
            path = folder / build.file_name(command, options)
            # What was found is built anew where it cannot be loaded either.
            for is_found in (True, False) if build.is_sound(path) else (False,):
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


# ---- which weights, and where they lie -------------------------------------------------------------------------------

# Without it every look at a weight asks its class first.
_as_tensors = torch._C.DisableTorchFunctionSubclass


def suits_native(member: StepInput) -> bool:
    """Whether the kernel in C can step a weight."""
    if member.fits is None:
        with _as_tensors():
            member.fits = _fits(member)
    return member.fits[0]


def suits_by_entries(member: StepInput) -> bool:
    """Whether the kernel in C can step a weight with a second moment for every entry."""
    weight = member.weight
    return (
        member.manifold.partition.group_size <= SHORT
        and member.second is not None
        and suits_native(member)
        and all(
            x is None or _lies(x, accumulation_dtype(weight.dtype), weight.stride())
            for x in (member.second, member.largest)
        )
    )


def _fits(member: StepInput) -> tuple[bool, bool]:
    """Whether the kernel in C can step a weight, and whether it can read the gradient where it lies.

    It takes weights on the CPU whose groups are runs of memory. Shapes, and that there is memory for all entries, have
    been checked by `manifold_nets.optim.backends.inputs`.
    """
    weight, manifold = member.weight, member.manifold
    if not manifold.moderate or not _is_plain(weight) or not know(weight.dtype):
        return False, False
    stride, dtype, wide = weight.stride(), weight.dtype, accumulation_dtype(weight.dtype)
    if not manifold.partition.has_rows(stride) or not (member.moment is None or _lies(member.moment, dtype, stride)):
        return False, False
    # Second moments of spheres; those of entries lie as the weight does.
    per_sphere = [x for x in (member.second, member.largest) if x is not None and x.numel() != weight.numel()]
    if not all((_is_plain(x) and x.dtype == wide and x.is_contiguous()) for x in per_sphere):
        return False, False
    if member.norms is not None and not (_is_plain(member.norms) and member.norms.is_contiguous()):
        return False, False
    return True, _lies(member.gradient, dtype, stride)


def _is_plain(tensor: Tensor) -> bool:
    """Whether the values of a tensor are what lies in its memory."""
    dispatch = type(tensor).__torch_dispatch__
    return dispatch is Tensor.__torch_dispatch__ and tensor.is_cpu and not tensor.is_neg() and tensor.data_ptr() != 0


def _lies(tensor: Tensor, dtype: torch.dtype, stride: tuple[int, ...]) -> bool:
    return tensor.dtype == dtype and tensor.stride() == stride and _is_plain(tensor)


# ---- steps -----------------------------------------------------------------------------------------------------------


def run_native(rule: Rule, members: Batch) -> list[StepInput]:
    """Step weights by one call of the kernel for each dtype among them; return those that share memory with others."""
    shared: list[StepInput] = []
    # The gradients that the kernel reads live until it has.
    for chosen, _gradients, jobs in _jobs(rule, members, lambda member: member.weight.dtype, shared):
        step(_packed(rule, chosen[0].weight.dtype), jobs, _threads(jobs))
    mark_written(members)
    return shared


def run_in_passes(rule: Rule, members: Batch) -> list[StepInput]:
    """Step weights in two passes of the kernel, one that measures and one that writes what torch has computed.

    The coefficients of all rows are computed together, in float64. Weights that share memory with others are returned.
    """
    shared: list[StepInput] = []
    for chosen, _gradients, jobs in _jobs(rule, members, _kind_of, shared):
        first, matrices = chosen[0], [rows_of(member) for member in chosen]
        # On the CPU whatever torch's default device is: the kernel writes there.
        measured = torch.empty(int(jobs["rows"].sum()), 6, dtype=torch.float64, device="cpu")
        places = np.cumsum(jobs["rows"]) - jobs["rows"]
        packed, threads = _packed(rule, first.weight.dtype), _threads(jobs)
        jobs["products"] = measured.data_ptr() + places * measured[0].nbytes
        _call("spheres_measure", packed, jobs, threads)
        # Without a moment, its products are left out, as in all other backends.
        products = measured.t()[: 3 if first.moment is None else 6]
        exact, factors, far, carried = what_to_write(rule, matrices, products, first.dampening, first.step)
        for job, old, new in zip(jobs, matrices, exact, strict=True):
            if new is not old:
                job["g"] = new.gradient.data_ptr()
        marks = far.to(torch.uint8) * (_CARRIED if carried else _ALONE)
        jobs["written"] = factors.data_ptr() + places * factors[0].nbytes
        jobs["far"] = marks.data_ptr() + places
        _call("spheres_write", packed, jobs, threads)
    mark_written(members)
    return shared


def _kind_of(m: StepInput) -> tuple[Any, ...]:
    return m.dampening, m.step, m.moment is None, m.second is None, m.weight.dtype


def _jobs(
    rule: Rule, members: Batch, key: Callable[[StepInput], Any], shared: list[StepInput]
) -> list[tuple[list[StepInput], list[Tensor], np.ndarray]]:
    """Return what the kernel is called with, for weights that are alike; others than those that share memory.

    With each comes the gradients that the kernel reads.
    """
    with _as_tensors():
        alike = members.alike(key)
        if not members.jobs:
            members.jobs = [np.array([_job(m) for m in chosen], dtype=JOB) for _, chosen in alike]
        found = []
        for (_, chosen), jobs in zip(alike, members.jobs, strict=True):
            gradients = [_readable_gradient(member) for member in chosen]
            jobs["g"] = [gradient.data_ptr() for gradient in gradients]
            jobs["take"], jobs["first"], jobs["second"] = _shares(rule, chosen)
            is_apart = apart(jobs, chosen[0])
            if not is_apart.all():
                # A gradient by itself, as it is only read; weights and moments are left to whoever can take them.
                left = [chosen[k] for k in (~is_apart).nonzero()[0]]
                shared += [replace(m, gradient=m.gradient.clone(), fits=None, rows=None) for m in left]
                places = is_apart.nonzero()[0]
                chosen, gradients, jobs = [chosen[k] for k in places], [gradients[k] for k in places], jobs[is_apart]
            if chosen:
                found.append((chosen, gradients, jobs))
    return found


def _readable_gradient(member: StepInput) -> Tensor:
    """Return a gradient that lies in memory as its weight does: itself where that is so."""
    if member.fits is not None and member.fits[1]:
        return member.gradient
    return torch.empty_like(member.weight, requires_grad=False).copy_(member.gradient.detach())


def _job(member: StepInput) -> tuple[float, ...]:
    """Return what of a job is the same in every step: where all but the gradient lies."""
    partition, squares = member.manifold.partition, member.manifold.squared_radii
    tensors = member.weight, None, member.moment, member.second, member.largest
    pointers = (0 if x is None else x.data_ptr() for x in tensors)
    norms = 0 if member.norms is None else member.norms.data_ptr()
    of_groups = (squares.ctypes.data, partition.n_groups, partition.group_size, len(squares))
    return (*pointers, *of_groups, 1.0, 1.0, 1.0, rounding_of(member.gradient.dtype), 0, 0, 0, norms)


def _shares(rule: Rule, members: Sequence[StepInput]) -> tuple[Any, Any, Any]:
    """Return the share of the new gradient in each moment, and the bias corrections of Adam."""
    if members[0].second is None:
        return [1.0 - member.dampening for member in members], 1.0, 1.0
    known = {step: bias_corrections(rule.beta1, rule.beta2, step) for step in {member.step for member in members}}
    first, second = zip(*(known[member.step] for member in members), strict=True)
    return 1 - rule.beta1, first, second


# Jobs that have been found apart: mostly a step has those of the last one.
_known_apart: set[tuple[Any, ...]] = set()


def apart(jobs: np.ndarray, first: StepInput, read: int | None = None) -> np.ndarray:
    """Return for each job whether nothing that it reads or writes overlaps with anything else in the jobs.

    Args:
        jobs: with addresses, numbers of rows and their sizes.
        first: one of the weights, all being of one dtype.
        read: bytes of an entry of the gradients, where they are not of that dtype.
    """
    found = np.ones(len(jobs), dtype=bool)
    by_entries = first.second is not None and first.second.numel() == first.weight.numel()
    starts = np.concatenate([jobs[name] for name in ("w", "g", "b", "v", "v_max", "rows", "size")])
    plan = first.weight.dtype, read, by_entries, starts.tobytes()
    if plan in _known_apart:
        return found
    starts, entries = starts[: 5 * len(jobs)], jobs["rows"] * jobs["size"]
    width, wide = first.weight.itemsize, max(4, first.weight.itemsize)
    of_w = [entries * width, entries * (read or width), entries * width]
    lengths = np.concatenate(of_w + [(entries if by_entries else jobs["rows"]) * wide] * 2)
    order = np.argsort(starts, kind="stable")
    order = order[np.searchsorted(starts[order], 1) :]  # null where there is no moment
    starts, ends = starts[order], np.maximum.accumulate(starts[order] + lengths[order])
    meets = starts[1:] < ends[:-1]
    if meets.any():
        runs = np.concatenate([[0], np.cumsum(~meets)])
        found[order[np.bincount(runs)[runs] > 1] % len(jobs)] = False
        return found
    if len(_known_apart) > 256:
        _known_apart.clear()
    _known_apart.add(plan)
    return found


def _packed(rule: Rule, dtype: torch.dtype) -> np.ndarray:
    # Passes by themselves do not ask for the rule.
    options = (_KINDS.get(rule.kind, 0), _DTYPES[dtype], rule.nesterov, rule.maximize, rule.follows)
    return np.array((*options, float(rule.lr), rule.beta1, rule.beta2, rule.eps, rule.decay, rule.shrink), dtype=RULE)


def _threads(jobs: np.ndarray) -> int:
    return max(1, min(torch.get_num_threads(), int((jobs["rows"] * jobs["size"]).sum()) // _PER_THREAD))
