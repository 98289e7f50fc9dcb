"""A fair, resumable comparison of optimizers."""

from __future__ import annotations

from manifold_nets.comparison.contestants import CONTESTANTS, TorchStepper
from manifold_nets.comparison.engine import Progress
from manifold_nets.comparison.entry import compare
from manifold_nets.comparison.joining import join_comparison
from manifold_nets.comparison.protocols import Contestant, Objective, Stepper
from manifold_nets.comparison.records import Choice, EpochRecord, LayerRecord, RunKey, RunResult, Settings
from manifold_nets.comparison.result import Comparison
from manifold_nets.comparison.tasks import Task, task_from_data

__all__ = [
    "CONTESTANTS",
    "Choice",
    "Comparison",
    "Contestant",
    "EpochRecord",
    "LayerRecord",
    "Objective",
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
