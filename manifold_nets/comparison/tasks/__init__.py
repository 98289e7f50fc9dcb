"""What optimizers are compared on: data in three parts, a loss and an error."""

from __future__ import annotations

from manifold_nets.comparison.tasks.loading import DATA_VARIABLE, TASK_NAMES, load_task
from manifold_nets.comparison.tasks.own import task_from_data
from manifold_nets.comparison.tasks.task import DatasetPart, Part, Selection, Task, TensorPart, evaluate

__all__ = [
    "DATA_VARIABLE",
    "TASK_NAMES",
    "DatasetPart",
    "Part",
    "Selection",
    "Task",
    "TensorPart",
    "evaluate",
    "load_task",
    "task_from_data",
]
