"""What a task and a contestant have to offer so that the engine can run them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from manifold_nets.comparison.records import Settings

__all__ = ["Contestant", "Data", "Objective", "Split", "Stepper", "Task", "TensorSplit"]


class Split(Protocol):
    """A part of a data set that gives batches of inputs and targets."""

    def __len__(self) -> int:
        """Number of examples."""
        ...

    def batches(self, batch_size: int, order: torch.Generator | None) -> Iterable[tuple[Any, Any]]:
        """Go through the examples once, in the order that a generator draws, or in their own.

        Equal states of the generator must give equal batches.
        """
        ...


@dataclass(frozen=True)
class TensorSplit:
    """A `Split` of tensors in memory.

    Args:
        inputs: shape (n, …).
        targets: shape (n, …).

    Example:
        >>> split = TensorSplit(torch.arange(3.0), torch.arange(3))
        >>> [targets.tolist() for _, targets in split.batches(2, None)]
        [[0, 1], [2]]
    """

    inputs: Tensor
    targets: Tensor

    def __len__(self) -> int:
        return len(self.targets)

    def batches(self, batch_size: int, order: torch.Generator | None) -> Iterable[tuple[Tensor, Tensor]]:
        """Go through the examples once; see `Split.batches`."""
        count = len(self)
        rows = torch.arange(count) if order is None else torch.randperm(count, generator=order)
        for start in range(0, count, batch_size):
            chosen = rows[start : start + batch_size]
            yield self.inputs[chosen], self.targets[chosen]


@dataclass(frozen=True)
class Data:
    """What a task trains and chooses on.

    Args:
        train: to train on.
        validation: to choose learning rates by.
        example_inputs: a few inputs as the model gets them, for the analysis of its symmetries.
        outputs: size of the model's output: number of classes.
    """

    train: Split
    validation: Split
    example_inputs: Any
    outputs: int


class Task(Protocol):
    """A data set with its loss and its error.

    Runs see `load` only. `load_test` is called once in a comparison, when all learning rates have been chosen.

    The error is taken of sums over examples, so that it is exact whatever the batches: `count` gives sums for a batch,
    `error` turns their total into a number in [0, 1]. The share of wrong answers counts ``[wrong, all]``; the mean
    intersection over union counts a confusion matrix.
    """

    @property
    def name(self) -> str:
        """What it is called on a command line."""
        ...

    @property
    def description(self) -> str:
        """Data, split sizes, loss and error in one sentence or two."""
        ...

    def load(self, settings: Settings) -> Data:
        """The training and validation data: always the same, whatever the seed of a run. Uses no test data."""
        ...

    def load_test(self, settings: Settings) -> Split:
        """The test data, prepared as `load` prepares its own."""
        ...

    def loss(self, outputs: Any, targets: Any) -> Tensor:
        """Mean loss of a batch, a scalar with a gradient."""
        ...

    def count(self, outputs: Any, targets: Any) -> Tensor:
        """Sums over a batch that the error is made of."""
        ...

    def error(self, counts: Tensor) -> float:
        """The error in [0, 1], of `count` summed over a data set."""
        ...


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
        form: whether it trains the plain model or the converted one.
        family: contestants that differ in one thing share a family; for colours and groups in reports.
        library: which package it is from, for the record.
        make: gives a `Stepper` for a model in that form, a learning rate and the settings. It may change the model,
            but not the function that it computes.
        full_batch: whether a step is to see all training examples; it then takes one step an epoch.
        description: one sentence.
    """

    name: str
    form: Literal["plain", "converted"]
    family: str
    library: str
    make: Callable[[nn.Module, float, Settings], Stepper]
    full_batch: bool = False
    description: str = ""
