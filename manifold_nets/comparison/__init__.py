"""A fair, resumable comparison of optimizers."""

from __future__ import annotations

import warnings

from manifold_nets.comparison.api import compare, join_comparison
from manifold_nets.comparison.optimizers import OPTIMIZERS, Objective, OptimizerSpec, Stepper, TorchStepper
from manifold_nets.comparison.results import Choice, Comparison, EpochRecord, LayerRecord, RunResult
from manifold_nets.comparison.scheduler import Progress
from manifold_nets.comparison.settings import RunKey, Settings
from manifold_nets.comparison.tasks import Task, task_from_data

__all__ = [
    "OPTIMIZERS",
    "Choice",
    "Comparison",
    "EpochRecord",
    "LayerRecord",
    "Objective",
    "OptimizerSpec",
    "Progress",
    "RunKey",
    "RunResult",
    "Settings",
    "Stepper",
    "Task",
    "TorchStepper",
    "compare",
    "join_comparison",
    "task_from_data",
]

_RENAMED = {"Contestant": "OptimizerSpec", "CONTESTANTS": "OPTIMIZERS"}


def __getattr__(name: str) -> object:
    if name not in _RENAMED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    new = _RENAMED[name]
    warnings.warn(f"{__name__}.{name} is now called {new}", DeprecationWarning, stacklevel=2)
    return globals()[new]
