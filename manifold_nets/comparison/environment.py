"""Where a comparison runs, in words."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from functools import cache
from pathlib import Path

import torch

from manifold_nets.comparison.records import Environment

__all__ = ["environment", "machine_in_words"]

_PACKAGES = ("manifold_nets", "torch", "geoopt", "numpy", "optuna", "pymanopt", "scikit-learn", "timm")


def environment() -> Environment:
    """The versions of the packages that results may depend on, and the machine.

    Example:
        >>> dict(environment().versions)["torch"] == torch.__version__
        True
    """
    versions = [("python", platform.python_version())]
    for name in _PACKAGES:
        try:
            versions.append((name, importlib.metadata.version(name)))
        except importlib.metadata.PackageNotFoundError:
            continue
    return Environment(tuple(versions), machine_in_words())


@cache
def machine_in_words() -> str:
    """Processor, number of cores, system, and the GPU if there is one.

    Example:
        >>> "cores" in machine_in_words()
        True
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    words = [f"{_processor()}, {cores} cores", platform.system()]
    if torch.cuda.is_available():
        words.append(torch.cuda.get_device_name())
    return ", ".join(words)


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
