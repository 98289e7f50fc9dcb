"""The machine and the versions that figures were measured with, in words."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch


def processor() -> str:
    """Return the processor's name where the system tells it, else its architecture."""
    told = Path("/proc/cpuinfo")
    if told.exists():
        for line in told.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


def machine() -> str:
    """Return one sentence: processor, cores, accelerator, and the versions of Python and torch."""
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    versions = f"Python {platform.python_version()}, torch {torch.__version__.partition('+')[0]}"
    return f"Machine: {os.cpu_count()} cores of {processor()}{gpu}; {versions}."
