"""What a contestant has to offer so that the engine can run it, and what it gets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from manifold_nets.comparison.models.forms import Form
from manifold_nets.comparison.records import Settings

__all__ = ["Contestant", "Objective", "Stepper"]


class Objective(Protocol):
    """The loss on the current batch as a function of the model's weights; as often as a contestant wants."""

    def loss(self) -> Tensor:
        """Evaluate the loss at the current weights, a scalar with its graph; no gradient is written."""
        ...

    def __call__(self) -> Tensor:
        """Clear the gradients, evaluate, differentiate into ``.grad``; return the loss, detached."""
        ...


class Stepper(Protocol):
    """A contestant at work on one model."""

    def step(self, objective: Objective) -> float | Tensor:
        """Take one step; return the loss before it, a float or a detached scalar."""
        ...

    def set_learning_rate(self, factor: float) -> None:
        """Make the learning rate ``factor`` times the one it was made with, for schedules."""
        ...


@dataclass(frozen=True)
class Contestant:
    """An optimizer that takes part.

    Args:
        name: what it is called on a command line.
        form: the model that it trains: the plain one, the converted one, or one whose filters are all held at the
            norms that they have, absorbed or not, without the classifier's (``"constrained"``) or with them
            (``"constrained-all"``).
        family: contestants that differ in one thing share a family; for colours and groups in reports.
        library: which package it is from, for the record.
        make: gives a `Stepper` for a model in that form, a learning rate and the settings. It may change the model,
            but not the function that it computes.
        full_batch: whether a step is to see all training examples; it then takes one step an epoch.
        description: one sentence.
    """

    name: str
    form: Form
    family: str
    library: str
    make: Callable[[nn.Module, float, Settings], Stepper]
    full_batch: bool = False
    description: str = ""
