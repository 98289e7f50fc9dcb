"""Small comparisons for the tests of the engine, and what a repetition must agree in."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import manifold_nets as mn
from manifold_nets.comparison import Comparison, Settings, Task, task_from_data
from manifold_nets.comparison.experiment import Experiment, InitialModels
from manifold_nets.comparison.optimizers import optimizer_spec
from manifold_nets.comparison.results import MEASURED_FIELDS
from manifold_nets.comparison.tasks import TensorPart

COUNT = 60


class CountingPart(TensorPart):
    """Counts how often examples are read."""

    reads = 0

    def batch(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        type(self).reads += len(rows)
        return super().batch(rows)


def tiny_task() -> Task:
    """Points on two sides of a plane: 60 to train on, 30 to validate and 30 to test."""
    x = torch.randn(2 * COUNT, 4, generator=torch.Generator().manual_seed(5))
    y = (x.sum(1) > 0).long()
    parts = (slice(COUNT), slice(COUNT, COUNT + 30), slice(COUNT + 30, None))
    CountingPart.reads = 0
    train, validation = (TensorPart(x[rows], y[rows]) for rows in parts[:2])
    return task_from_data(train, validation, CountingPart(x[parts[2]], y[parts[2]]), name="points", batch_size=20)


def tiny_network() -> nn.Module:
    """One normalized hidden layer, and dropout, which draws at random in training."""
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.1), nn.Linear(6, 2))


def reproducible(comparison: Comparison) -> Any:
    """What the same command must give again: everything but times, memory and the machine."""
    return _without(comparison.to_dict()["results"]), _without(comparison.to_dict()["choices"])


def _without(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without(item) for name, item in value.items() if name not in MEASURED_FIELDS}
    return [_without(item) for item in value] if isinstance(value, list) else value


def small_settings(**changes: Any) -> Settings:
    """Digits, two optimizers, two rates, one of which makes plain SGD diverge, two seeds."""
    options: dict[str, Any] = {
        "optimizers": ("sgd", "rsgd"),
        "learning_rates": (0.1, 1e8),
        "seeds": (0, 1),
        "epochs": 2,
        "model": "mlp:10",
        "batch_size": 50,  # the task's own, which the command line takes
    }
    return Settings(**{**options, **changes})


def tiny(**changes: Any) -> Comparison:
    """Compare two optimizers on the tiny task in this process."""
    options = {"optimizers": ["sgd", "rsgd"], "learning_rates": [0.05, 0.5], "seeds": 2, "epochs": 2, "report": False}
    return mn.compare(tiny_network, **{"task": tiny_task(), **options, **changes})


def tiny_starts(**changes: Any) -> tuple[InitialModels, Settings]:
    """The starts of two optimizers on the tiny task, and the settings."""
    task = tiny_task()
    settings = Settings(
        **{"optimizers": ("sgd", "rsgd"), "learning_rates": (0.05,), "seeds": (0, 1), "epochs": 2, "batch_size": 20}
        | changes
    )
    subjects = Experiment(task, tiny_network, {name: optimizer_spec(name) for name in settings.optimizers})
    return InitialModels(subjects, settings), settings


class Batch:
    """The objective on one batch."""

    def __init__(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> None:
        self.model, self.inputs, self.targets = model, inputs, targets
        self.evaluated = 0

    def loss(self) -> Tensor:
        self.evaluated += 1
        return nn.functional.cross_entropy(self.model(self.inputs), self.targets)

    def __call__(self) -> Tensor:
        self.model.zero_grad()
        loss = self.loss()
        loss.backward()
        return loss.detach()
