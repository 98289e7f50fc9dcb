"""The interface between a comparison and an optimizer: how it is made for a model, and how it steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor, nn

from manifold_nets.comparison.errors import SettingsError
from manifold_nets.comparison.settings import Settings

Form = Literal["plain", "converted"]


class Objective(Protocol):
    """The loss on the current batch as a function of the model's weights, which can be evaluated any number of times.

    Example:
        >>> class Sum:
        ...     def __init__(self, model):
        ...         self.model = model
        ...     def loss(self):
        ...         return self.model(torch.ones(1, 2)).sum()
        ...     def __call__(self):
        ...         self.model.zero_grad()
        ...         loss = self.loss()
        ...         loss.backward()
        ...         return loss.detach()
        >>> objective: Objective = Sum(nn.Linear(2, 1))
        >>> objective().requires_grad, objective.loss().requires_grad
        (False, True)
    """

    def loss(self) -> Tensor:
        """Evaluate the loss at the current weights, a scalar with its graph; no gradient is written."""
        ...

    def __call__(self) -> Tensor:
        """Clear the gradients, evaluate, differentiate into ``.grad``; return the loss, detached."""
        ...


class Stepper(Protocol):
    """An optimizer at work on one model.

    Example:
        >>> class SignDescent:
        ...     def __init__(self, model, rate):
        ...         self.parameters, self.rate, self.factor = list(model.parameters()), rate, 1.0
        ...     def step(self, objective):
        ...         loss = objective()
        ...         for parameter in self.parameters:
        ...             parameter.data -= self.factor * self.rate * parameter.grad.sign()
        ...         return loss
        ...     def set_learning_rate(self, factor):
        ...         self.factor = factor
        >>> stepper: Stepper = SignDescent(nn.Linear(2, 1), 0.1)
    """

    def step(self, objective: Objective) -> float | Tensor:
        """Take one step; return the loss before it, a float or a detached scalar."""
        ...

    def set_learning_rate(self, factor: float) -> None:
        """Make the learning rate ``factor`` times the initial one, for schedules."""
        ...


Make = Callable[[nn.Module, float, Settings], Stepper]


@dataclass(frozen=True)
class OptimizerSpec:
    """An optimizer in a comparison.

    Args:
        name: its name on the command line and in tables.
        form: the model that it trains: the plain one or the converted one.
        family: variants of one optimizer share a family; used for colors and groups in reports.
        library: the package that it is from, for the record.
        make: makes a `Stepper` for a model in that form, a learning rate and the settings. It may change the model, but
            not its function.
        full_batch: whether a step uses all training examples; it then takes one step per epoch.
        description: one sentence.

    Raises:
        SettingsError: there is no such form.

    Example:
        >>> def make(model, rate, settings):
        ...     return TorchStepper(torch.optim.Rprop(model.parameters(), lr=rate))
        >>> OptimizerSpec("rprop", "plain", "rprop", "torch", make).full_batch
        False
    """

    name: str
    form: Form
    family: str
    library: str
    make: Make
    full_batch: bool = False
    description: str = ""

    def __post_init__(self) -> None:
        if self.form not in get_args(Form):
            expected = "'plain' or 'converted'; for other constraints, constrain the plain model in make"
            raise SettingsError(f"optimizers: {self.name}, form", self.form, expected)


class TorchStepper:
    """A `Stepper` around any `torch.optim.Optimizer`.

    Args:
        optimizer: an optimizer whose groups have a learning rate ``"lr"``.

    Example:
        >>> stepper = TorchStepper(torch.optim.SGD(nn.Linear(2, 1).parameters(), lr=0.1))
        >>> stepper.set_learning_rate(0.5)
        >>> stepper.optimizer.param_groups[0]["lr"]
        0.05
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self._rates = [group["lr"] for group in optimizer.param_groups]

    def step(self, objective: Objective) -> Tensor:
        """One gradient at the current weights, one step."""
        loss = objective()
        self.optimizer.step()
        return loss

    def set_learning_rate(self, factor: float) -> None:
        """Scale the learning rate of every group."""
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = factor * rate
